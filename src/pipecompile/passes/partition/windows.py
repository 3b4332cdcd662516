"""Stage windows: which stages a layer can be in at all, given a plan that is already known.

In a plan no worse than ``limit``, the first s stages hold at most ``limit`` x their speeds of work.
A layer whose ancestors and itself weigh more cannot be among them, and one whose descendants and
itself weigh more than the last stages can hold must come before those. (The idea of bounding
stations in assembly-line balancing.) On balanced models this decides nearly every layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.problem import Problem

#: Relative slack, so that rounding never cuts off a plan exactly as good as the limit.
SLACK = 1e-9


@dataclass(frozen=True)
class Windows:
    """Layer v lies in a stage ``first[v] .. last[v]``, both included."""

    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def undecided(self) -> int:
        """Binary choices left: the sum of the windows' widths less one each."""
        return sum(last - first for first, last in zip(self.first, self.last, strict=True))


def stage_windows(problem: Problem, limit: float) -> Windows:
    """Windows that every assignment with a largest load of at most ``limit`` seconds respects."""
    cost = np.asarray(problem.cost, dtype=np.float64)
    speeds = np.asarray(problem.speeds)
    reach = problem.ancestors.astype(np.float64)
    ahead, behind = reach @ cost, cost @ reach

    def needed(work: NDArray[np.float64], capacity: NDArray[np.float64]) -> NDArray[np.intp]:
        """How many of the stages, taken in order, are too few to hold ``work``."""
        room = np.cumsum(capacity) * limit * (1 + SLACK)
        return np.minimum(np.searchsorted(room, work, side="left"), problem.stages - 1)

    first = needed(ahead, speeds)
    last = problem.stages - 1 - needed(behind, speeds[::-1])
    return Windows(tuple(first.tolist()), tuple(last.tolist()))


__all__ = ["Windows", "stage_windows"]
