"""Stage windows: which stages a layer can be in at all, given a plan that is already known.

In a plan no worse than ``limit``, the first s stages hold at most ``limit`` x their devices' speeds
of work. A layer whose ancestors and itself weigh more cannot be among them, and one whose
descendants and itself weigh more than the last stages can hold must come before those. (The idea of
bounding stations in assembly-line balancing.) On balanced models this decides nearly every layer.
Pins and layers that must not be replicated narrow the windows further.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.classes import relative_speed
from pipecompile.passes.partition.problem import Arrangement, Problem

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

    @property
    def possible(self) -> bool:
        """Whether every layer has a stage it can be in."""
        return all(first <= last for first, last in zip(self.first, self.last, strict=True))


def stage_windows(problem: Problem, arrangement: Arrangement, limit: float) -> Windows:
    """Windows that every placement on ``arrangement`` with loads of at most ``limit`` seconds respects."""
    stages = len(arrangement)
    ahead, behind = problem.around

    def needed(work: NDArray[np.float64], order: Arrangement) -> NDArray[np.intp]:
        """How many of the stages, taken in order, are too few to hold ``work``."""
        capacity, seen = np.zeros(stages), set[tuple[int, ...]]()
        for stage, devices in enumerate(order):
            if devices not in seen:  # a device in several chunks has its time only once
                capacity[stage] = len(devices) * min(relative_speed(problem, device) for device in devices)
            seen.add(devices)
        with np.errstate(invalid="ignore"):
            room = np.nan_to_num(np.cumsum(capacity) * limit * (1 + SLACK), nan=np.inf, posinf=np.inf)
        return np.minimum(np.searchsorted(room, work, side="left"), stages - 1)

    first = needed(ahead, arrangement).tolist()
    last = (stages - 1 - needed(behind, arrangement[::-1])).tolist()
    restricted = set(problem.allowed) | (problem.single if problem.replicas else frozenset())
    for layer in restricted:
        may = [s for s, devices in enumerate(arrangement) if problem.permits(layer, devices)]
        first[layer] = max(first[layer], min(may, default=stages))
        last[layer] = min(last[layer], max(may, default=-1))
    for v in range(problem.layers):
        for u in problem.graph.predecessors(v):
            first[v] = max(first[v], first[u])
    for v in reversed(range(problem.layers)):
        for w in problem.graph.successors(v):
            last[v] = min(last[v], last[w])
    return Windows(tuple(first), tuple(last))


__all__ = ["Windows", "stage_windows"]
