"""Integer program solvers, through PuLP: HiGHS in this process, CBC as a command.

Both are asked for one thread. The status names PuLP gives after a time limit are not trusted: an
answer counts as a solution only once its assignment has been checked and evaluated again, and as a
proof only through the bound the solver itself reports.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipecompile.passes.partition.ilp import TOP, Model
from pipecompile.passes.partition.problem import Assignment


class SolverFailed(Exception):
    """A solver is missing or ended without a usable answer. Never leaves this package."""


@dataclass(frozen=True)
class Answer:
    """``values`` per column, or None if the solver found no solution; ``bound`` in model units."""

    values: list[float] | None
    bound: float


def run_highs(model: Model, start: Assignment, seconds: float, gap: float) -> Answer:
    """Solve with HiGHS, starting from ``start``.

    PuLP's wrapper has no warm start and its construction prints a banner, so only the model goes
    through PuLP and the solver object is driven directly.

    Raises:
        SolverFailed: if the model is refused, or found infeasible though a solution is known.
    """
    import highspy
    import pulp

    program, columns = to_pulp(model)
    base: Any = highspy.Highs.__base__  # the derived class prints a banner while it is made
    engine = base()
    engine.setOptionValue("output_flag", False)
    engine.setOptionValue("threads", 1)
    engine.setOptionValue("time_limit", float(seconds))
    engine.setOptionValue("mip_rel_gap", float(gap))
    program.solverModel = engine
    builder: Any = pulp.getSolver("HiGHS", msg=False)
    builder.buildSolverModel(program)
    known = model.write(start)
    engine.setSolution(len(known), [columns[i].index for i in known], list(known.values()))
    engine.run()

    status = engine.getModelStatus()
    if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit):
        raise SolverFailed(f"HiGHS stopped: {engine.modelStatusToString(status)}")
    info = engine.getInfo()
    bound = float(info.mip_dual_bound)
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    found = engine.getSolution().col_value
    # The columns that occur in no row and not in the objective were never handed over.
    values = [found[index] if (index := getattr(c, "index", None)) is not None else 0.0 for c in columns]
    return Answer(values if feasible else None, bound if math.isfinite(bound) else 0.0)


def run_cbc(model: Model, start: Assignment, seconds: float, gap: float) -> Answer:
    """Solve with CBC, installed or bundled with PuLP, in a temporary directory.

    Raises:
        SolverFailed: if there is no CBC, or it found a model infeasible that has a solution.
    """
    import pulp

    program, columns = to_pulp(model)
    for column, value in model.write(start).items():
        columns[column].setInitialValue(value)
    with tempfile.TemporaryDirectory(prefix="pipecompile-") as folder:
        log = Path(folder) / "cbc.log"
        options: dict[str, Any] = {
            "msg": False,
            "threads": 1,
            "timeLimit": max(seconds, 0.01),
            "gapRel": gap,
            "warmStart": True,
            "logPath": str(log),
        }
        engine: Any = pulp.getSolver("COIN_CMD", **options)
        if not engine.available():
            bundled = getattr(pulp, "PULP_CBC_CMD", None)
            if bundled is None:
                raise SolverFailed("CBC is not installed")
            engine = pulp.getSolver("COIN_CMD", path=bundled.pulp_cbc_path, **options)
        engine.tmpDir = folder
        program.solve(engine)
        told = re.search(r"^Lower bound:\s*(\S+)", log.read_text(), re.MULTILINE)

    if program.sol_status == pulp.LpSolutionInfeasible:
        raise SolverFailed("CBC stopped: infeasible")
    values = [float(column.varValue or 0.0) for column in columns]
    solved = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    bound = model.lower[TOP]
    if told is not None:
        bound = float(told[1])
    elif program.sol_status == pulp.LpSolutionOptimal:
        bound = values[TOP]
    return Answer(values if solved else None, bound)


def to_pulp(model: Model) -> tuple[Any, list[Any]]:
    """The model as a PuLP problem, and its variables by column."""
    import pulp

    program = pulp.LpProblem("partition", pulp.LpMinimize)
    integer = set(model.choices.values())
    columns = [
        program.add_variable(f"c{i}", low, high, pulp.LpInteger if i in integer else pulp.LpContinuous)
        for i, (low, high) in enumerate(zip(model.lower, model.upper, strict=True))
    ]
    program.setObjective(pulp.LpAffineExpression({columns[TOP]: 1.0}))
    for row in model.rows:
        left = pulp.LpAffineExpression({columns[i]: coefficient for i, coefficient in row.terms.items()})
        program.addConstraint(pulp.LpConstraint(left, sense=pulp.LpConstraintLE, rhs=-row.const))
    return program, columns


Run = Callable[[Model, Assignment, float, float], Answer]

#: Solvers by name, in the order ``auto`` tries them.
SOLVERS: Mapping[str, Run] = MappingProxyType({"highs": run_highs, "cbc": run_cbc})

__all__ = ["SOLVERS", "Answer", "Run", "SolverFailed", "run_cbc", "run_highs", "to_pulp"]
