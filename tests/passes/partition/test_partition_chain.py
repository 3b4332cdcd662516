"""The chain dynamic program: optimal on chains, never worse than it claims elsewhere."""

from __future__ import annotations

import random

import partition_oracles as oracles
import pytest
from hypothesis import given, settings

from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Problem, Value, solve
from pipecompile.passes.partition.chain import chain_cuts, orders


@pytest.mark.parametrize("seed", range(10))
def test_optimal_on_random_chains(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(30):
        problem = oracles.chain_problem(rng)
        best = oracles.best_chain(problem)
        cuts = chain_cuts(problem, tuple(range(problem.layers)))[-1]
        assert oracles.true_load(problem, cuts) == pytest.approx(best, rel=1e-9)
        solution = solve(problem)
        assert solution.objective == pytest.approx(best, rel=1e-9)
        assert solution.bound >= best * (1 - 2e-4)


def test_one_device_twice_as_fast_gets_twice_the_work() -> None:
    problem = Problem((1.0,) * 9, tuple((i, i + 1) for i in range(8)), (), Link(0.0, 1e9), 2, (2.0, 1.0))
    assert solve(problem).assignment == (0,) * 6 + (1,) * 3


@settings(deadline=None, max_examples=100)
@given(problem=oracles.problems())
def test_orders_are_topological_and_all_stage_counts_are_cut(problem: Problem) -> None:
    for order in orders(problem):
        place = {layer: at for at, layer in enumerate(order)}
        assert sorted(order) == list(range(problem.layers))
        assert all(place[i] < place[j] for i, j in problem.edges)
        cuts = chain_cuts(problem, order)
        assert len(cuts) == problem.stages
        for stages, assignment in enumerate(cuts, start=1):
            assert set(assignment) == set(range(stages))
            assert [assignment[layer] for layer in order] == sorted(assignment)


def test_fewer_stages_are_reported() -> None:
    values = (Value(0, (1,), 1e3), Value(1, (2,), 1e3))
    problem = Problem((1.0, 1.0, 1.0), ((0, 1), (1, 2)), values, Link(0.0, 1e3), 3)
    solution = solve(problem)
    assert solution.assignment == (0, 1, 2)
    assert solution.fewer == pytest.approx({1: 3.0, 2: 2.0})
