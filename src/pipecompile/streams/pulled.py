"""Streams that pull: results of a source of samples, in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

from pipecompile.errors import PipecompileError
from pipecompile.streams.engine import STREAM, Engine
from pipecompile.streams.entrance import Options
from pipecompile.streams.feed import Feed, clock
from pipecompile.streams.ledger import Entry

#: A source that takes longer than this for a sample is looked past for finished results first.
_SLOW_SECONDS = 0.0002


class Stream(Iterator[Any]):
    """What :meth:`~pipecompile.InferencePipeline.stream` returns: an iterator that outlives the error of a sample.

    ``close()``, the end of a ``with`` block and garbage collection end it early: samples inside are
    computed, and counted as dropped since nobody took their results.
    """

    def __init__(self, engine: Engine, source: Iterable[Any], options: Options) -> None:
        self._run = _Run(engine, source, options)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        """The next result.

        Raises:
            StageError, InputError: for this very sample (``on_error="raise"``); the next call goes on.
            Exception: what the source raised, after the results of all samples it gave.
            WorkerDied, WorkerHung, PipelineClosed: the pipeline is lost.
        """
        run = self._run
        # The frames of an error may be kept, as a notebook keeps those of the last one. They must not
        # keep the iterator of a loop that the error ended: the pipeline would be busy with it for ever.
        del self
        return run.next()

    def close(self) -> None:
        """End the stream. What is inside is computed and its results dropped; the pipeline can be used again."""
        self._run.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the stream."""
        self.close()

    def __del__(self) -> None:
        """An iteration that was left early ends here."""
        self.close()


