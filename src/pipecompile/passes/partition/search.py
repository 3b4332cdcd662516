"""All methods on one problem: dynamic programs, then the integer program within its windows; the best wins."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from math import inf, isfinite
from typing import Literal

from pipecompile.errors import PlanError
from pipecompile.passes.partition.classes import arrangements, classes_of
from pipecompile.passes.partition.contract import forced
from pipecompile.passes.partition.diagnose import explain
from pipecompile.passes.partition.downsets import Family, all_downsets, around, chain, orders
from pipecompile.passes.partition.dynamic import TIE, Dynamic, Outcome
from pipecompile.passes.partition.load import Verdict, judge
from pipecompile.passes.partition.even import even_cut, floor
from pipecompile.passes.partition.pairs import TooMany, pairs_of
from pipecompile.passes.partition.problem import Arrangement, Placement, Problem
from pipecompile.passes.partition.programs import Programs, Task
from pipecompile.passes.partition.solvers import SOLVERS
from pipecompile.passes.partition.sweep import fixed_steps, free_steps

SolverName = Literal["auto", "highs", "cbc", "none"]

#: Relative error of a bound that the solvers' own tolerances can cause.
AGREE = 1e-6

#: Downsets up to which the dynamic program over all of them comes before the integer program,
#: and up to which it is tried at all.
FEW_DOWNSETS, MOST_DOWNSETS = 5_000, 20_000

#: Pairs of downsets kept at most, and pairs x transitions a dynamic program may take.
MOST_PAIRS, MOST_WORK = 8_000_000, 400_000_000

#: Arrangements of unlike devices for which integer programs are solved at most.
MOST_ARRANGEMENTS = 400


#: Seconds for the first program of each order of the devices, and the share of what is left then
#: that goes into improving the best plan.
FIRST_TURN, POLISH = 0.5, 0.5

#: Share of the time for random orders of the layers, and how many in a row may be in vain.
REORDER, PATIENCE = 0.4, 24

#: Undecided choices above which a program is unlikely to be solved in its first turn: the best plan is
#: improved before it, which narrows the windows.
HARD = 200

#: Layers above which a plan of merged layers comes first.
LARGE = 4_000


@dataclass(frozen=True)
class Solution:
    """The best placement found, what the judge says of it, and what is proved.

    ``bound`` is a proved lower bound of the objective of any feasible placement; ``fewer`` the
    largest loads, by number of devices, of plans found with fewer devices (not proved, and only
    those that may be as good).
    """

    placement: Placement
    verdict: Verdict
    bound: float
    solver: str
    seconds: float
    fewer: dict[int, float]
    notes: tuple[str, ...] = ()

    @property
    def objective(self) -> float:
        """The goal's value in seconds."""
        return self.verdict.objective

    @property
    def gap(self) -> float:
        """Relative distance of the objective from its proved bound."""
        return max(0.0, 1 - self.bound / self.objective) if self.objective > 0 else 0.0


def solve(
    problem: Problem, time_limit: float = 10.0, gap: float = 1e-4, solver: SolverName = "auto", coarsen: int = LARGE
) -> Solution:
    """Place the problem's layers.

    The dynamic programs along topological orders always run. The one over all downsets, where they
    are few, and the integer program get what is left of ``time_limit`` seconds and stop at a relative
    ``gap``. ``auto`` tries HiGHS, then CBC; ``highs`` and ``cbc`` leave out the program over all
    downsets; ``none`` the integer program. Of a graph with more layers than ``coarsen`` so many merged
    groups are planned, in half the time, and only the borders of that plan are improved on the layers;
    the bound then is that of the groups less what merging them can lose, or the plain one of even shares.

    Raises:
        PlanError: if no placement meets the constraints (with the constraint and the amount), if
            ``solver`` is unknown, or the time limit or gap is negative.
    """
    if solver not in ("auto", "none", *SOLVERS):
        raise PlanError(f"unknown solver {solver!r}: choose auto, none, {', '.join(SOLVERS)}")
    if not time_limit >= 0 or not gap >= 0:
        raise PlanError(f"time limit ({time_limit}) and gap ({gap}) must not be negative")
    started = time.perf_counter()
    contraction = forced(problem)
    search = _Search(contraction.problem, gap, started + time_limit)
    if contraction.problem.layers > coarsen:
        search.coarse(solver, coarsen, 0.5)
        search.polish(solver)
    if search.best is None:
        search.run(solver)
    if search.best is None:
        raise PlanError(explain(contraction.problem, search.short, search.proved))
    placement = contraction.expand(search.best)
    fault = problem.check(placement)
    assert not fault, fault
    verdict = judge(problem, placement)
    return Solution(
        placement,
        verdict,
        min(search.bound, verdict.objective),
        search.name,
        time.perf_counter() - started,
        search.fewer,
        tuple(search.notes),
    )


