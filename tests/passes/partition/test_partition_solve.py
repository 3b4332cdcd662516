"""The solver against enumeration, and its behaviour when things go wrong."""

from __future__ import annotations

import itertools
import math
import os
from pathlib import Path

import partition_oracles as oracles
import pytest
from hypothesis import HealthCheck, given, settings

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link
from pipecompile.passes.partition import Problem, Solution, Value, solve, solvers, stage_loads
from pipecompile.passes.partition.windows import stage_windows

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
CLOSE = 2e-6


def check(problem: Problem, solution: Solution) -> None:
    """Everything that must hold of any solution."""
    assert problem.check(solution.assignment) == ""
    assert set(solution.assignment) == set(range(problem.stages))
    assert solution.objective == pytest.approx(oracles.true_load(problem, solution.assignment), rel=1e-12)
    assert solution.bound <= solution.objective


@settings(RELAXED, max_examples=150)
@given(problem=oracles.problems(9))
def test_optimal_among_all_monotone_maps(problem: Problem) -> None:
    best = oracles.best_by_enumeration(problem)
    solution = solve(problem, gap=0.0)
    check(problem, solution)
    assert solution.objective == pytest.approx(best, rel=CLOSE)
    assert solution.bound == pytest.approx(best, rel=CLOSE)


@settings(RELAXED, max_examples=25)
@given(problem=oracles.problems(7))
def test_cbc_agrees_with_enumeration(problem: Problem) -> None:
    solution = solve(problem, gap=0.0, solver="cbc")
    check(problem, solution)
    assert solution.notes == ()
    assert solution.objective == pytest.approx(oracles.best_by_enumeration(problem), rel=CLOSE)


@settings(RELAXED, max_examples=60)
@given(problem=oracles.problems(6))
def test_loads_agree_with_the_oracle_on_every_map(problem: Problem) -> None:
    for stage_of in itertools.islice(itertools.product(range(problem.stages), repeat=problem.layers), 200):
        if all(stage_of[i] <= stage_of[j] for i, j in problem.edges):
            ours = max(compute + transfer for compute, transfer in stage_loads(problem, stage_of))
            assert ours == pytest.approx(oracles.true_load(problem, stage_of), rel=1e-12)


