"""Samples that are pushed: submitted from any thread, moved by one of ours, answered by tickets."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from pipecompile.errors import InputError, Overloaded, PipelineClosed
from pipecompile.ir.sample import Result, Sample
from pipecompile.streams.engine import TICKETS, Engine
from pipecompile.streams.entrance import OnError, Options
from pipecompile.streams.feed import Feed, clock
from pipecompile.streams.ledger import Entry
from pipecompile.streams.ticket import Ticket

#: How long the thread stays when nothing is left to do.
_IDLE_SECONDS = 1.0

#: Results that wait for a reader of ``results()`` before nothing more is taken out of the pipeline.
UNREAD = 64


class Pushed:
    """The samples submitted to a pipeline. Its thread comes with the first and leaves when idle."""

    def __init__(self, engine: Engine, options: Options) -> None:
        self._engine, self._options = engine, options
        self._feed = Feed(engine, options)
        self._changed = self._feed.changed
        self._thread: threading.Thread | None = None
        self._active = False
        self._pending = 0
        self._readers: list[weakref.ref[Results]] = []

    def submit(
        self, item: Any, pts: float | None, callback: Callable[[Ticket], Any] | None, timeout: float | None
    ) -> Ticket:
        """See :meth:`~pipecompile.InferencePipeline.submit`."""
        engine, feed = self._engine, self._feed
        engine.check()
        if callback is not None and not callable(callback):  # pyright: ignore[reportUnnecessaryComparison]
            raise InputError(f"callback={callback!r} is no function of a ticket")
        if isinstance(item, Sample):
            item, pts = item.value, item.pts if pts is None else pts
        leaves = engine.arguments.of_item(item)
        with self._changed:
            self._await_room(timeout)
            if not self._active:
                engine.claim(TICKETS)
                self._active = True
            entry = feed.blank(pts)
            entry.leaves = leaves
            entry.ticket = ticket = Ticket(entry.sequence, pts)
            if callback is not None:
                ticket.add_done_callback(lambda _, ticket=ticket: callback(ticket))
            session = engine.session if feed.hurries(entry) else None
            gone = feed.offer(entry)
            self._pending += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="pipecompile-tickets", daemon=True)
                self._thread.start()
        for dropped in gone:
            self._turn_away(dropped)
        if session is not None:
            session.nudge()
        return ticket

    def _await_room(self, timeout: float | None) -> None:
        """Wait at a full entrance where the policy is to block. Holds ``changed``."""
        if self._options.on_overload != "block":
            return
        until = math.inf if timeout is None else clock() + timeout
        while self._feed.entrance.refuses:
            self._engine.check()
            if threading.current_thread() is self._thread:
                raise Overloaded("the pipeline is full, and a callback, which runs in its thread, cannot wait for room")
            if any(reader.stuck_with_me for reader in self._open_readers()):
                raise Overloaded(
                    f"{UNREAD} results are unread, the pipeline is full, and the thread that reads results() is this "
                    "one: read results before submitting more, or submit from another thread"
                )
            left = until - clock()
            if left <= 0.0:
                raise Overloaded(f"the pipeline had no room for another sample within {timeout} s")
            self._changed.wait(min(left, 1.0))

    def results(self, on_error: OnError, records: bool) -> Results:
        """See :meth:`~pipecompile.InferencePipeline.results`."""
        self._engine.check()
        with self._changed:
            made = Results(self._engine, self._changed, self._busy, on_error, records, self._feed.sequence)
            self._readers = [ref for ref in self._readers if ref() is not None]
            self._readers.append(weakref.ref(made))
        return made

    def flush(self, timeout: float | None) -> bool:
        """Wait until no submitted sample is in flight; whether that is so."""
        with self._changed:
            if threading.current_thread() is self._thread:
                raise InputError("flush() in a callback would wait for itself")
            return self._changed.wait_for(lambda: not self._busy(), timeout)

    def wake(self) -> None:
        """The pipeline was closed: let everybody look."""
        with self._changed:
            self._changed.notify_all()

    def _busy(self) -> bool:
        return self._pending > 0

    def _open_readers(self) -> list[Results]:
        return [reader for ref in self._readers if (reader := ref()) is not None and reader.open]

    def _work(self) -> None:
        feed = self._feed
        while True:
            with self._changed:
                while not feed.inside and not feed.entrance:
                    self._let_go()  # also of a submit() that Ctrl-C ended
                    waited = not self._engine.closed and self._changed.wait(_IDLE_SECONDS)
                    if not waited and not feed.entrance:
                        self._thread = None
                        return
            try:
                self._move(feed)
            except Exception as error:
                self._lose(feed, error)

    def _move(self, feed: Feed) -> None:
        """One turn: let samples in, wait for what comes first, hand out a result."""
        self._engine.check()
        for late in feed.admit():
            self._turn_away(late)
        if not feed.inside:
            with self._changed:
                if not feed.entrance:
                    return
            feed.prepare()
            self._engine.guard(lambda: feed.session.turn(self._patience()))
            return
        with self._changed:
            if any(reader.full for reader in self._open_readers()):
                self._changed.wait(min(0.2, self._patience()))
                return
        entry = feed.collect(wait=False)
        if entry is None:
            room = feed.wants_room()
            self._engine.guard(lambda: feed.session.turn(self._patience(), room=room))
            return
        self._settle(feed, entry)

    def _patience(self) -> float:
        """Seconds until somebody at the entrance will be too late."""
        with self._changed:
            due = self._feed.entrance.next_due()
        return max(0.0, due - clock()) + 0.001 if due < math.inf else 3600.0

    def _let_go(self) -> None:
        """Leave the pipeline to others when nothing is under way: before the last ticket is told.

        Who has its result may then go on at once, with a call or a stream.
        """
        with self._changed:
            if self._active and not self._feed.inside and not self._feed.entrance:
                self._active = False
                self._engine.release()

    def _settle(self, feed: Feed, entry: Entry) -> None:
        ticket = entry.ticket
        assert ticket is not None
        if entry.error is None:
            with self._changed:
                detailed = any(reader.records for reader in self._open_readers())
            feed.deliver(entry, detailed=detailed)
            ticket.state = "delivered"
            self._let_go()
            self._tell(entry)
            ticket.set_result(entry.value)
        else:
            feed.fail(entry)
            ticket.state = "failed"
            self._let_go()
            self._tell(entry)
            ticket.set_exception(entry.error)
        self._over()

    def _over(self) -> None:
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()

    def _turn_away(self, entry: Entry) -> None:
        assert entry.ticket is not None
        self._let_go()
        entry.ticket.state = "dropped"
        entry.ticket.set_exception(entry.error)
        self._over()

    def _tell(self, entry: Entry) -> None:
        with self._changed:
            for reader in self._open_readers():
                reader.put(entry)
            self._changed.notify_all()

    def _lose(self, feed: Feed, error: Exception) -> None:
        """What is in flight is lost. Unless the pipeline is, others may be submitted."""
        if self._engine.closed and not isinstance(error, PipelineClosed):
            error.add_note("every submitted sample that was in flight is lost")
        for entry in feed.rest():
            entry.error = error
            feed.fail(entry)
            assert entry.ticket is not None
            entry.ticket.state = "failed"
            self._let_go()
            self._tell(entry)
            entry.ticket.set_exception(error)
            self._over()


class Results(Iterator[Any]):
    """Results of submitted samples, in order: an iterator to read in another thread than the one that submits.

    It begins with the first sample submitted after it was made, and skips dropped ones. It ends
    when the pipeline is closed, or after ``end()`` once nothing is in flight. Up to 64 results
    wait for it; then nothing is taken out of the pipeline, and the overload policy decides.
    """

    def __init__(
        self,
        engine: Engine,
        changed: threading.Condition,
        busy: Callable[[], bool],
        on_error: OnError,
        records: bool,
        first: int,
    ) -> None:
        Options(on_error=on_error)
        self._first = first
        self._engine, self._changed, self._busy = engine, changed, busy
        self._on_error, self.records = on_error, records
        self._unread: deque[Entry] = deque()
        self._thread = threading.get_ident()
        self._ended = False
        self.open = True

    @property
    def full(self) -> bool:
        """Whether its reader has to take some first."""
        return len(self._unread) >= UNREAD

    @property
    def stuck_with_me(self) -> bool:
        """Whether only the calling thread could make room in it."""
        return self.full and self._thread == threading.get_ident()

    def put(self, entry: Entry) -> None:
        """Append what became of a sample, if it was submitted since."""
        if entry.sequence >= self._first:
            self._unread.append(entry)

    def end(self) -> None:
        """No more will be submitted: the iteration ends after what is in flight."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Read no more."""
        with self._changed:
            self.open = False
            self._unread.clear()
            self._changed.notify_all()

    def __iter__(self) -> Results:
        return self

    def __next__(self) -> Any:
        """The next result; see :meth:`~pipecompile.InferencePipeline.results`."""
        while True:
            with self._changed:
                self._thread = threading.get_ident()
                while self.open and not self._unread:
                    if self._engine.closed or (self._ended and not self._busy()):
                        self.open = False
                    else:
                        self._changed.wait(1.0)
                if not self.open:
                    raise StopIteration
                entry = self._unread.popleft()
                self._changed.notify_all()
            if entry.error is None:
                assert entry.ticket is not None
                record = entry.ticket.record
                return Result(entry.value, record) if self.records and record is not None else entry.value
            if self._on_error == "raise":
                raise entry.error
            if self._on_error == "return":
                return entry.error

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Read no more."""
        self.close()
