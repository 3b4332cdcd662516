"""The dynamic program: the best path through a family of downsets and a choice of devices.

``f[t, D][I] = min over (J, g) of max(f[t-1, D-g][J], cost(I less J, g))``: the first t stages hold
downset I and use the devices D, the last of them a group g (one device, or replicas). With ``add``
costs are summed instead. All pairs (J, I) are laid out once and for all, so that a step is a few
operations on whole arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from pipecompile.passes.partition.classes import Classes, Group
from pipecompile.passes.partition.downsets import Floats
from pipecompile.passes.partition.pairs import Pairs
from pipecompile.passes.partition.problem import Arrangement, Placement

#: Cost of every pair on a group of devices at a stage (0, 1, ...).
Cost = Callable[[Group, int], Floats]
State = tuple[int, ...]
Steps = list[dict[State, list[tuple[State, Group]]]]


def free_steps(classes: Classes, most: int) -> Steps:
    """Any order of the devices: states are how many of each class are used."""
    steps: Steps = []
    before = {tuple(0 for _ in classes.counts)}
    groups = classes.groups()
    for _ in range(most):
        step: dict[State, list[tuple[State, Group]]] = {}
        for state in sorted(before):
            for group in groups:
                after = tuple(a + b for a, b in zip(state, group, strict=True))
                if all(used <= there for used, there in zip(after, classes.counts, strict=True)):
                    step.setdefault(after, []).append((state, group))
        if not step:
            break
        # The first of equals is taken: fewer replicas, and devices in their own order.
        steps.append({state: sorted(came, key=lambda c: (sum(c[1]), c[1])) for state, came in step.items()})
        before = set(step)
    return steps


def fixed_steps(order: Sequence[Group]) -> Steps:
    """One given sequence of groups: states are how many of them are used."""
    return [{(at + 1,): [((at,), group)]} for at, group in enumerate(order)]


@dataclass(frozen=True)
class Path:
    """Downsets passed, from empty to full, and the group of each stage between them."""

    downsets: tuple[int, ...]
    groups: tuple[Group, ...]

    def placement(self, pairs: Pairs, arrangement: Arrangement | None = None) -> Placement:
        """As a placement; the devices are the classes' first, or those of ``arrangement``."""
        member = pairs.family.member
        stage_of = np.zeros(pairs.problem.layers, dtype=np.intp)
        for downset in self.downsets[1:-1]:
            stage_of += ~member[downset]
        devices = arrangement or pairs.classes.arrange(list(self.groups))
        return Placement(tuple(stage_of.tolist()), devices)


class Sweep:
    """All values of the recursion for one cost."""

    def __init__(self, pairs: Pairs, steps: Steps, cost: Cost, add: bool = False) -> None:
        self.pairs, self.steps, self.cost = pairs, steps, cost
        self.join: Callable[..., Floats] = np.add if add else np.maximum
        size = pairs.family.size
        self.empty, self.full = pairs.family.ends
        self.rows, self.starts = _segments(pairs.upper)
        first = np.full(size, inf)
        first[self.empty] = 0.0
        state = next(iter(steps[0].values()))[0][0] if steps else ()
        self.values: list[dict[State, Floats]] = [{state: first}]
        for at, step in enumerate(steps):
            self.values.append({after: self._step(at, came) for after, came in step.items()})

    def _step(self, at: int, came: list[tuple[State, Group]]) -> Floats:
        best = np.full(self.pairs.family.size, inf)
        for state, group in came:
            whole = self.join(self.values[at][state][self.pairs.lower], self.cost(group, at))
            if len(whole):
                best[self.rows] = np.minimum(best[self.rows], np.minimum.reduceat(whole, self.starts))
        return best

    def value(self, stages: int, state: State) -> float:
        """The best cost of all layers in ``stages`` stages on the devices ``state``."""
        return float(self.values[stages][state][self.full])

    def ends(self) -> list[tuple[int, State]]:
        """``(stages, state)`` of every complete pipeline that is possible at all."""
        return [
            (stages, state)
            for stages, found in enumerate(self.values)
            if stages
            for state in found
            if self.value(stages, state) < inf
        ]

    def trace(self, stages: int, state: State) -> Path:
        """A path of the best cost, by following the choices back."""
        downsets, groups, at = [self.full], list[Group](), self.full
        for stage in range(stages - 1, -1, -1):
            begin = int(np.searchsorted(self.pairs.upper, at))
            end = int(np.searchsorted(self.pairs.upper, at, side="right"))
            lower = self.pairs.lower[begin:end]
            best: tuple[float, int, State, Group] | None = None
            for before, group in self.steps[stage][state]:
                whole = self.join(self.values[stage][before][lower], self.cost(group, stage)[begin:end])
                if not len(whole):
                    continue
                choice = int(whole.argmin())
                if best is None or whole[choice] < best[0] * (1 - 1e-12):
                    best = (float(whole[choice]), int(lower[choice]), before, group)
            assert best is not None, "a finite value came from somewhere"
            _, at, state, group = best
            downsets.append(at)
            groups.append(group)
        return Path(tuple(downsets[::-1]), tuple(groups[::-1]))


def _segments(upper: NDArray[np.intp]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Downsets that are the upper end of a pair, and where their pairs start."""
    if not len(upper):
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
    starts = np.flatnonzero(np.concatenate(([True], upper[1:] != upper[:-1])))
    return upper[starts], starts


__all__ = ["Cost", "Path", "State", "Steps", "Sweep", "fixed_steps", "free_steps"]
