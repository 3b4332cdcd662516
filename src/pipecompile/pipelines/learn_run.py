"""One stream that is learned from: the source on one side, results on the other, turn by turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from pipecompile.ir.learning import Outcome
from pipecompile.pipelines.learn_source import LearnSource
from pipecompile.runtime.learn_host import Learner

#: Seconds to look for results before asking a source again that has nothing yet.
_GLANCE = 2e-3

#: Takes an item of the source apart: the model's flat inputs, and its target's. Called with the sample's number.
Prepare = Callable[[Any, int], tuple[list[Any], list[Any] | None]]


_Kept = tuple[list[Any], list[Any] | None]


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

    ``first`` is the number of the first sample; ``group`` samples make one update, at most ``inside``
    wait for their result. With ``every``, a snapshot is asked for after so many samples, and samples
    are kept until one follows them, to be learned again after a restart.
    """

    def __init__(
        self,
        source: LearnSource,
        prepare: Prepare,
        executors: Executors,
        first: int,
        group: int,
        inside: int = 1 << 60,
        every: int = 0,
    ) -> None:
        self.source, self._prepare, self._executors, self._inside = source, prepare, executors, inside
        self._learner: Learner | None = None
        self._waiting: _Kept | None = None
        self._exhausted = self._ended = False
        self.error: BaseException | None = None
        self.submitted = self.taken = first
        self.delivered = 0
        self.sequence: deque[int] = deque()
        """How many the source gave before each sample whose result has not been handed over."""
        self.results: deque[Outcome] = deque()
        self._start, self._group = first, group
        self._every, self._auto = every, -1
        self._kept: deque[_Kept] = deque()
        self._again: deque[_Kept] = deque()
        self._known = 0
        self._fresh = True
        self._marks: set[int] = set()
        self._wanted: set[int] = set()
        self._parts: dict[int, list[dict[str, Any]]] = {}

    def turn(self) -> bool:
        """Do one thing; False when the stream is through and all its updates are made."""
        if self._waiting is None and self._again:
            self._waiting, self._fresh = self._again.popleft(), False
        if not self._exhausted and self._waiting is None:
            if self.submitted - self.taken >= self._inside:
                self._wait(room=False)
                return True
            if not self._pull():
                self._wait(room=False, timeout=_GLANCE)
                return True
        if self._waiting is None:
            return self._drain()
        if self._learner is None or self._executors.stale:
            if not self._drain():
                self._learner, self._ended = self._executors.ready(), False
                self._start = self.submitted
                self._learner.begin(self._start)
        else:
            self._submit(self._learner, self._waiting)
        return True

    def _submit(self, learner: Learner, sample: _Kept) -> None:
        if self._every and self._auto < 0 and (self.submitted - self._start) % self._every == self._every - 1:
            self._auto = self._mark()
        if not learner.submit(*sample, self.submitted in self._marks):
            self._wait(room=True)
            return
        if self._every:
            # Its source may use the memory again.
            self._kept.append(_copied(sample) if self._fresh else sample)
        self._marks.discard(self.submitted)
        self._waiting, self._fresh = None, True
        self.submitted += 1
        self._take()

    def saved(self, stages: int) -> tuple[int, list[dict[str, Any]]] | None:
        """The parts of the snapshot last asked for by itself, once complete, and how many samples lie before it."""
        parts = self._found(self._auto, stages) if self._auto >= 0 else None
        if parts is None:
            return None
        samples, self._auto = self._auto + 1, -1
        self._forget(samples - 1)
        while len(self._kept) > self.submitted - samples:
            self._kept.popleft()
        return samples, parts

    def restart(self, samples: int) -> int:
        """Go on with another learner from a snapshot with so many samples before it; how many are learned again."""
        if self._waiting is not None:
            self._kept.append(self._waiting)
        again = self.submitted - samples
        self._again, self._kept = deque((*self._kept, *self._again)), deque()
        self._known += self.taken - samples  # results that have been there before
        self.submitted = self.taken = samples
        self._learner, self._waiting, self._fresh, self._ended, self._auto = None, None, True, False, -1
        self._marks = {number for number in self._wanted if number >= samples}
        self._parts.clear()
        return again

    def mark(self) -> int:
        """Ask for a snapshot after the next update whose last sample is yet to be handed over; its number."""
        wanted = self._mark()
        self._wanted.add(wanted)
        return wanted

    def _mark(self) -> int:
        wanted = self.submitted + self._group - 1 - (self.submitted - self._start) % self._group
        self._marks.add(wanted)
        return wanted

    def parts(self, sample: int, stages: int) -> list[dict[str, Any]] | None:
        """What all stages have to say of the snapshot after a sample, once they have; to be asked for until then."""
        found = self._found(sample, stages)
        if found is not None:
            self._wanted.discard(sample)
            self._forget(sample)
        return found

    def _found(self, sample: int, stages: int) -> list[dict[str, Any]] | None:
        if self._learner is not None:
            found, self._learner.snapshots[:] = list(self._learner.snapshots), []
            for part in found:
                self._parts.setdefault(part["sample"], []).append(part)
        parts = self._parts.get(sample, [])
        return parts if len(parts) == stages else None

    def _forget(self, sample: int) -> None:
        """Let the parts of a snapshot go, unless somebody else waits for the same one."""
        if sample not in self._wanted and sample != self._auto:
            self._parts.pop(sample, None)

    def stop(self) -> None:
        """Take nothing more from the source; what is inside is still computed."""
        if self._waiting is not None and self._fresh:
            self._waiting = None
            self.sequence.pop()
            self.source.back()
        self._exhausted = True
        self.source.close()

    def _pull(self) -> bool:
        """Take the next item of the source; False if there is none yet."""
        try:
            # Nothing to look after meanwhile, unless results are to come.
            found = self.source.take(patient=self.submitted == self.taken)
        except StopIteration:
            self._exhausted = True
            return True
        except Exception as error:
            # The results of all samples before come first.
            self._exhausted, self.error = True, error
            return True
        if found is None:
            return False
        try:
            self._waiting = self._prepare(found[1], self.submitted)
            self.sequence.append(found[0])
        except Exception as error:
            self._exhausted, self.error = True, error
            self.source.back()
            self.source.close()
        return True

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

    def _wait(self, *, room: bool, timeout: float | None = None) -> None:
        assert self._learner is not None
        self._learner.wait(room=room, timeout=timeout)
        self._take()

    def _take(self) -> None:
        while self._learner is not None and (outcome := self._learner.result()) is not None:
            self.taken += 1
            if self._known:
                self._known -= 1
            else:
                self.results.append(outcome)


def _copied(sample: _Kept) -> _Kept:
    leaves, target = sample
    return [leaf.clone() for leaf in leaves], None if target is None else [leaf.clone() for leaf in target]


__all__ = ["Executors", "LearnRun"]
