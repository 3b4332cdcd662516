"""Coarsening: lossless merges keep the optimum, bounded ones lose no more than they say, others stay within 2 %."""

from __future__ import annotations

import itertools
import math
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parent / "partition"))
import partition_oracles as oracles

from pipecompile.ir.cluster import Link
from pipecompile.passes.coarsen import Coarsen, lossless
from pipecompile.passes.followers import covered, follow, messages
from pipecompile.passes.partition import Goal, Place, Placement, Problem, Value, judge, solve
from pipecompile.passes.partition.contract import contract, forced


def cells(count: int, branches: int, seed: int = 0, devices: int = 8) -> Problem:
    """Cells of parallel branches of operators, each cell reading the two before it, as found by architecture search."""
    rng, cost, edges, values = random.Random(seed), [1.0], set[tuple[int, int]](), list[Value]()
    readers: dict[int, set[int]] = {}
    ends = [0, 0]
    for _ in range(count):
        outs = []
        for _ in range(branches):
            last = rng.choice(ends)
            for _ in range(rng.randint(1, 3)):
                readers.setdefault(last, set()).add(len(cost))
                last = len(cost)
                cost.append(rng.expovariate(1.0))
            outs.append(last)
        for out in outs:
            readers.setdefault(out, set()).add(len(cost))
        ends = [ends[1], len(cost)]
        cost.append(rng.random() * 0.1)
    for u, vs in readers.items():
        edges |= {(u, v) for v in vs}
        values.append(Value(u, tuple(sorted(vs)), rng.random() * 0.2))
    return Problem(tuple(cost), tuple(sorted(edges)), tuple(values), (Place(),) * devices, Link(0.0, 1.0))


@settings(deadline=None, max_examples=80, suppress_health_check=list(HealthCheck))
@given(problem=oracles.problems(6))
def test_lossless_merges_keep_the_optimum(problem: Problem) -> None:
    # Messages cost nothing by themselves here, and devices may be idle: else the claim is not made.
    free = {ends: replace(link, latency=0.0) for ends, link in problem.links.items()}
    cost = tuple(c if v % 3 else 0.0 for v, c in enumerate(problem.cost))
    problem = replace(
        problem,
        cost=cost,
        places=tuple(replace(place, cost=()) for place in problem.places),
        link=replace(problem.link, latency=0.0),
        links=free,
        idle=True,
        chunks=1,
        replicas=False,
        single=frozenset(),
        activations=(),
        together=(),
    )
    merged = contract(problem, lossless(problem)).problem
    assert oracles.best_by_enumeration(merged) == pytest.approx(oracles.best_by_enumeration(problem), rel=1e-9)


@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
@given(problem=oracles.problems(7))
def test_no_plan_loses_more_than_the_bound_says(problem: Problem) -> None:
    problem = replace(
        problem,
        places=tuple(replace(place, memory=math.inf, copies=1.0) for place in problem.places),
        links={},
        traffic=replace(problem.traffic, overlap=0.0),
        memory=replace(problem.memory, update_every=0.0),
        goal=Goal(),
        idle=True,
        chunks=1,
        replicas=False,
        together=(),
    )
    assert covered(problem)
    pairs, excess = follow(problem, 1e9)
    head = list(range(problem.layers))
    for layer, follower in pairs:
        head[follower] = head[layer]
    excess += messages(problem)
    for devices in itertools.islice(oracles.dealings(problem), 12):
        maps = oracles.monotone_maps(problem, len(devices))[:200]
        if len(maps):
            before, after = (oracles.evaluate(problem, found, devices)[0] for found in (maps, maps[:, head]))
            assert (after <= before + excess + 1e-9).all()
    merged = contract(problem, pairs).problem
    assert oracles.best_by_enumeration(merged) <= oracles.best_by_enumeration(problem) + excess + 1e-9


def test_the_bound_of_a_chain_is_its_largest_step() -> None:
    # Each value is as heavy as the one before it, so that a border between groups costs what it cost between layers.
    values = tuple(Value(v, (v + 1,), 1.0) for v in range(5))
    edges = tuple((v, v + 1) for v in range(5))
    problem = Problem((1.0, 2.0, 0.5, 3.0, 1.0, 2.0), edges, values, (Place(),) * 2, Link(0.0, 1.0), idle=True)
    pairs, excess = follow(problem, 4.0)
    assert contract(problem, pairs).groups == ((0, 1, 2), (3, 4, 5))
    # 1 and 2 may come to the stage of 0 at no change of what it sends; 4 and 5 to that of 3, which then sends nothing.
    assert excess == pytest.approx(max(2.0 + 0.5, 1.0 + 2.0 - 1.0))


def test_a_merged_plan_of_a_large_model_has_a_proof() -> None:
    problem = oracles.gpt_like(1200, stages=2)
    merged = Coarsen(100, share=0.0).apply(replace(problem, idle=True))
    assert len(merged.groups) < 0.3 * problem.layers
    assert merged.excess <= 0.02 * sum(problem.cost) / 2
    quick = solve(problem, time_limit=20.0, gap=1e-3, coarsen=400)
    assert quick.gap <= 0.03
    assert any("lost" in note for note in quick.notes)


def test_a_free_layer_joins_the_heavier_side() -> None:
    values = (Value(0, (1,), 9.0), Value(1, (2,), 1.0), Value(2, (3,), 9.0))
    problem = Problem((1.0, 0.0, 1.0, 1.0), ((0, 1), (1, 2), (2, 3)), values, (Place(),) * 2, Link(0.0, 1.0))
    assert contract(problem, lossless(problem)).groups == ((0, 1), (2,), (3,))


@pytest.mark.parametrize(
    "problem",
    [
        pytest.param(oracles.gpt_like(500), id="transformer"),
        pytest.param(cells(70, 4), id="cells", marks=pytest.mark.slow),
    ],
)
def test_merged_plans_are_within_two_percent(problem: Problem) -> None:
    unmerged = solve(problem, time_limit=5.0, gap=2e-3)
    merged = Coarsen(100, share=0.04).apply(problem)
    assert len(merged.groups) < 0.6 * problem.layers
    placement = merged.expand(solve(merged.problem, time_limit=2.0, gap=2e-3).placement)
    assert problem.check(placement) == ""
    assert judge(problem, placement).objective <= 1.02 * unmerged.objective
    quick = solve(problem, time_limit=2.0, coarsen=100)
    assert quick.objective <= 1.02 * unmerged.objective
    assert quick.bound <= unmerged.objective
    assert any("groups" in note for note in quick.notes)


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(problem=oracles.problems(8))
def test_plans_of_groups_are_plans_of_layers(problem: Problem) -> None:
    try:
        forced(problem)
    except oracles.PlanError:
        return
    merged = Coarsen(2, share=1.0).apply(replace(problem, idle=True, chunks=1, replicas=False))
    assert sorted(v for group in merged.groups for v in group) == list(range(problem.layers))
    one = Placement((0,) * len(merged.groups), ((0,),))
    before = judge(merged.problem, one)
    after = judge(replace(problem, idle=True, chunks=1, replicas=False), merged.expand(one))
    assert before.loads == pytest.approx(after.loads)
    assert before.memory == pytest.approx(after.memory)
    assert merged.shrink(merged.expand(one)) == one