class _Run:
    """What a stream does. Unlike its iterator it may be held by the frames of errors."""

    def __init__(self, engine: Engine, source: Iterable[Any], options: Options) -> None:
        self._engine, self._options = engine, options
        self._source: Iterable[Any] | None = source
        self._feed: Feed | None = None
        self._items: Iterator[Any] | None = None
        self._reader: _Reader | None = None
        self._waiting: Entry | None = None
        self._slow = self._over = False
        self._error: BaseException | None = None

    def next(self) -> Any:
        """See :meth:`Stream.__next__`."""
        if self._over:
            raise StopIteration
        feed = self._feed or self._begin()
        while True:
            try:
                entry = self._pulled(feed) if self._reader is None else self._read(feed)
            except Exception as error:
                self._lose(feed, error)
                raise
            if entry is None:
                break
            if entry.error is None:
                return feed.deliver(entry)
            feed.fail(entry)
            if self._options.on_error == "raise":
                raise entry.error
            if self._options.on_error == "return":
                return entry.error
        self.close()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration

    def _begin(self) -> Feed:
        self._engine.claim(STREAM)
        try:
            self._engine.ready(None)
            assert self._source is not None
            self._items, self._source = iter(self._source), None
            self._feed = feed = Feed(self._engine, self._options)
            if self._options.on_overload != "block":
                self._reader = _Reader(feed, self._items)
                self._reader.start()
        except BaseException:
            self._over = True
            self._engine.release()
            raise
        return feed

    def _pulled(self, feed: Feed) -> Entry | None:
        """The next sample that is over, pulling from the source whenever there is room; None at the end."""
        inside = feed.inside
        while True:
            entry = self._waiting
            if entry is None and self._items is not None:
                # Do not sit on a finished result while a slow source makes up its mind.
                if self._slow and inside and (done := feed.collect(wait=False)) is not None:
                    return done
                if len(inside) < feed.limit:
                    entry = self._pull(feed, self._items)
            if entry is None:
                if inside:
                    return feed.collect(wait=True)
                if self._items is None:
                    return None
                continue
            if entry.due < clock():
                self._waiting = None
                feed.drop(entry)
                continue
            fits = self._engine.takes(entry.leaves)
            if not fits and not inside:
                self._engine.ready(entry.leaves)
                fits = True
            if fits and len(inside) < feed.limit:
                if feed.enter(entry):
                    self._waiting = None
                    continue
                if self._engine.guard(feed.session.wait):
                    continue
            if inside:
                return feed.collect(wait=True)

    def _pull(self, feed: Feed, items: Iterator[Any]) -> Entry | None:
        began = clock()
        try:
            item = next(items)
        except StopIteration:
            self._items = None
            return None
        except Exception as error:
            self._items, self._error = None, error
            return None
        self._slow = clock() - began > _SLOW_SECONDS
        self._waiting = entry = feed.entry(item)
        return entry

    def _read(self, feed: Feed) -> Entry | None:
        """The next sample that is over, while the reader fills the entrance; None at the end."""
        reader = self._reader
        assert reader is not None
        while True:
            feed.admit()
            if feed.inside:
                done = feed.collect(wait=False)
                if done is not None:
                    return done
                session = feed.session
                room = feed.wants_room()
                self._engine.guard(lambda session=session, room=room: session.turn(room=room))
                continue
            with feed.changed:
                if not feed.entrance:
                    if reader.ended:
                        self._error = reader.error
                        return None
                    feed.changed.wait(1.0)
                    continue
            feed.prepare()
            session = feed.session
            # Also when a worker has yet to offer its first slot.
            self._engine.guard(session.turn)

    def close(self) -> None:
        """See :meth:`Stream.close`."""
        if self._over or self._engine.foreign:
            self._over = True
            return
        self._over = True
        feed, self._items, self._source = self._feed, None, None
        if feed is None:
            return
        if self._reader is not None:
            self._reader.stop()
        try:
            if self._waiting is not None:
                self._engine.ledger.close(self._waiting, "dropped")
                self._waiting = None
            with feed.changed:
                for entry in feed.entrance.clear():
                    feed.drop(entry)
            while feed.inside:
                if self._engine.closed:
                    break
                entry = feed.collect(wait=True)
                assert entry is not None
                self._engine.ledger.close(entry, "dropped")
        except PipecompileError as error:
            # The consumer has left; whoever uses the pipeline next is told (it is closed).
            self._engine.fail(error)
        finally:
            for entry in feed.rest():
                self._engine.ledger.close(entry, "failed")
            self._engine.release()

    def _lose(self, feed: Feed, error: Exception) -> None:
        """The pipeline failed: everything under way is lost."""
        self._over = True
        self._items = None
        if self._engine.foreign:
            return
        if feed.inside and not self._engine.closed:
            # Nobody knows any more which result belongs to which sample.
            self._engine.fail(error)
        if self._reader is not None:
            self._reader.stop()
        lost = feed.rest()
        if self._waiting is not None:
            lost.append(self._waiting)
            self._waiting = None
        for entry in lost:
            self._engine.ledger.close(entry, "failed")
        _name(error, lost)
        self._engine.release()


class _Reader(threading.Thread):
    """Reads a live source at its own pace. Ends with the source, or at the first sample after ``stop``."""

    def __init__(self, feed: Feed, items: Iterator[Any]) -> None:
        super().__init__(name="pipecompile-reader", daemon=True)
        self._feed, self._items, self._stopped = feed, items, False
        self.ended = False
        self.error: BaseException | None = None

    def stop(self) -> None:
        """Take no further sample."""
        with self._feed.changed:
            self._stopped = True

    def run(self) -> None:
        """Offer every sample as it comes."""
        feed = self._feed
        try:
            for item in self._items:
                with feed.changed:
                    if self._stopped:
                        return
                    entry = feed.entry(item)
                    session = feed.engine.session if feed.hurries(entry) else None
                    feed.offer(entry)
                if session is not None:
                    session.nudge()
        except BaseException as error:
            self.error = error
        finally:
            with feed.changed:
                self.ended = True
                feed.changed.notify_all()
            if (session := feed.engine.session) is not None:
                session.nudge()


def _name(error: Exception, lost: list[Entry]) -> None:
    """Say which samples of the stream were lost; the executor counts from its own start."""
    if lost:
        first, last = lost[0].sequence, lost[-1].sequence
        error.add_note(
            f"samples {first} to {last} of the stream had no result yet"
            if last > first
            else f"sample {first} of the stream had no result yet"
        )
