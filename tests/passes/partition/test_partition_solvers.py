"""Integer program solvers that are missing, die, hang, lie, or run out of time."""

from __future__ import annotations

import math
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import partition_oracles as oracles
import pytest

from pipecompile.passes.partition import Problem, Solution, solve, solvers
from pipecompile.passes.partition.ilp import build
from pipecompile.passes.partition.model import Model
from pipecompile.passes.partition.even import floor
from pipecompile.passes.partition.solvers import Answer, Engine, SolverFailed
from pipecompile.passes.partition.windows import stage_windows

DEVICES = ((0,), (1,), (2,))


def model(problem: Problem) -> Model:
    return build(problem, DEVICES, stage_windows(problem, DEVICES, 29.0), 29.0, exact=True)


@pytest.fixture
def without_downsets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a graph with too many downsets for the dynamic program."""
    monkeypatch.setattr("pipecompile.passes.partition.search.FEW_DOWNSETS", 0)
    monkeypatch.setattr("pipecompile.passes.partition.search.MOST_DOWNSETS", 0)


def chain_only() -> Solution:
    """What the orders of the layers alone give: not the optimum, which is 10."""
    solution = solve(oracles.diamond(), solver="none")
    assert solution.objective > 10.5
    return solution


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_solver_answers_several_models_in_one_process(name: str) -> None:
    with Engine() as engine:
        for _ in range(2):
            answer = engine.solve(name, model(oracles.diamond()), None, 60.0, 0.0)
            assert answer.values is not None
            assert answer.bound / 100 * 29 == pytest.approx(10.0, rel=1e-5)
            assert engine.process is not None
            first = engine.process.pid
        assert engine.process.pid == first
    assert engine.process is None
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_infeasible_is_an_answer(name: str) -> None:
    problem = oracles.diamond()
    windows = stage_windows(problem, DEVICES, 29.0)
    small = build(problem, DEVICES, windows, 9.0, exact=True)  # the optimum is 10
    with Engine() as engine:
        assert engine.solve(name, small, None, 60.0, 0.0) == Answer(None, 0.0, infeasible=True)


def script(path: Path, text: str) -> list[str]:
    path.write_text(text)
    return [sys.executable, str(path)]


def test_a_solver_that_overruns_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "GRACE", 1.0)
    note = tmp_path / "child"
    command = script(
        tmp_path / "hangs.py",
        f"import subprocess, time\nchild = subprocess.Popen(['sleep', '100'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\ntime.sleep(100)\n",
    )
    with Engine(command) as engine, pytest.raises(SolverFailed, match=r"busy 1 s after its limit of 0\.5 s: killed"):
        engine.solve("highs", model(oracles.diamond()), None, 0.5, 0.0)
    state = subprocess.run(["ps", "-o", "stat=", "-p", note.read_text()], capture_output=True, text=True, check=False)
    assert state.stdout.strip() in ("", "Z")


def test_an_answer_that_is_there_counts_though_this_process_was_stopped_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(solvers, "GRACE", 0.0)
    wait = select.select
    with Engine() as engine:
        engine.solve("highs", model(oracles.diamond()), None, 60.0, 0.0)
        # Each wait ends 0.5 s late, after the limit of 0.4 s: so does the one in which the request is handed over.
        monkeypatch.setattr(solvers.select, "select", lambda *given: (time.sleep(0.5), wait(*given))[1])
        assert engine.solve("highs", model(oracles.diamond()), None, 0.4, 0.0).values is not None


def test_a_solver_that_dies_is_named_with_its_signal(tmp_path: Path) -> None:
    command = script(tmp_path / "dies.py", "import os, sys\nsys.stdin.buffer.read(10)\nos.kill(os.getpid(), 11)\n")
    with Engine(command) as engine, pytest.raises(SolverFailed, match=f"died.*signal {int(signal.SIGSEGV)}"):
        engine.solve("highs", model(oracles.diamond()), None, 5.0, 0.0)


@pytest.mark.usefixtures("without_downsets")
def test_without_any_working_solver_the_dynamic_programs_plan_remains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(solvers, "ENGINE", tmp_path / "missing.py")
    solution = solve(oracles.diamond())
    assert (solution.solver, solution.objective) == ("chain", chain_only().objective)
    assert solution.bound <= 10.0
    assert [note.split(":")[0] for note in solution.notes] == [
        "solver highs failed",
        "solver cbc failed",
        "no solver is left",
    ]


@pytest.mark.usefixtures("without_downsets")
def test_a_missing_package_falls_back_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "highspy.py").write_text("raise ImportError('no such solver here')")
    engine = tmp_path / "engine.py"
    first = f"import sys\n\nsys.path.insert(0, {str(tmp_path)!r})\nimport math\n"
    engine.write_text(solvers.ENGINE.read_text().replace("import math\n", first))
    monkeypatch.setattr(solvers, "ENGINE", engine)
    solution = solve(oracles.diamond(), gap=0.0)
    assert solution.solver == "cbc"
    assert solution.bound == pytest.approx(10.0, rel=3e-6)
    assert solution.notes == ("solver highs failed: ImportError: no such solver here",)


@pytest.mark.usefixtures("without_downsets")
def test_a_solver_that_dies_while_it_solves_is_replaced_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, text = tmp_path / "engine.py", solvers.ENGINE.read_text()
    dying = text.replace("    begun = time.monotonic()\n", "    os.kill(os.getpid(), 11)\n    begun = time.monotonic()\n")
    assert dying.count("os.kill") == 1
    engine.write_text(dying)
    monkeypatch.setattr(solvers, "ENGINE", engine)
    solution = solve(oracles.diamond(), gap=0.0)
    assert (solution.solver, solution.objective) == ("cbc", pytest.approx(10.0))
    assert solution.bound == pytest.approx(10.0, rel=3e-6)
    assert solution.notes == (f"solver highs failed: its process died (signal {int(signal.SIGSEGV)})",)


def fake(answer: Answer) -> object:
    return lambda *_: answer


def test_garbage_from_a_solver_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = oracles.diamond()

    def garbage(_engine: Engine, _name: str, given: Model, *_: object) -> Answer:
        return Answer([0.0] * len(given.lower), -math.inf)

    monkeypatch.setattr(Engine, "solve", garbage)
    solution = solve(problem, solver="highs")
    assert problem.check(solution.placement) == ""
    assert solution.bound == pytest.approx(floor(problem))
    assert any("not valid" in note for note in solution.notes)


def test_a_solver_that_denies_the_known_plan_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "solve", fake(Answer(None, 0.0, infeasible=True)))
    solution = solve(oracles.diamond(), solver="highs")
    assert any("infeasible that has a solution" in note for note in solution.notes)
    assert solution.bound < solution.objective


@pytest.mark.usefixtures("without_downsets")
def test_time_limit_zero_still_gives_a_plan() -> None:
    solution = solve(oracles.diamond(), time_limit=0)
    assert (solution.solver, solution.objective) == ("chain", chain_only().objective)
    assert any("time limit" in note for note in solution.notes)


def test_solvers_are_silent_and_leave_no_files(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for solver in ("highs", "cbc"):
        assert solve(oracles.diamond(), solver=solver).bound == pytest.approx(10.0, rel=3e-6)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")
