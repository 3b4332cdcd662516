"""Dynamic programs: optimal on chains, exact on every family of downsets, and what they say of fewer devices."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import partition_oracles as oracles
import pytest
from hypothesis import given, settings

from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Place, Problem, Value, solve
from pipecompile.passes.partition.classes import classes_of
from pipecompile.passes.partition.contract import forced
from pipecompile.passes.partition.downsets import all_downsets, chain, orders
from pipecompile.passes.partition.pairs import TooMany, pairs_of


def all_optimal(rng: random.Random, count: int) -> None:
    for _ in range(count):
        problem = oracles.chain_problem(rng)
        best = oracles.best_chain(problem)
        solution = solve(problem)
        assert oracles.true_objective(problem, solution.placement)[0] == pytest.approx(best, rel=1e-9)
        assert solution.bound == pytest.approx(best, rel=2e-4)


def test_optimal_on_random_chains() -> None:
    all_optimal(random.Random(0), 100)


@pytest.mark.slow
def test_optimal_on_three_thousand_random_chains() -> None:
    all_optimal(random.Random(1), 3000)


def test_one_device_twice_as_fast_gets_twice_the_work() -> None:
    places = (Place(speed=2.0), Place(speed=1.0))
    problem = Problem((1.0,) * 9, tuple((i, i + 1) for i in range(8)), (), places, Link(0.0, 1e9))
    assert solve(problem).placement.stage_of == (0,) * 6 + (1,) * 3


@settings(deadline=None, max_examples=100)
@given(problem=oracles.plain_problems())
def test_orders_are_topological(problem: Problem) -> None:
    for order in orders(problem):
        place = {layer: at for at, layer in enumerate(order)}
        assert sorted(order) == list(range(problem.layers))
        assert all(place[i] < place[j] for i, j in problem.edges)


@settings(deadline=None, max_examples=60)
@given(problem=oracles.plain_problems(7))
def test_all_downsets_are_found(problem: Problem) -> None:
    family = all_downsets(problem, 1000)
    assert family is not None
    found = {tuple(bool(held) for held in row) for row in family.member}
    every = [tuple(bool(bits >> v & 1) for v in range(problem.layers)) for bits in range(2**problem.layers)]
    closed = {held for held in every if all(held[i] or not held[j] for i, j in problem.edges)}
    assert found == closed
    assert len(family.member) == len(closed)
    assert all_downsets(problem, len(closed)) is not None
    assert all_downsets(problem, len(closed) - 1) is None


@settings(deadline=None, max_examples=150)
@given(problem=oracles.problems(6))
def test_costs_of_pairs_never_exceed_the_truth_and_chains_agree_with_downsets(problem: Problem) -> None:
    """Every pair of a chain is a pair of the family of all downsets, costed by quite another route."""
    try:
        problem = forced(problem).problem
    except oracles.PlanError:
        return
    classes = classes_of(problem)
    family, line = all_downsets(problem, 1000), chain(orders(problem)[0])
    assert family is not None
    wide = pairs_of(problem, classes, family, math.inf, 10**6)
    thin = pairs_of(problem, classes, line, math.inf, 10**6)
    rows = {row.tobytes(): i for i, row in enumerate(family.member)}
    where = {(int(u), int(low)): i for i, (u, low) in enumerate(zip(wide.upper, wide.lower, strict=True))}
    same = [
        where[rows[line.member[u].tobytes()], rows[line.member[low].tobytes()]]
        for u, low in zip(thin.upper, thin.lower, strict=True)
    ]
    for group in classes.groups():
        for cost in ("load", "latency"):
            np.testing.assert_allclose(getattr(wide, cost)(group)[same], getattr(thin, cost)(group), atol=1e-9)
        np.testing.assert_allclose(wide.excess(group, 0, 2)[same], thin.excess(group, 0, 2), atol=1e-9)


def test_too_many_pairs_are_refused() -> None:
    problem = oracles.diamond()
    with pytest.raises(TooMany):
        pairs_of(problem, classes_of(problem), chain(tuple(range(8))), math.inf, 10)


def test_fewer_stages_are_reported() -> None:
    values = (Value(0, (1,), 1e3), Value(1, (2,), 1e3))
    problem = Problem((1.0, 1.0, 1.0), ((0, 1), (1, 2)), values, (Place(),) * 3, Link(0.0, 1e3))
    solution = solve(problem)
    assert solution.placement.stage_of == (0, 1, 2)
    assert solution.fewer == pytest.approx({2: 2.0})
    slow = solve(replace(problem, link=Link(10.0, 1e3)))
    assert slow.fewer == pytest.approx({1: 3.0, 2: 12.0})
