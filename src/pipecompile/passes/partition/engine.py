"""A process that solves integer programs through PuLP, so that a solver can be killed.

Run as a script, never imported by the package: it needs PuLP and highspy only, and so starts fast.
It reads pickled requests from standard input until that closes, and answers each on standard
output with ``("answer", values, bound, complete)``, ``("infeasible", ...)`` or ``("failed", reason, ...)``. Whatever solvers print goes nowhere.
"""

from __future__ import annotations

import importlib
import math
import os
import pickle
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

Reply = tuple[str, Any, Any, bool]


def to_pulp(request: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The model as a PuLP problem, and its variables by column."""
    import pulp

    program = pulp.LpProblem("partition", pulp.LpMinimize)
    integer = set(request["integer"])
    columns = [
        program.add_variable(
            f"c{i}", low, None if math.isinf(high) else high, pulp.LpInteger if i in integer else pulp.LpContinuous
        )
        for i, (low, high) in enumerate(zip(request["lower"], request["upper"], strict=True))
    ]
    program.setObjective(pulp.LpAffineExpression({columns[0]: 1.0}))
    for terms, constant in request["rows"]:
        left = pulp.LpAffineExpression({columns[i]: coefficient for i, coefficient in terms.items()})
        program.addConstraint(pulp.LpConstraint(left, sense=pulp.LpConstraintLE, rhs=-constant))
    return program, columns


def run_highs(request: dict[str, Any]) -> Reply:
    """Solve with HiGHS.

    PuLP's wrapper has no warm start and its construction prints a banner, so only the model goes
    through PuLP and the solver object is driven directly.
    """
    import highspy
    import pulp

    begun = time.monotonic()
    program, columns = to_pulp(request)
    base: Any = highspy.Highs.__base__  # the derived class prints a banner while it is made
    solver = base()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("mip_rel_gap", float(request["gap"]))
    program.solverModel = solver
    builder: Any = pulp.getSolver("HiGHS", msg=False)
    builder.buildSolverModel(program)
    # The columns that occur in no row and not in the objective are not handed over.
    known = {getattr(columns[i], "index", None): value for i, value in request["start"].items()}
    known.pop(None, None)
    if known:
        solver.setSolution(len(known), list(known), list(known.values()))
    # Building the model counts; the solver's own clock starts here.
    solver.setOptionValue("time_limit", max(0.0, request["seconds"] - (time.monotonic() - begun)))
    solver.run()

    status = solver.getModelStatus()
    if status in (highspy.HighsModelStatus.kInfeasible, highspy.HighsModelStatus.kUnboundedOrInfeasible):
        return "infeasible", None, None, True
    if status not in (highspy.HighsModelStatus.kOptimal, highspy.HighsModelStatus.kTimeLimit):
        return "failed", f"HiGHS stopped: {solver.modelStatusToString(status)}", None, False
    info = solver.getInfo()
    bound = float(info.mip_dual_bound)
    feasible = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    found = solver.getSolution().col_value
    values = [found[index] if (index := getattr(c, "index", None)) is not None else 0.0 for c in columns]
    complete = status == highspy.HighsModelStatus.kOptimal
    return "answer", values if feasible else None, bound if math.isfinite(bound) else 0.0, complete


def run_cbc(request: dict[str, Any]) -> Reply:
    """Solve with CBC, installed or bundled with PuLP, in a temporary directory."""
    import pulp

    program, columns = to_pulp(request)
    for column, value in request["start"].items():
        columns[column].setInitialValue(value)
    with tempfile.TemporaryDirectory(prefix="pipecompile-", dir=request["folder"]) as folder:
        log = Path(folder) / "cbc.log"
        options: dict[str, Any] = {
            "msg": False,
            "threads": 1,
            "timeLimit": max(request["seconds"], 0.01),
            "gapRel": request["gap"],
            "warmStart": bool(request["start"]),
            "logPath": str(log),
        }
        solver: Any = pulp.getSolver("COIN_CMD", **options)
        if not solver.available():
            bundled = getattr(pulp, "PULP_CBC_CMD", None)
            if bundled is None:
                return "failed", "CBC is not installed", None, False
            solver = pulp.getSolver("COIN_CMD", path=bundled.pulp_cbc_path, **options)
        solver.tmpDir = folder
        program.solve(solver)
        told = re.search(r"^Lower bound:\s*(\S+)", log.read_text(), re.MULTILINE)

    # "Integer infeasible" reaches the one status, "Infeasible" the other too.
    if pulp.LpStatusInfeasible == program.status or program.sol_status == pulp.LpSolutionInfeasible:
        return "infeasible", None, None, True
    values = [float(column.varValue or 0.0) for column in columns]
    solved = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    bound = request["lower"][0]
    if told is not None:
        bound = float(told[1])
    elif program.sol_status == pulp.LpSolutionOptimal:
        bound = values[0]
    return "answer", values if solved else None, bound, program.sol_status == pulp.LpSolutionOptimal


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    for module in ("pulp", "highspy"):  # before the first request, which need not wait for them then
        try:
            importlib.import_module(module)
        except ImportError:
            pass  # whoever needs it says so
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        run = {"highs": run_highs, "cbc": run_cbc}[request["solver"]]
        try:
            reply: Reply = run(request)
        except Exception as error:  # any way in which a third-party solver can break
            reply = "failed", f"{type(error).__name__}: {error}", None, False
        pickle.dump(reply, replies)
        replies.flush()


def main() -> None:
    """Serve standard input on a copy of standard output, which itself goes nowhere."""
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    serve(sys.stdin.buffer, replies)


if __name__ == "__main__":
    main()
