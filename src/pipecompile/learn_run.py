"""One stream that is learned from: the source on one side, results on the other, turn by turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from pipecompile.ir.learning import Outcome
from pipecompile.runtime.learn_host import Learner

#: Takes an item of the source apart: the model's flat inputs, and its target's. Called with the sample's number.
Prepare = Callable[[Any, int], tuple[list[Any], list[Any] | None]]


class Executors(Protocol):
    """Who gives a run its learner."""

    @property
    def stale(self) -> bool:
        """Whether the learner there is cannot take the sample just prepared, and another one can."""
        ...

    def ready(self) -> Learner:
        """The learner for the sample just prepared; called when nothing is in flight."""
        ...


class LearnRun:
    """Feeds a learner from a source. Each :meth:`turn` hands over a sample, or waits where there is no room.

    ``first`` is the number of the first sample; ``group`` samples make one update.
    """

    def __init__(self, source: Iterator[Any], prepare: Prepare, executors: Executors, first: int, group: int) -> None:
        self._source, self._prepare, self._executors = source, prepare, executors
        self._learner: Learner | None = None
        self._waiting: tuple[list[Any], list[Any] | None] | None = None
        self._exhausted = self._ended = False
        self.error: BaseException | None = None
        self.submitted = self.delivered = first
        self.results: deque[Outcome] = deque()
        self._start, self._group = first, group
        self._marks: set[int] = set()
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def turn(self) -> bool:
        """Do one thing; False when the stream is through and all its updates are made."""
        if not self._exhausted and self._waiting is None:
            self._pull()
        if self._waiting is None:
            return self._drain()
        if self._learner is None or self._executors.stale:
            if not self._drain():
                self._learner, self._ended = self._executors.ready(), False
                self._start = self.submitted
                self._learner.begin(self._start)
        elif self._learner.submit(*self._waiting, self.submitted in self._marks):
            self._marks.discard(self.submitted)
            self._waiting = None
            self.submitted += 1
            self._take()
        else:
            self._wait(room=True)
        return True

    def mark(self) -> int:
        """Ask for a snapshot after the next update whose last sample is yet to be handed over; its number."""
        wanted = self.submitted + self._group - 1 - (self.submitted - self._start) % self._group
        self._marks.add(wanted)
        return wanted

    def parts(self, sample: int, stages: int) -> list[dict[str, Any]] | None:
        """What all stages have to say of the snapshot after a sample, once they have."""
        if self._learner is not None:
            found, self._learner.snapshots[:] = list(self._learner.snapshots), []
            for part in found:
                self._parts.setdefault(part["sample"], []).append(part)
        return self._parts.pop(sample) if len(self._parts.get(sample, ())) == stages else None

    def stop(self) -> None:
        """Take nothing more from the source; what is inside is still computed."""
        self._exhausted, self._waiting = True, None

    def _pull(self) -> None:
        try:
            self._waiting = self._prepare(next(self._source), self.submitted)
        except StopIteration:
            self._exhausted = True
        except Exception as error:
            # The results of all samples before come first.
            self._exhausted, self.error = True, error

    def _drain(self) -> bool:
        """Let what is in flight come out; False when nothing is any more."""
        learner = self._learner
        if learner is None or not learner.running:
            self._take()
            return False
        if not self._ended:
            self._ended = learner.end()
        self._wait(room=not self._ended)
        return True

    def _wait(self, *, room: bool) -> None:
        assert self._learner is not None
        self._learner.wait(room=room)
        self._take()

    def _take(self) -> None:
        while self._learner is not None and (outcome := self._learner.result()) is not None:
            self.results.append(outcome)


__all__ = ["Executors", "LearnRun"]
