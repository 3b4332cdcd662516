"""The integer programs of a search: relaxed, then exact, for one arrangement of devices after another."""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import inf
from types import TracebackType
from typing import Protocol

import numpy as np

from pipecompile.passes.partition.ilp import build
from pipecompile.passes.partition.load import judge
from pipecompile.passes.partition.model import SCALE, Model
from pipecompile.passes.partition.problem import HOST, Arrangement, Placement, Problem
from pipecompile.passes.partition.solvers import Answer, Engine, SolverFailed
from pipecompile.passes.partition.windows import Windows, stage_windows

#: More undecided (choice, consumer) pairs than this and the exact model is left out.
LARGEST_EXACT = 20_000

#: Seconds for one small program over a few neighbouring stages.
SPAN_SECONDS = 3.0


class Incumbent(Protocol):
    """The search the programs work for."""

    problem: Problem
    gap: float
    notes: list[str]
    best: Placement | None
    objective: float
    bound: float

    @property
    def left(self) -> float: ...
    def offer(self, candidates: list[Placement], name: str) -> bool: ...


@dataclass
class Task:
    """What is known of one arrangement: a proved bound (inf: impossible), and whether more can be done."""

    arrangement: Arrangement
    bound: float = 0.0
    exact: bool = False
    done: bool = False

    def settle(self, bound: float) -> None:
        """Nothing better than ``bound`` exists."""
        self.bound, self.done = max(self.bound, bound), True


class Programs:
    """A context that holds the solver's process. ``names`` are the solvers to try, the first first."""

    def __init__(self, search: Incumbent, names: list[str], empties: bool) -> None:
        self.search, self.names, self.empties = search, names, empties
        self.problem = search.problem
        self.engine = Engine()

    def __enter__(self) -> Programs:
        self.engine.warm()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.engine.kill()

    def run(self, task: Task, seconds: float) -> None:
        """Go on with one arrangement for about ``seconds`` of solving: raises its bound, improves the incumbent."""
        search, arrangement = self.search, task.arrangement
        deadline = time.perf_counter() + seconds
        while not task.done and self.names:
            limit = search.objective if search.best is not None else _most(self.problem)
            task.bound = max(task.bound, search.bound)
            if search.best is not None and task.bound >= limit * (1 - search.gap - 1e-6):
                task.done = True
                return
            windows = self.windows(arrangement, limit)
            if not windows.possible:
                task.settle(inf if search.best is None else limit)
                return
            if windows.undecided == 0:
                only = _only(windows, arrangement)
                if not self.problem.check(only):  # it may lack a stage that must not be empty
                    search.offer([only], "windows")
                task.settle(inf if search.best is None else min(limit, search.objective))
                return
            if task.exact and _weight(self.problem, windows) > LARGEST_EXACT:
                self._note("the graph is too large for the exact model: the bound is the relaxed model's")
                task.done = True
                return
            answer = self.attempt(arrangement, windows, limit, task.exact, deadline)
            if answer is None:
                return
            if answer.infeasible:
                task.settle(inf if search.best is None else limit)
                return
            task.bound = max(task.bound, min(answer.bound / SCALE * limit, limit))
            if not answer.complete:
                return
            task.done = task.exact or (self.problem.traffic.multicast and not self.problem.link.latency)
            task.exact = True

    def polish(self, deadline: float) -> None:
        """Improve the incumbent by solving two or three neighbouring stages around the busiest at a time."""
        search, tried = self.search, set[tuple[Placement, int, int]]()
        while self.names and search.best is not None and time.perf_counter() < deadline:
            best = search.best
            loads = judge(self.problem, best).loads
            stages = len(best.devices)
            busiest = max(range(stages), key=lambda s: max(loads[d] for d in best.devices[s]))
            spans = [
                (low, low + width - 1)
                for width in (2, 3, 4, 5)
                for low in range(busiest - width + 1, busiest + 1)
                if low >= 0 and low + width <= stages and (best, low, low + width - 1) not in tried
            ]
            if not spans:
                return
            low, high = spans[0]
            tried.add((best, low, high))
            windows = self.windows(best.devices, search.objective)
            near = [low <= s <= high for s in best.stage_of]
            first = tuple(max(a, low) if m else s for a, s, m in zip(windows.first, best.stage_of, near, strict=True))
            last = tuple(min(b, high) if m else s for b, s, m in zip(windows.last, best.stage_of, near, strict=True))
            part = Windows(first, last)
            if part.undecided:
                until = min(deadline, time.perf_counter() + SPAN_SECONDS)
                self.attempt(best.devices, part, search.objective, False, until, floor=0.0)

    def windows(self, arrangement: Arrangement, limit: float) -> Windows:
        """Windows for an objective of at most ``limit``."""
        goal = self.problem.goal
        return stage_windows(self.problem, arrangement, min(limit, goal.limit) if goal.kind == "latency" else limit)

    def attempt(
        self, arrangement: Arrangement, windows: Windows, limit: float, exact: bool, deadline: float,
        floor: float | None = None,
    ) -> Answer | None:
        """Build and solve one model; solvers that fail are struck off. None: no answer.

        Building does not count towards the ``deadline``, only towards the time limit of the whole search.
        """
        search, begun = self.search, time.perf_counter()
        model = build(self.problem, arrangement, windows, limit, exact, search.bound if floor is None else floor, self.empties)
        if model.impossible:
            return Answer(None, 0.0, infeasible=True)
        start = model.positions(search.best) if search.best is not None else None
        deadline += time.perf_counter() - begun
        while self.names:
            left = min(search.left, deadline - time.perf_counter())
            if left <= 0:
                return None
            try:
                answer = self.engine.solve(self.names[0], model, start, 0.95 * left, search.gap)
                if answer.infeasible and start is not None:
                    raise SolverFailed("it calls a model infeasible that has a solution")
            except SolverFailed as error:
                self._note(f"solver {self.names[0]} failed: {error}")
                self.names.pop(0)
                continue
            if answer.values is not None:
                self._take(model, answer.values)
            return answer
        self._note("no solver is left: the plan is the dynamic program's")
        return None

    def _take(self, model: Model, values: list[float]) -> None:
        self.search.offer([model.read(values)], self.names[0])

    def _note(self, text: str) -> None:
        if text not in self.search.notes:
            self.search.notes.append(text)


