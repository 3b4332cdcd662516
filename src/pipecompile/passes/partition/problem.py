"""The partitioning problem: layers with costs, values that cross, stages in a fixed order.

An *assignment* gives each layer its stage (0-based position in the pipeline). It is feasible when
no layer reads from a later stage (monotone along ``edges``) and no stage is empty. Stage order is
device order; whoever wants another order of unlike devices permutes ``speeds`` and solves again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link

#: The caller, as the producer of a user input and the reader of a result.
HOST = -1

Assignment = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """Something that may cross stages: made by layer ``producer`` (HOST: sent by the caller).

    ``consumers`` are layers, ``nbytes`` the size of one copy; ``returned``: the caller gets it too.
    """

    producer: int
    consumers: tuple[int, ...]
    nbytes: float
    returned: bool = False


@dataclass(frozen=True)
class Problem:
    """Cut ``len(cost)`` layers into ``stages`` non-empty stages so that the largest load is least.

    ``cost`` is seconds per layer on a device of speed 1, ``edges`` pairs (i, j), i < j, of layers
    where j needs i, ``speeds`` one number a stage that divides the cost. What a load is, only
    :func:`pipecompile.passes.partition.load.stage_loads` decides.

    Raises:
        PlanError: if a number of stages, a cost, a speed or an edge makes no sense.
    """

    cost: tuple[float, ...]
    edges: tuple[tuple[int, int], ...]
    values: tuple[Value, ...]
    link: Link
    stages: int
    speeds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.stages <= max(1, len(self.cost)):
            raise PlanError(f"{len(self.cost)} layers cannot fill {self.stages} stages: ask for 1 to {len(self.cost)}")
        if not self.speeds:
            object.__setattr__(self, "speeds", (1.0,) * self.stages)
        if len(self.speeds) != self.stages or not all(0 < speed < float("inf") for speed in self.speeds):
            raise PlanError(f"need one positive speed for each of {self.stages} stages, got {self.speeds}")
        for layer, cost in enumerate(self.cost):
            if not 0 <= cost < float("inf"):
                raise PlanError(f"layer {layer} costs {cost} s: costs must be finite and not negative")
        reads = {(v.producer, c) for v in self.values for c in v.consumers if v.producer != HOST}
        for i, j in (*self.edges, *reads):
            if not 0 <= i < j < len(self.cost):
                raise PlanError(f"layer {j} needs layer {i}: list layers so that each needs only earlier ones")
        for i, j in reads.difference(self.edges):
            raise PlanError(f"layer {j} reads a value of layer {i}, but there is no edge ({i}, {j})")

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.cost)

    @cached_property
    def graph(self) -> nx.DiGraph[int]:
        """The precedence graph over layer indices."""
        graph: nx.DiGraph[int] = nx.DiGraph()
        graph.add_nodes_from(range(self.layers))
        graph.add_edges_from(self.edges)
        return graph

    @cached_property
    def ancestors(self) -> NDArray[np.bool_]:
        """``[v, u]``: u is v or must come before v. Shape (layers, layers)."""
        reach = np.eye(self.layers, dtype=np.bool_)
        for v in range(self.layers):
            for u in self.graph.predecessors(v):
                reach[v] |= reach[u]
        return reach

    @property
    def floor(self) -> float:
        """A lower bound of the largest load in seconds that needs no solver: perfect balance or the largest layer."""
        return max(sum(self.cost) / sum(self.speeds), max(self.cost, default=0.0) / max(self.speeds))

    def seconds(self, stage: int) -> NDArray[np.float64]:
        """What each layer would cost on ``stage``. Shape (layers,)."""
        return np.asarray(self.cost, dtype=np.float64) / self.speeds[stage]

    def check(self, assignment: Sequence[int]) -> str:
        """Why the assignment is not feasible, or ``""`` if it is."""
        if len(assignment) != self.layers:
            return f"it places {len(assignment)} of {self.layers} layers"
        for i, j in self.edges:
            if assignment[i] > assignment[j]:
                return f"layer {j} in stage {assignment[j]} needs layer {i} in stage {assignment[i]}"
        missing = set(range(self.stages)) - set(assignment) if self.layers else set[int]()
        return f"stage {min(missing)} is empty" if missing else ""


__all__ = ["HOST", "Assignment", "Problem", "Value"]
