"""Partition: which layers run on which device. Dynamic programs, stage windows and an integer program."""

from __future__ import annotations

from pipecompile.passes.partition.calibrate import calibrate
from pipecompile.passes.partition.load import Verdict, judge
from pipecompile.passes.partition.partition import ObjectiveName, Partition, Training, problem_of
from pipecompile.passes.partition.problem import (
    HOST,
    Goal,
    Memory,
    Place,
    Placement,
    Problem,
    Traffic,
    Value,
    Weight,
)
from pipecompile.passes.partition.requests import Size, with_memory
from pipecompile.passes.partition.search import Solution, SolverName, solve

__all__ = [
    "HOST",
    "Goal",
    "Memory",
    "ObjectiveName",
    "Partition",
    "Place",
    "Placement",
    "Problem",
    "Size",
    "Solution",
    "SolverName",
    "Traffic",
    "Training",
    "Value",
    "Verdict",
    "Weight",
    "calibrate",
    "judge",
    "problem_of",
    "solve",
    "with_memory",
]
