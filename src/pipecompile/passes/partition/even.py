"""A first cut: one order of the layers, parted where the running sum of costs is even."""

from __future__ import annotations

from itertools import pairwise
from math import isfinite

import numpy as np

from pipecompile.passes.partition.classes import relative_speed
from pipecompile.passes.partition.problem import Arrangement, Placement, Problem


def even_cut(problem: Problem, arrangement: Arrangement, order: tuple[int, ...]) -> Placement | None:
    """Stages whose shares of the cost are as their devices' speeds; None where that is no plan.

    Its only use is that better plans need not look at stages that cost more.
    """
    speeds = [sum(relative_speed(problem, device) for device in devices) for devices in arrangement]
    if problem.layers < len(arrangement) or not isfinite(sum(speeds)):
        return None
    sums = np.cumsum([problem.cost[layer] for layer in order])
    wanted = np.cumsum(speeds)[:-1] / sum(speeds) * sums[-1]
    ends = [0, *np.searchsorted(sums, wanted).tolist(), problem.layers]
    for stage in range(1, len(arrangement)):  # neither this stage nor a later one may be empty
        ends[stage] = min(max(ends[stage], ends[stage - 1] + 1), problem.layers - (len(arrangement) - stage))
    stage_of = [0] * problem.layers
    for stage, (low, high) in enumerate(pairwise(ends)):
        for layer in order[low:high]:
            stage_of[layer] = stage
    placement = Placement(tuple(stage_of), arrangement)
    return None if problem.check(placement) else placement


def floor(problem: Problem) -> float:
    """A lower bound of the objective that needs no solver, in seconds: perfect balance or the largest layer."""
    every = [problem.seconds(device) for device in range(len(problem.places))]
    quickest = np.min(every, axis=0)
    if problem.goal.kind == "latency":
        return float(quickest.sum())
    speeds = sum(relative_speed(problem, device) for device in range(len(problem.places)))
    shared = sum(problem.cost) / speeds if isfinite(speeds) else 0.0
    widest = len(problem.places) if problem.replicas else 1
    return max(shared, float(quickest.max(initial=0.0)) / widest)


__all__ = ["even_cut", "floor"]
