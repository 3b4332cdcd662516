"""All methods on one problem: chain DP, then the integer program within its windows; the best wins."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pipecompile.errors import PlanError
from pipecompile.passes.partition.chain import chain_cuts, orders
from pipecompile.passes.partition.ilp import SCALE, build
from pipecompile.passes.partition.load import largest, moved, stage_loads
from pipecompile.passes.partition.problem import Assignment, Problem
from pipecompile.passes.partition.solvers import SOLVERS, Answer, Run
from pipecompile.passes.partition.windows import Windows, stage_windows

SolverName = Literal["auto", "highs", "cbc", "none"]

#: Loads closer than this (relative) are taken as equal.
TIE = 1e-9

#: Relative error of a bound that the solvers' own tolerances can cause.
AGREE = 1e-6

#: More undecided (choice, consumer) pairs than this and the exact model is left out.
LARGEST_EXACT = 20_000


@dataclass(frozen=True)
class Solution:
    """The best assignment found, its loads by ``stage_loads`` and what is proved about it.

    ``bound`` is a proved lower bound of the largest load of any feasible assignment; ``fewer`` the
    objectives, by number of stages, of the plans found with fewer stages (not proved).
    """

    assignment: Assignment
    loads: tuple[tuple[float, float], ...]
    bound: float
    solver: str
    seconds: float
    fewer: dict[int, float]
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> float:
        """Largest load in seconds."""
        return largest(self.loads)


def solve(problem: Problem, time_limit: float = 10.0, gap: float = 1e-4, solver: SolverName = "auto") -> Solution:
    """Cut the problem's layers into its stages.

    The chain DP always runs; the integer program gets what is left of ``time_limit`` seconds and
    stops at a relative ``gap``. ``auto`` tries HiGHS, then CBC; ``none`` only the chain DP.

    Raises:
        PlanError: if ``solver`` is unknown, or the time limit or gap is negative.
    """
    if solver not in ("auto", "none", *SOLVERS):
        raise PlanError(f"unknown solver {solver!r}: choose auto, none, {', '.join(SOLVERS)}")
    if not time_limit >= 0 or not gap >= 0:
        raise PlanError(f"time limit ({time_limit}) and gap ({gap}) must not be negative")
    started = time.perf_counter()
    chains = [chain_cuts(problem, order) for order in orders(problem)]
    best = _better(problem, (cuts[-1] for cuts in chains))
    fewer = {
        stages: min(largest(stage_loads(problem, cuts[stages - 1])) for cuts in chains)
        for stages in range(1, problem.stages)
    }
    objective = largest(stage_loads(problem, best))
    if problem.stages == 1:
        bound, name, notes = objective, "chain", []
    else:
        search = _Search(problem, best, objective, gap, started + time_limit)
        search.run(solver)
        best, bound, name, notes = search.best, search.bound, search.name, search.notes
    loads = tuple(stage_loads(problem, best))
    bound = min(bound, largest(loads))
    return Solution(best, loads, bound, name, time.perf_counter() - started, fewer, tuple(notes))


class _Search:
    """The integer program's part: improves ``best`` and raises ``bound`` until the gap closes."""

    def __init__(self, problem: Problem, best: Assignment, objective: float, gap: float, deadline: float) -> None:
        self.problem, self.best, self.objective, self.gap, self.deadline = problem, best, objective, gap, deadline
        self.bound = min(problem.floor, objective)
        self.name = "chain"
        self.notes: list[str] = []

    @property
    def closed(self) -> bool:
        """Whether the bound is as close as was asked, solvers' tolerances allowed for."""
        return self.bound >= self.objective * (1 - self.gap - AGREE)

    def run(self, solver: SolverName) -> None:
        """The relaxed model first, the exact one if that leaves a gap."""
        names = {"auto": list(SOLVERS), "none": list[str]()}.get(solver, [solver])
        for exact in (False, True):
            if self.closed or not names:
                return
            windows = stage_windows(self.problem, self.objective)
            if windows.undecided == 0:
                self.bound = self.objective  # no other plan is as good
                return
            if exact and _weight(self.problem, windows) > LARGEST_EXACT:
                self.notes.append("the graph is too large for the exact model: the bound is the relaxed model's")
                return
            if not self._attempt(names, windows, exact):
                return

    def _attempt(self, names: list[str], windows: Windows, exact: bool) -> bool:
        """Build and solve one model; solvers that fail are struck off ``names``. False: no answer."""
        limit = self.objective
        model = build(self.problem, windows, limit, exact)
        while names:
            left = self.deadline - time.perf_counter()
            if left <= 0:
                self.notes.append("the time limit ended the search: this is the best plan found until then")
                return False
            run: Run = SOLVERS[names[0]]
            try:
                answer: Answer = run(model, self.best, left, self.gap)
            except Exception as error:  # any way in which a third-party solver can break
                self.notes.append(f"solver {names[0]} failed ({type(error).__name__}: {error})")
                names.pop(0)
                continue
            self.name = names[0]
            self.bound = max(self.bound, min(answer.bound / SCALE * limit, limit))
            self._take(None if answer.values is None else model.read(answer.values))
            return True
        self.notes.append("no solver is left: the plan is the chain dynamic program's")
        return False

    def _take(self, found: Assignment | None) -> None:
        if found is None:
            return
        fault = self.problem.check(found)
        if fault:
            self.notes.append(f"solver {self.name} returned a plan that is not valid ({fault}): ignored")
            return
        self.best = _better(self.problem, (self.best, found))
        self.objective = largest(stage_loads(self.problem, self.best))


def _better(problem: Problem, candidates: Iterable[Assignment]) -> Assignment:
    """The candidate of least objective; among equal ones the one that transfers least, then the first."""
    judged = [(stage_loads(problem, candidate), candidate) for candidate in candidates]
    limit = min(largest(loads) for loads, _ in judged) * (1 + TIE)
    equal = [(loads, candidate) for loads, candidate in judged if largest(loads) <= limit]
    return min(equal, key=lambda item: moved(item[0]))[1]


def _weight(problem: Problem, windows: Windows) -> int:
    """Roughly how many rows the exact model would have."""
    width = [last - first for first, last in zip(windows.first, windows.last, strict=True)]
    return sum(
        (width[value.producer] + 1) * (width[layer] + 1)
        for value in problem.values
        if value.producer >= 0
        for layer in value.consumers
        if width[value.producer] or width[layer]
    )


__all__ = ["Solution", "SolverName", "solve"]