@settings(RELAXED, max_examples=60)
@given(problem=oracles.problems(7))
def test_windows_keep_every_plan_within_their_limit(problem: Problem) -> None:
    maps = [
        m
        for m in itertools.product(range(problem.stages), repeat=problem.layers)
        if all(m[i] <= m[j] for i, j in problem.edges)
    ]
    loads = [oracles.true_load(problem, m) for m in maps]
    for limit in (min(loads), sorted(loads)[len(loads) // 10]):
        windows = stage_windows(problem, limit)
        for m, load in zip(maps, loads, strict=True):
            if load <= limit:
                assert all(lo <= s <= hi for lo, s, hi in zip(windows.first, m, windows.last, strict=True))


def test_windows_decide_most_of_a_balanced_chain() -> None:
    problem = Problem((1.0,) * 40, tuple((i, i + 1) for i in range(39)), (), Link(0.0, 1e9), 4)
    assert stage_windows(problem, 10.0).undecided == 0
    assert 0 < stage_windows(problem, 11.0).undecided < 40


@pytest.mark.parametrize("solver", ["auto", "cbc"])
def test_a_large_transformer_is_proved(solver: str) -> None:
    problem = oracles.gpt_like(1200)
    solution = solve(problem, solver=solver)  # type: ignore[arg-type]
    check(problem, solution)
    print(f"1200 layers, 8 stages, {solver}: {solution.seconds:.2f} s by {solution.solver}")
    assert solution.bound >= solution.objective * (1 - 2e-4)


def diamond() -> Problem:
    """Two branches whose best cut is consecutive in no order the chain DP tries.

    Equal halves need layer 2 with layer 3 and layer 1 with layer 4, any order being allowed.
    """
    cost = (1.0, 5.0, 4.0, 3.0, 2.0, 6.0, 7.0, 1.0)
    edges = ((0, 1), (0, 2), (0, 3), (1, 7), (2, 7), (3, 7), (4, 7), (5, 7), (6, 7))
    return Problem(cost, edges, (), Link(0.0, 1e9), 3)


def test_the_integer_program_beats_the_chain() -> None:
    problem = diamond()
    chain, best = solve(problem, solver="none"), solve(problem)
    assert best.objective == pytest.approx(oracles.best_by_enumeration(problem))
    assert best.objective < chain.objective
    assert chain.bound <= best.objective
    assert (chain.solver, best.solver) == ("chain", "highs")


def test_time_limit_zero_gives_the_chain_plan() -> None:
    problem = diamond()
    solution = solve(problem, time_limit=0)
    check(problem, solution)
    assert solution.solver == "chain"
    assert any("time limit" in note for note in solution.notes)
    assert solution.objective == solve(problem, solver="none").objective


def broken(*_: object) -> solvers.Answer:
    raise OSError("gone in mid-solve")


def test_a_solver_that_raises_is_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipecompile.passes.partition.search.SOLVERS", {"highs": broken, "cbc": solvers.run_cbc})
    solution = solve(diamond())
    assert solution.solver == "cbc"
    assert solution.objective == pytest.approx(oracles.best_by_enumeration(diamond()))
    assert [note for note in solution.notes if "highs" in note and "gone in mid-solve" in note]


def test_without_any_working_solver_the_chain_plan_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipecompile.passes.partition.search.SOLVERS", {"highs": broken, "cbc": broken})
    solution = solve(diamond())
    check(diamond(), solution)
    assert solution.solver == "chain"
    assert len(solution.notes) == 3
    assert "chain dynamic program" in solution.notes[-1]


def test_a_missing_package_counts_as_a_broken_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highspy", None)
    solution = solve(diamond())
    assert solution.solver == "cbc"
    assert any("highs" in note for note in solution.notes)


def test_garbage_from_a_solver_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def garbage(model: object, *_: object) -> solvers.Answer:
        return solvers.Answer([0.0] * len(model.lower), -math.inf)  # type: ignore[attr-defined]

    monkeypatch.setattr("pipecompile.passes.partition.search.SOLVERS", {"highs": garbage})
    solution = solve(diamond())
    check(diamond(), solution)
    assert solution.bound == diamond().floor
    assert any("not valid" in note for note in solution.notes)


def test_solvers_are_silent_and_leave_no_files(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for solver in ("highs", "cbc"):
        assert solve(diamond(), solver=solver).solver == solver  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_zero_costs() -> None:
    problem = Problem((0.0,) * 5, ((0, 1), (1, 2)), (), Link(), 3)
    solution = solve(problem)
    check(problem, solution)
    assert solution.objective == solution.bound == 0.0


def test_layers_without_edges() -> None:
    problem = Problem((5.0, 4.0, 3.0, 3.0, 3.0), (), (), Link(), 2)
    solution = solve(problem)
    check(problem, solution)
    assert solution.objective == pytest.approx(9.0)


def test_ties_go_to_the_plan_that_transfers_less() -> None:
    values = tuple(Value(i, (i + 1,), size) for i, size in enumerate((8e6, 1e3, 8e6, 8e6)))
    problem = Problem((1e-3, 1e-3, 1e-3, 1e-3, 9.0), tuple((i, i + 1) for i in range(4)), values, Link(0.0, 1e9), 3)
    # Stage 2 is layer 4 alone whatever happens; cutting after layer 1 moves least.
    assert solve(problem).assignment == (0, 0, 1, 1, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stages": 3}, "cannot fill 3 stages"),
        ({"stages": 0}, "cannot fill 0 stages"),
        ({"speeds": (1.0,)}, "speed"),
        ({"speeds": (1.0, 0.0)}, "speed"),
        ({"cost": (1.0, -1.0)}, "layer 1 costs"),
        ({"cost": (1.0, math.nan)}, "layer 1 costs"),
        ({"edges": ((1, 0),)}, "layer 0 needs layer 1"),
        ({"edges": ()}, "no edge"),
    ],
)
def test_senseless_problems_are_refused(fields: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "cost": (1.0, 1.0),
        "edges": ((0, 1),),
        "values": (Value(0, (1,), 8.0),),
        "link": Link(),
        "stages": 2,
    }
    Problem(**good)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        Problem(**{**good, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"solver": "gurobi"}, {"time_limit": -1.0}, {"gap": math.nan}])
def test_senseless_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(PlanError):
        solve(diamond(), **options)  # type: ignore[arg-type]
