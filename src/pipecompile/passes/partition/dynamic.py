"""The dynamic program for every goal: candidates from a family of downsets, and what it proves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

import numpy as np

from pipecompile.passes.partition.classes import Group
from pipecompile.passes.partition.downsets import Floats
from pipecompile.passes.partition.load import ROUNDING
from pipecompile.passes.partition.pairs import Pairs
from pipecompile.passes.partition.problem import Arrangement, Placement, Problem
from pipecompile.passes.partition.sweep import State, Steps, Sweep

#: Costs closer than this (relative) are taken as equal, so that rounding decides nothing.
TIE = 1e-9


@dataclass
class Outcome:
    """``placements`` worth judging, the best first by the simplified cost, whose optimum is ``bound``.

    ``fewer`` are placements by number of devices, where all should have been used. ``bound`` is
    infinite if nothing is possible; then ``short`` is the least possible excess of memory in bytes.
    """

    placements: list[Placement] = field(default_factory=list[Placement])
    bound: float = inf
    fewer: dict[int, Placement] = field(default_factory=dict[int, Placement])
    short: float = -inf


@dataclass
class Dynamic:
    """Dynamic programs over one family's pairs; ``steps`` says which devices may follow which."""

    pairs: Pairs
    steps: Steps
    arrangement: Arrangement | None = None

    @property
    def problem(self) -> Problem:
        """The problem solved."""
        return self.pairs.problem

    def run(self) -> Outcome:
        """Solve for the problem's goal."""
        found = Outcome()
        for stages in self._counts():
            self._solve(found, stages)
        if found.bound == inf and self.problem.limited:
            found.short = min(self._shortage(stages) for stages in self._counts())
        return found

    def _counts(self) -> list[int | None]:
        """Numbers of stages to solve for one by one; None: any number at once."""
        problem = self.problem
        if not problem.positional:
            return [None]
        return list(range(problem.least_stages, min(len(self.steps), problem.layers) + 1)) or [None]

    def _wanted(self, sweep: Sweep, stages: int | None) -> list[tuple[int, State]]:
        """Complete pipelines that use as many devices as they must, the best first."""
        ends = [end for end in sweep.ends() if stages in (None, end[0])]
        if not self.problem.idle:
            ends = [(s, state) for s, state in ends if self._devices(s, state) == self._devices_wanted]
        return sorted(ends, key=lambda end: sweep.value(*end))

    @property
    def _devices_wanted(self) -> int:
        return len(self.arrangement) if self.arrangement else len(self.problem.places)

    def _devices(self, stages: int, state: State) -> int:
        return stages if self.arrangement else sum(state)

    def _cost(self, stages: int | None, of: Callable[[Group], Floats], limit: float = inf) -> Callable[[Group, int], Floats]:
        """Cost arrays by group and stage: infinite above a load of ``limit`` or beyond a memory limit."""
        known: dict[tuple[Group, int], Floats] = {}
        positional = self.problem.positional

        def cost(group: Group, stage: int) -> Floats:
            key = (group, stage if positional else 0)
            if key not in known:
                found = of(group)
                if limit < inf:
                    found = np.where(self.pairs.load(group) <= limit * (1 + TIE), found, inf)
                if self.problem.limited:
                    over = self.pairs.excess(group, key[1], stages or 1)
                    found = np.where(over <= ROUNDING * self._memory(group), found, inf)
                known[key] = found
            return known[key]

        return cost

    def _memory(self, group: Group) -> float:
        kinds = self.pairs.classes.kinds
        room = min(kinds[c].memory for c in range(len(group)) if group[c])
        return room if room < inf else 1.0

    def _solve(self, found: Outcome, stages: int | None) -> None:
        goal, pairs = self.problem.goal, self.pairs
        if goal.kind == "latency":
            sweep = Sweep(pairs, self.steps, self._cost(stages, pairs.latency, goal.limit), add=True)
            self._keep(found, sweep, self._wanted(sweep, stages), stages, None)
            return
        sweep = Sweep(pairs, self.steps, self._cost(stages, pairs.load))
        ends = self._wanted(sweep, stages)
        for devices in range(1, len(self.problem.places)) if not self.problem.idle and not self.arrangement else ():
            some = [end for end in sweep.ends() if self._devices(*end) == devices and stages is None]
            if some:
                best = min(some, key=lambda end: sweep.value(*end))
                found.fewer[devices] = sweep.trace(*best).placement(pairs)
        if not ends:
            return
        optimum = sweep.value(*ends[0])
        if goal.limit < inf:
            optimum = self._within(optimum, stages)
            if optimum == inf:
                return
        limited = self._cost(stages, pairs.latency if goal.limit < inf else pairs.transfer, optimum)
        frugal = Sweep(pairs, self.steps, limited, add=True)
        self._keep(found, frugal, self._wanted(frugal, stages), stages, optimum)
        if goal.limit == inf:
            path = sweep.trace(*ends[0])
            found.placements.append(path.placement(pairs, self.arrangement))

    def _within(self, lowest: float, stages: int | None) -> float:
        """The least load with which some pipeline keeps the goal's limit on latency."""
        groups = {group for step in self.steps for came in step.values() for _, group in came}
        loads = np.unique(np.concatenate([self.pairs.load(group) for group in groups]))
        loads = loads[(loads >= lowest * (1 - TIE)) & (loads < inf)]

        def fits(limit: float) -> bool:
            sweep = Sweep(self.pairs, self.steps, self._cost(stages, self.pairs.latency, limit), add=True)
            ends = self._wanted(sweep, stages)
            return bool(ends) and sweep.value(*ends[0]) <= self.problem.goal.limit * (1 + ROUNDING)

        if not len(loads) or not fits(float(loads[-1])):
            return inf
        low, high = 0, len(loads) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(float(loads[middle])) else (middle + 1, high)
        return float(loads[low])

    def _keep(
        self, found: Outcome, sweep: Sweep, ends: list[tuple[int, State]], stages: int | None, optimum: float | None
    ) -> None:
        if not ends:
            return
        value = sweep.value(*ends[0]) if optimum is None else optimum
        placement = sweep.trace(*ends[0]).placement(self.pairs, self.arrangement)
        if value < found.bound:
            found.placements.insert(0, placement)
            found.bound = value
        else:
            found.placements.append(placement)

    def _shortage(self, stages: int | None) -> float:
        """The least largest excess of memory over a device's limit, in bytes, of any pipeline."""
        pairs = self.pairs

        def cost(group: Group, stage: int) -> Floats:
            barred = ~np.isfinite(pairs.load(group))
            # Maxima start from 0, so that only true excess counts.
            return np.where(barred, inf, np.maximum(pairs.excess(group, stage, stages or 1), 0.0))

        sweep = Sweep(pairs, self.steps, cost)
        ends = self._wanted(sweep, stages)
        return sweep.value(*ends[0]) if ends else inf


__all__ = ["TIE", "Dynamic", "Outcome"]