class _Search:
    """Improves ``best`` and raises ``bound`` until the gap closes or the methods or the time run out."""

    def __init__(self, problem: Problem, gap: float, deadline: float) -> None:
        self.problem, self.gap, self.deadline = problem, gap, deadline
        self.classes = classes_of(problem)
        self.best: Placement | None = None
        self.objective, self.moved = inf, inf
        self.name = "chain"
        self.bound = floor(problem)
        self.fewer: dict[int, float] = {}
        self.notes: list[str] = []
        self.short = inf
        self.proved = False

    @property
    def closed(self) -> bool:
        """Whether the bound is as close as was asked, rounding allowed for."""
        return self.best is not None and self.bound >= self.objective * (1 - self.gap - AGREE)

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.deadline - time.perf_counter()

    def run(self, solver: SolverName) -> None:
        """The methods in turn."""
        tried = orders(self.problem)
        even = even_cut(self.problem, next(arrangements(self.classes, empties=False)), tried[0])
        if even is not None:
            self.offer([even], "chain")
        for order in tried:
            self._dynamic(chain(order), "chain")
            if self.closed:
                return
        exhaustive = solver in ("auto", "none") and self.problem.chunks == 1
        done = exhaustive and self._downsets(FEW_DOWNSETS)
        if self.closed or self.proved:
            return
        if solver != "none":
            self._programs(solver)
        if exhaustive and not done and not self.closed and not self.proved and self.left > 0:
            self._downsets(MOST_DOWNSETS)

    def coarse(self, solver: SolverName, most: int, share: float) -> None:
        """Plan the problem with layers merged to ``most`` groups, in a share of the time left."""
        from pipecompile.passes.coarsen import Coarsen

        # Devices may be idle, which is what makes bounds of groups bounds of layers.
        merged = Coarsen(most, share=4 / most).apply(replace(self.problem, idle=True))
        if len(merged.groups) < self.problem.most_stages or len(merged.groups) == self.problem.layers:
            return
        deadline = time.perf_counter() + share * self.left
        for problem in (merged.problem, replace(merged.problem, idle=False)):
            search = _Search(problem, self.gap, deadline)
            search.run(solver)
            if problem.idle:
                self._raise_bound(search.bound - merged.excess)
            plan = None if search.best is None else merged.expand(search.best)
            if plan is None or self.problem.check(plan):
                continue  # it leaves devices idle
            if self.offer([plan], f"{search.name}, merged"):
                loss = f" (at most {merged.excess / self.bound:.1%} lost)" if merged.excess < inf and self.bound else ""
                self.notes.append(f"{self.problem.layers} layers were planned as {len(merged.groups)} groups first{loss}")
            break

    def reorder(self, deadline: float) -> None:
        """Run the dynamic program along random orders around the best plan, as long as that helps."""
        rng, turn, fruitless = random.Random(0), 0, 0
        while self.best is not None and not self.closed and fruitless < PATIENCE and time.perf_counter() < deadline:
            before = self.objective
            self._dynamic(chain(around(self.problem, self.best.stage_of, rng, turn)), "chain")
            turn, fruitless = turn + 1, 0 if self.objective < before else fruitless + 1

    def polish(self, solver: SolverName) -> None:
        """Improve the borders of the best plan in what time is left."""
        if solver != "none" and not self.closed and self.left > 0:
            with Programs(self, [*SOLVERS] if solver == "auto" else [solver], False) as programs:
                programs.polish(self.deadline)

    def offer(self, candidates: Iterable[Placement], name: str) -> bool:
        """Judge candidates and keep the best. Whether the objective improved."""
        improved = False
        for candidate in candidates:
            fault = self.problem.check(candidate)
            if fault:
                self.notes.append(f"{name} returned a plan that is not valid ({fault}): ignored")
                continue
            verdict = judge(self.problem, candidate)
            if verdict.excess:
                continue
            better = verdict.objective < self.objective * (1 - TIE)
            if better or (verdict.objective <= self.objective * (1 + TIE) and verdict.moved < self.moved * (1 - TIE)):
                self.best, self.moved = candidate, verdict.moved
                self.objective = min(self.objective, verdict.objective)
                if better:
                    self.name = name
            improved |= better
        return improved

    def _dynamic(self, family: Family, name: str) -> bool:
        """Run the dynamic program over a family; False if it was too large."""
        problem = self.problem
        limit = self.objective * (1 + TIE)
        if problem.goal.kind == "latency":
            limit = min(limit, problem.goal.limit * (1 + TIE))
        try:
            pairs = pairs_of(problem, self.classes, family, limit, MOST_PAIRS, inf if family.chain else self.deadline)
        except TooMany:
            return False
        runs: list[tuple[Dynamic, bool]] = []
        steps = free_steps(self.classes, min(problem.most_stages, max(1, problem.layers)))
        work = sum(len(came) for step in steps for came in step.values()) * len(pairs.upper)
        if problem.chunks == 1 and work <= MOST_WORK:
            runs.append((Dynamic(pairs, steps), True))
        else:
            runs += [(Dynamic(pairs, fixed_steps(self._groups(a)), a), False) for a in self._likely()]
        for dynamic, free in runs:
            outcome = dynamic.run()
            self.offer(outcome.placements, name)
            if free:
                self._note_fewer(outcome)
                if not family.chain:
                    self._raise_bound(min(outcome.bound, self.objective))
                    self.proved = outcome.bound == inf and self.best is None
                    self.short = min(self.short, outcome.short) if outcome.bound == inf else self.short
                elif outcome.bound == inf and outcome.short > -inf:
                    self.short = min(self.short, outcome.short)
        return all(free for _, free in runs)

    def _downsets(self, most: int) -> bool:
        """The dynamic program over all downsets, if they are few enough."""
        family = all_downsets(self.problem, most)
        return family is not None and self._dynamic(family, "downsets")

    def _note_fewer(self, outcome: Outcome) -> None:
        loose = replace(self.problem, idle=True)
        for devices, placement in outcome.fewer.items():
            verdict = judge(loose, placement)
            if not verdict.excess:
                self.fewer[devices] = min(self.fewer.get(devices, inf), verdict.slowest)

    def _raise_bound(self, bound: float) -> None:
        if isfinite(bound):
            self.bound = max(self.bound, bound)

    def _groups(self, arrangement: Arrangement) -> list[tuple[int, ...]]:
        members = self.classes.members
        return [tuple(sum(device in devices for device in stage) for devices in members) for stage in arrangement]

    def _likely(self) -> Iterator[Arrangement]:
        """A few arrangements, where there are too many to try them all."""
        yield from islice(arrangements(self.classes, empties=True), 8)

    def _programs(self, solver: SolverName) -> None:
        """Integer programs, one for each arrangement of the devices."""
        names: list[str] = [*SOLVERS] if solver == "auto" else [solver]
        empties = self.problem.idle and not self.problem.positional
        found = list(islice(arrangements(self.classes, empties), MOST_ARRANGEMENTS + 1))
        complete = len(found) <= MOST_ARRANGEMENTS
        if not complete:
            self.notes.append(
                f"integer programs were solved for {MOST_ARRANGEMENTS} orders of the devices only: there are more"
            )
            found.pop()
        tasks = [Task(arrangement) for arrangement in found]
        with Programs(self, names, empties) as programs:
            if len(tasks) == 1 and self.best is not None:
                if programs.windows(found[0], self.objective).undecided > HARD:
                    self.reorder(time.perf_counter() + self.left * REORDER)
                    programs.polish(time.perf_counter() + self.left * POLISH)
            for round in range(3):
                # A short turn each; then the best plan is improved; then the easy ones come first, so that
                # the hard ones have what is left.
                left = sorted((task for task in tasks if not task.done), key=lambda task: -task.bound)
                for at, task in enumerate(left):
                    if self.left <= 0:
                        break
                    share = self.left * (1.0 if at == len(left) - 1 else 0.6)
                    turn = FIRST_TURN if len(tasks) > 1 else max(FIRST_TURN, 0.1 * self.left)
                    programs.run(task, min(share, turn) if round == 0 else share)
                if round == 0 and not all(task.done for task in tasks) and programs.names:
                    programs.polish(time.perf_counter() + self.left * (POLISH if len(tasks) == 1 else POLISH / 3))
        if not all(task.done for task in tasks) and not self.closed and programs.names:
            self.notes.append("the time limit ended the search: this is the best plan found until then")
        if complete and tasks:
            lowest = min(task.bound for task in tasks)
            self.proved = lowest == inf and self.best is None
            self._raise_bound(min(lowest, self.objective))


__all__ = ["AGREE", "Solution", "SolverName", "solve"]
