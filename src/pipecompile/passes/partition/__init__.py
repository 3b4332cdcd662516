"""Partition: which layers run on which device. Chain DP, stage windows and an integer program."""

from __future__ import annotations

from pipecompile.passes.partition.load import stage_loads
from pipecompile.passes.partition.partition import Partition, problem_of
from pipecompile.passes.partition.problem import HOST, Assignment, Problem, Value
from pipecompile.passes.partition.search import Solution, SolverName, solve

__all__ = [
    "HOST",
    "Assignment",
    "Partition",
    "Problem",
    "Solution",
    "SolverName",
    "Value",
    "problem_of",
    "solve",
    "stage_loads",
]