def _only(windows: Windows, arrangement: Arrangement) -> Placement:
    used = sorted(set(windows.first))
    return Placement(tuple(used.index(s) for s in windows.first), tuple(arrangement[s] for s in used))


def _most(problem: Problem) -> float:
    """Seconds that no objective exceeds."""
    slowest = np.max([problem.seconds(device) for device in range(len(problem.places))], axis=0).sum()
    links = [problem.link, *problem.links.values()]
    stages = problem.most_stages
    nbytes = sum((value.nbytes + value.gradient) * (stages + 1) for value in problem.values)
    moved = nbytes * 2 * max(1 / link.bandwidth for link in links)
    moved += max(link.latency for link in links) * 4 * (stages + 1) ** 2
    copies = max(place.copies for place in problem.places)
    every = problem.memory.update_every
    summed = 2 * stages * sum(w.nbytes for w in problem.weights) / problem.link.bandwidth / every if every else 0.0
    return max(1e-12, float(slowest) + copies * (moved + summed))


def _weight(problem: Problem, windows: Windows) -> int:
    """Roughly how many rows the exact model would have."""
    width = [last - first for first, last in zip(windows.first, windows.last, strict=True)]
    return sum(
        (width[value.producer] + 1) * (width[layer] + 1)
        for value in problem.values
        if value.producer != HOST
        for layer in value.consumers
        if width[value.producer] or width[layer]
    )


__all__ = ["LARGEST_EXACT", "Incumbent", "Programs", "Task"]
