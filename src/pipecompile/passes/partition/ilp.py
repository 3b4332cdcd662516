"""The stage-monotone integer program: ``y[v, s]`` is 1 where layer v lies in one of stages 0 .. s.

``y[v, s] <= y[v, s+1]``, and ``y[v, s] <= y[u, s]`` where v needs u: every solution is a chain of
downsets, so the stage order is free of cycles and of symmetry. ``x[v, s] = y[v, s] - y[v, s-1]``
says that v lies in s. The devices of each stage are given. Transfers are counted by continuous
copies and edges that constraints push up. Stage windows turn most of y into constants before the
model is built.

Two models come of it. The *relaxed* one lets a stage pay once for a value that several stages
read, and for one edge in and one out; where nothing skips a stage that is the true load, and it is
never more, so its bound always holds. The *exact* one has copies and edges per pair of stages and
equals :func:`~pipecompile.passes.partition.load.judge`.
"""

from __future__ import annotations

from pipecompile.passes.partition.charges import add_costs
from pipecompile.passes.partition.model import ROOM, SCALE, Affine, Model
from pipecompile.passes.partition.problem import Arrangement, Problem
from pipecompile.passes.partition.windows import Windows


def build(
    problem: Problem,
    arrangement: Arrangement,
    windows: Windows,
    limit: float,
    exact: bool,
    floor: float = 0.0,
    empties: bool = False,
) -> Model:
    """The model of all placements with an objective from ``floor`` to ``limit`` seconds.

    ``empties``: stages may be empty (and are then no stages).
    """
    model = Model(problem, arrangement, windows, SCALE / limit, empties)
    model.column(min(floor * model.scale, SCALE), SCALE * (1 + ROOM))
    for v in range(problem.layers):
        for s in range(windows.first[v], windows.last[v]):
            model.choices[v, s] = model.column()
    for v, s in model.choices:
        if (v, s + 1) in model.choices:
            model.require(model.below(v, s).add(model.below(v, s + 1), -1.0))
    for u, v in problem.edges:
        for s in range(max(windows.first[u], windows.first[v]), min(windows.last[u], windows.last[v])):
            model.require(model.below(v, s).add(model.below(u, s), -1.0))
    filled: dict[int, Affine | None] = {stage: Affine(const=1.0) for stage in range(len(arrangement))}
    filled.update((stage, None) for stage in model.decided if stage is not None)
    restricted = set(problem.allowed) | problem.single
    for v in range(problem.layers):
        if model.decided[v] is not None and v not in restricted:
            continue
        for s in model.reach(v):
            row = filled[s]
            if row is not None:
                row.add(model.inside(v, s), -1.0)
            if v in restricted and not problem.permits(v, arrangement[s]):
                model.require(model.inside(v, s))
    if not empties:
        for row in filled.values():
            if row is not None:
                model.require(row)
    add_costs(model, exact)
    return model


__all__ = ["build"]
