"""The way of samples through an executor: from the entrance, in order, matched by number."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from typing import Any

import torch

from pipecompile.errors import InputError, Overloaded, PipelineError, SampleDropped, StageError
from pipecompile.ir.sample import Record, Result, Sample
from pipecompile.runtime.executor import Executor
from pipecompile.streams.engine import Engine
from pipecompile.streams.entrance import Entrance, Options
from pipecompile.streams.ledger import Entry

clock = time.monotonic


class Feed:
    """One stream of samples. A single thread moves them (all but ``offer``); any may offer.

    ``changed`` guards the entrance and is notified when it fills or empties.
    """

    def __init__(self, engine: Engine, options: Options) -> None:
        self.engine, self.options = engine, options
        self.changed = threading.Condition()
        self.entrance = Entrance(options.on_overload, options.waiting)
        self.inside: deque[Entry] = deque()
        self.limit = options.inside(len(engine.package.modules))
        self.sequence = 0
        """Number of the next sample."""
        self._settled, self._gap = -1, 0

    def entry(self, item: Any) -> Entry:
        """Number and check one item of a source. What is wrong with it is told in its turn."""
        pts = None
        if isinstance(item, Sample):
            item, pts = item.value, item.pts
        entry = self.blank(pts)
        try:
            entry.leaves = self.engine.arguments.of_item(item)
        except InputError as error:
            entry.error = _at(error, entry)
        except Exception as error:  # an object of the user's own may refuse to be taken apart
            entry.error = error
        return entry

    def blank(self, pts: float | None) -> Entry:
        """The next sample in the account, its tensors still missing."""
        entry = Entry(self.sequence, pts, clock())
        self.sequence += 1
        if self.options.deadline is not None:
            entry.due = entry.offered + self.options.deadline
        self.engine.ledger.open(entry)
        return entry

    def offer(self, entry: Entry) -> list[Entry]:
        """Let a sample wait at the entrance, as the policy says; returns those dropped for it.

        A sample that waits is copied: its source may use the memory again. Needs ``changed``.

        Raises:
            Overloaded: if the policy is ``error`` and the entrance is full; the sample is dropped.
        """
        if self.entrance.refuses:
            self.engine.ledger.close(entry, "dropped")
            raise Overloaded(
                f"sample {entry.sequence} was refused: {len(self.entrance)} samples wait already (on_overload='error')"
            )
        gone = self.entrance.offer(entry)
        if entry.leaves is not None and entry not in gone:
            entry.leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in entry.leaves]
        self.changed.notify_all()
        for dropped in gone:
            self.drop(dropped)
        return gone

    def hurries(self, entry: Entry) -> bool:
        """Whether who moves samples must be told of one about to be offered. Needs ``changed``.

        Being woken takes time from the stages. When the pipeline is full it looks at the entrance
        anyway as soon as a result comes, and when a sample waits already it is waiting for room.
        """
        return entry.due < math.inf or (not self.entrance and len(self.inside) < self.limit)

    def drop(self, entry: Entry) -> None:
        """Book a sample that was turned away."""
        late = clock() - entry.due
        why = f"{late:.3f} s after its deadline" if late > 0.0 else f"on_overload={self.options.on_overload!r}"
        entry.leaves = None
        entry.error = SampleDropped(f"sample {entry.sequence} was dropped at the entrance: {why}")
        self.engine.ledger.close(entry, "dropped")

    def admit(self) -> list[Entry]:
        """Move samples from the entrance into the pipeline while there is room; returns those that were too late."""
        with self.changed:
            late = self.entrance.expired(clock())
            for entry in late:
                self.drop(entry)
            moved = bool(late)
            while (entry := self.entrance.first()) is not None and len(self.inside) < self.limit:
                # Starting workers takes seconds, in which others must be able to offer: so never with the lock.
                if not self.engine.takes(entry.leaves) or not self.enter(entry):
                    break
                self.entrance.pop()
                moved = True
            if moved:
                self.changed.notify_all()
            return late

    def wants_room(self) -> bool:
        """Whether a sample waits only for a free slot."""
        with self.changed:
            entry = self.entrance.first()
            return entry is not None and len(self.inside) < self.limit and self.engine.takes(entry.leaves)

    def prepare(self) -> None:
        """Start workers, or start them anew where weights moved or the next sample is larger, if nothing is inside."""
        if not self.inside:
            with self.changed:
                entry = self.entrance.first()
                leaves = entry.leaves if entry is not None else None
            self.engine.ready(leaves)

    def enter(self, entry: Entry) -> bool:
        """Put a sample into the pipeline; False if there is no room."""
        if entry.error is None:
            assert entry.leaves is not None
            try:
                session = self.session
                session.late(self.options.on_overload == "latest")
                number = session.submit(entry.leaves)
            except InputError as error:
                entry.error = _at(error, entry)
            else:
                if number is None:
                    return False
                entry.number, entry.entered, entry.leaves = number, clock(), None
        self.inside.append(entry)
        return True

    @property
    def session(self) -> Executor:
        """The running executor."""
        session = self.engine.session
        assert session is not None
        return session

    def collect(self, *, wait: bool) -> Entry | None:
        """The first sample inside, with its value or error; None if it is not there yet (never with ``wait``).

        Raises:
            PipelineError: if the pipeline failed.
        """
        entry = self.inside[0]
        if entry.error is None:
            session = self.session
            take = session.result if wait else session.poll
            try:
                taken = self.engine.guard(take)
                while taken is not None and taken[0] < entry.number:  # of a call that was interrupted
                    taken = self.engine.guard(take)
            except StageError as error:
                self._same(entry, error.sample)
                error.sample = entry.sequence
                entry.error = error
            else:
                if taken is None:
                    return None
                self._same(entry, taken[0])
                try:
                    entry.value = self.engine.rebuild(taken[1])
                except Exception as error:  # a user's own output class may refuse
                    entry.error = error
        self.inside.popleft()
        return entry

    def _same(self, entry: Entry, number: int) -> None:
        if number != entry.number:
            error = PipelineError(f"the result of sample {number} came when that of {entry.number} was due")
            self.engine.fail(error)
            raise error

    def deliver(self, entry: Entry, *, detailed: bool = False) -> Any:
        """Book a result as delivered; returns what the caller gets, a Result where records are asked for."""
        if entry.ticket is not None:
            entry.ticket.record = self.record(entry, detailed=detailed)
            self.engine.ledger.close(entry, "delivered")
            return entry.value
        result = entry.value
        if self.options.records:
            result = Result(entry.value, self.record(entry, detailed=True))
        self.engine.ledger.close(entry, "delivered")
        return result

    def record(self, entry: Entry, *, detailed: bool) -> Record:
        """What happened to a sample whose result is here; with the time in each stage if ``detailed``."""
        stages = self.session.seconds(entry.number) if detailed else ()
        gap = self._gap + entry.sequence - self._settled - 1
        self._settled, self._gap = entry.sequence, 0
        return Record(entry.sequence, entry.pts, entry.offered, entry.entered, clock(), stages, gap)

    def fail(self, entry: Entry) -> None:
        """Book a sample as failed."""
        self._gap += entry.sequence - self._settled - 1
        self._settled = entry.sequence
        self.engine.ledger.close(entry, "failed")

    def rest(self) -> list[Entry]:
        """Everything not over yet, in order, taken out of the feed: the pipeline has failed, or nobody wants it."""
        with self.changed:
            gone = [*self.inside, *self.entrance.clear()]
            self.inside.clear()
            self.changed.notify_all()
        return gone


def _at(error: InputError, entry: Entry) -> InputError:
    return InputError(f"sample {entry.sequence}: {error}")
