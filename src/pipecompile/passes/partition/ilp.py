"""The stage-monotone integer program: ``y[v, s]`` is 1 where layer v lies in one of stages 0 .. s.

``y[v, s] <= y[v, s+1]``, and ``y[v, s] <= y[u, s]`` where v needs u: every solution is a chain of
downsets, so the stage order is free of cycles and of symmetry. ``x[v, s] = y[v, s] - y[v, s-1]``
says that v lies in s. Transfers are counted by continuous copies ``z`` and edges ``e`` that
constraints push up. Stage windows turn most of y into constants before the model is built.

Two models come of it. The *relaxed* one lets a stage pay once for a value that several stages
read, and for one edge in and one out; where nothing skips a stage that is the true load, and it is
never more, so its bound always holds. The *exact* one has copies and edges per pair of stages and
equals :func:`~pipecompile.passes.partition.load.stage_loads`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipecompile.passes.partition.problem import HOST, Assignment, Problem, Value
from pipecompile.passes.partition.windows import Windows

#: The incumbent's load in the units of the model: solvers' tolerances are absolute.
SCALE = 100.0

#: How far above the incumbent a solution may be, so that rounding does not make it infeasible.
ROOM = 1e-6

#: The column of the objective, the largest load.
TOP = 0


@dataclass
class Affine:
    """A constant plus coefficients by column."""

    terms: dict[int, float] = field(default_factory=dict[int, float])
    const: float = 0.0

    def add(self, other: Affine, factor: float = 1.0) -> Affine:
        """Add ``factor`` x ``other`` in place."""
        self.const += factor * other.const
        for column, coefficient in other.terms.items():
            total = self.terms.get(column, 0.0) + factor * coefficient
            if total:
                self.terms[column] = total
            else:
                self.terms.pop(column, None)
        return self


@dataclass
class Model:
    """Minimise column ``TOP`` subject to ``rows`` (each at most 0). Loads are x ``scale``."""

    problem: Problem
    windows: Windows
    scale: float
    lower: list[float] = field(default_factory=list[float])
    upper: list[float] = field(default_factory=list[float])
    rows: list[Affine] = field(default_factory=list[Affine])
    choices: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])
    """Columns of the undecided y[layer, stage]: the integer ones."""

    def column(self, lower: float = 0.0, upper: float = 1.0) -> int:
        """A new column within the bounds."""
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.lower) - 1

    def below(self, layer: int, stage: int) -> Affine:
        """``y``: 1 where the layer lies in one of the stages 0 .. ``stage``."""
        column = self.choices.get((layer, stage))
        if column is not None:
            return Affine({column: 1.0})
        return Affine(const=float(stage >= self.windows.last[layer]))

    def inside(self, layer: int, stage: int) -> Affine:
        """``x``: 1 where the layer lies in the stage."""
        return self.below(layer, stage).add(self.below(layer, stage - 1), -1.0)

    def reach(self, layer: int) -> range:
        """Stages the layer can lie in."""
        return range(self.windows.first[layer], self.windows.last[layer] + 1)

    def require(self, row: Affine) -> None:
        """Demand ``row <= 0``; trivially true rows are left out."""
        if row.const + sum(c * (self.upper if c > 0 else self.lower)[i] for i, c in row.terms.items()) > 0:
            self.rows.append(row)

    def at_least(self, column: int, amount: Affine) -> None:
        """Demand that the column be at least ``amount``."""
        self.require(Affine({column: -1.0}).add(amount))

    def read(self, values: Sequence[float]) -> Assignment:
        """The assignment a solution stands for: for each layer the stages it is not yet in."""
        return tuple(
            self.windows.first[v]
            + sum(values[self.choices[v, s]] < 0.5 for s in range(self.windows.first[v], self.windows.last[v]))
            for v in range(self.problem.layers)
        )

    def write(self, assignment: Assignment) -> dict[int, float]:
        """Values of the integer columns for an assignment within the windows."""
        return {column: float(assignment[v] <= s) for (v, s), column in self.choices.items()}


def build(problem: Problem, windows: Windows, limit: float, exact: bool) -> Model:
    """The model of all plans with a largest load up to ``limit`` seconds (of a plan that exists)."""
    model = Model(problem, windows, SCALE / limit)
    model.column(min(problem.floor * model.scale, SCALE), SCALE * (1 + ROOM))
    for v in range(problem.layers):
        for s in range(windows.first[v], windows.last[v]):
            model.choices[v, s] = model.column()
    for v, s in model.choices:
        if (v, s + 1) in model.choices:
            model.require(model.below(v, s).add(model.below(v, s + 1), -1.0))
    for u, v in problem.edges:
        for s in range(max(windows.first[u], windows.first[v]), min(windows.last[u], windows.last[v])):
            model.require(model.below(v, s).add(model.below(u, s), -1.0))

    loads = [Affine({TOP: -1.0}) for _ in range(problem.stages)]
    filled = [Affine(const=1.0) for _ in range(problem.stages)]
    for v in range(problem.layers):
        for s in model.reach(v):
            here = model.inside(v, s)
            loads[s].add(here, problem.cost[v] / problem.speeds[s] * model.scale)
            filled[s].add(here, -1.0)
    _transfers(model, loads, exact)
    for row in (*loads, *filled):
        model.require(row)
    return model


def _transfers(model: Model, loads: list[Affine], exact: bool) -> None:
    """Add what each stage spends on transfers to its load."""
    problem = model.problem
    latency = problem.link.latency * model.scale
    edges: dict[tuple[int, int | None, str], int] = {}

    def edge(stage: int, other: int | None, side: str) -> int:
        """The column that is 1 where the edge exists; made, and paid by its ends, on first use."""
        key = (stage, other, side)
        if key not in edges:
            edges[key] = model.column()
            ends = (stage,) if other is None or other == HOST else (stage, other)
            for end in ends:
                loads[end].add(Affine({edges[key]: latency}))
        return edges[key]

    for value in problem.values:
        if value.producer == HOST:
            for layer in value.consumers:
                for s in model.reach(layer):
                    model.at_least(edge(s, HOST, "in"), model.inside(layer, s))
            continue
        seconds = value.nbytes / problem.link.bandwidth * model.scale
        if value.returned:
            for s in model.reach(value.producer):
                here = model.inside(value.producer, s)
                loads[s].add(here, seconds)
                model.at_least(edge(s, HOST, "out"), here)
        if not exact:
            for s, leaves in _leaving(model, value):
                copy = model.column()
                loads[s].add(Affine({copy: seconds}))
                for row in leaves:
                    model.at_least(copy, row)
                model.at_least(edge(s, None, "out"), Affine({copy: 1.0}))
            for layer in value.consumers:
                for t in model.reach(layer):
                    model.at_least(edge(t, None, "in"), _arrives(model, value, layer, t))
            continue
        copies: dict[tuple[int, int], int] = {}
        for s, leaves in _leaving(model, value):
            for t in sorted({t for layer in value.consumers for t in model.reach(layer) if t > s}):
                copies[s, t] = model.column()
                loads[s].add(Affine({copies[s, t]: seconds}))
                model.at_least(edge(s, t, "to"), Affine({copies[s, t]: 1.0}))
                for layer in value.consumers:
                    both = model.inside(value.producer, s).add(model.inside(layer, t))
                    model.at_least(copies[s, t], both.add(Affine(const=-1.0)))
            total = Affine({copy: -1.0 for (source, _), copy in copies.items() if source == s})
            for row in leaves:
                model.require(Affine().add(total).add(row))
        for layer in value.consumers:
            for t in model.reach(layer):
                total = Affine({copy: -1.0 for (_, target), copy in copies.items() if target == t})
                model.require(total.add(_arrives(model, value, layer, t)))


def _leaving(model: Model, value: Value) -> Iterator[tuple[int, list[Affine]]]:
    """Stages the value may be sent from, each with rows that are 1 where a consumer lies later."""
    for s in model.reach(value.producer):
        later = [layer for layer in value.consumers if model.windows.last[layer] > s]
        if later:
            yield s, [model.inside(value.producer, s).add(model.inside(layer, s), -1.0) for layer in later]


def _arrives(model: Model, value: Value, layer: int, stage: int) -> Affine:
    """1 where ``layer`` lies in the stage and the value's producer lies before it."""
    return model.inside(layer, stage).add(model.inside(value.producer, stage), -1.0)


__all__ = ["SCALE", "TOP", "Affine", "Model", "build"]
