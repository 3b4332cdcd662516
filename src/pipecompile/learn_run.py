"""One stream that is learned from: the source on one side, results on the other, turn by turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from pipecompile.ir.learning import Outcome
from pipecompile.runtime.learn_host import Learner

#: Takes an item of the source apart: the executor that can take it, the model's flat inputs, and its target's.
Prepare = Callable[[Any, int], tuple[Learner, list[Any], list[Any] | None]]


class LearnRun:
    """Feeds a learner from a source. Each :meth:`turn` hands over a sample, or waits where there is no room."""

    def __init__(self, source: Iterator[Any], prepare: Prepare, first: int) -> None:
        self._source, self._prepare = source, prepare
        self._learner: Learner | None = None
        self._waiting: tuple[list[Any], list[Any] | None] | None = None
        self._exhausted = self._ended = False
        self.error: BaseException | None = None
        self.submitted = self.delivered = first
        self.results: deque[Outcome] = deque()
        self.mark = False

    @property
    def begun(self) -> bool:
        """Whether any sample has gone in."""
        return self._learner is not None

    def turn(self) -> bool:
        """Do one thing; False when the stream is through and all its updates are made."""
        if not self._exhausted and self._waiting is None:
            self._pull()
        learner = self._learner
        if self._waiting is not None:
            assert learner is not None
            if learner.submit(*self._waiting, self.mark):
                self._waiting, self.mark = None, False
                self.submitted += 1
                self._take()
            else:
                self._wait(room=True)
            return True
        if learner is None or not learner.running:
            self._take()
            return False
        if not self._ended:
            self._ended = learner.end()
            self._wait(room=not self._ended)
        else:
            self._wait(room=False)
        return True

    def stop(self) -> None:
        """Take nothing more from the source; what is inside is still computed."""
        self._exhausted, self._waiting = True, None

    def _pull(self) -> None:
        try:
            item = next(self._source)
            learner, leaves, target = self._prepare(item, self.submitted)
        except StopIteration:
            self._exhausted = True
            return
        except Exception as error:
            # The results of all samples before come first.
            self._exhausted, self.error = True, error
            return
        if learner is not self._learner:
            self._learner = learner
            learner.begin(self.submitted)
        self._waiting = leaves, target

    def _wait(self, *, room: bool) -> None:
        assert self._learner is not None
        self._learner.wait(room=room)
        self._take()

    def _take(self) -> None:
        while self._learner is not None and (outcome := self._learner.result()) is not None:
            self.results.append(outcome)


__all__ = ["LearnRun"]
