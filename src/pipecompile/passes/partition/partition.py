"""The pass: from a measured graph to a plan."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.profile import Profile
from pipecompile.passes.partition.problem import HOST, Problem, Value
from pipecompile.passes.partition.search import Solution, SolverName, solve


@dataclass(frozen=True)
class Partition:
    """Cut a model's layers into pipeline stages so that the busiest stage is least busy.

    ``stages`` is the number of devices to use, the first ones of the cluster in its order; a model
    with fewer layers uses fewer. ``time_limit`` is in seconds, ``gap`` the relative distance from
    the optimum at which to stop. ``solver``: ``auto`` (HiGHS, then CBC), ``highs``, ``cbc`` or
    ``none`` (the chain dynamic program alone, which always gives a valid plan).
    """

    stages: int
    time_limit: float = 10.0
    gap: float = 1e-4
    solver: SolverName = "auto"

    def apply(self, graph: ModelGraph, profile: Profile, cluster: Cluster) -> Plan:
        """The best plan found, with its proof: ``objective``, ``bound``, ``solver``, ``solve_seconds``.

        Raises:
            PlanError: if more stages are asked for than the cluster has devices, the profile is
                not of this graph, or the layers are not in an order of execution.
        """
        if not 1 <= self.stages <= len(cluster.devices):
            raise PlanError(
                f"asked for {self.stages} stages on {len(cluster.devices)} devices: "
                f"ask for 1 to {len(cluster.devices)}, or add devices to the cluster"
            )
        used = max(1, min(self.stages, len(graph.layers)))
        notes: list[str] = []
        if used < self.stages:
            notes.append(f"{self.stages} devices asked for, but the model has {len(graph.layers)} layers: {used} used")
        problem = problem_of(graph, profile, cluster, used)
        solution = solve(problem, self.time_limit, self.gap, self.solver)
        notes.extend(solution.notes)
        notes.extend(_fewer(solution))

        layers: dict[int, list[int]] = defaultdict(list)
        for layer, stage in enumerate(solution.assignment):
            layers[stage].append(layer)
        return Plan(
            stages=tuple(
                Stage(index, index, tuple(layers[index]), compute, transfer)
                for index, (compute, transfer) in enumerate(solution.loads)
            ),
            cluster=cluster,
            objective=solution.objective,
            bound=solution.bound,
            solver=solution.solver,
            solve_seconds=solution.seconds,
            total=profile.total,
            layer_names=tuple(layer.name for layer in graph.layers),
            notes=tuple(notes),
        )


def problem_of(graph: ModelGraph, profile: Profile, cluster: Cluster, stages: int) -> Problem:
    """The partitioning problem of a profiled graph on the first ``stages`` devices of a cluster.

    The link is the cluster's. Values nobody reads outside their layer are left out.

    Raises:
        PlanError: if the profile is not of this graph.
    """
    if len(profile.seconds) != len(graph.layers):
        raise PlanError(
            f"the profile has {len(profile.seconds)} layers, the graph {len(graph.layers)}: profile this graph again"
        )
    made_by = graph.producer
    readers: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(graph.layers):
        for name in dict.fromkeys(layer.reads):
            if made_by.get(name) != index:
                readers[name].append(index)
    returned = {ref.name for ref in graph.outputs if ref.kind == "value"}
    values: list[Value] = []
    for name in (*graph.inputs, *made_by):
        if not readers[name] and name not in returned:
            continue
        if name not in profile.value_bytes:
            raise PlanError(f"the profile lacks the size of value {name!r}: profile this graph again")
        consumers, nbytes = tuple(readers[name]), float(profile.value_bytes[name])
        values.append(Value(made_by.get(name, HOST), consumers, nbytes, name in returned and name in made_by))
    return Problem(
        cost=profile.seconds,
        edges=tuple(edge for edge in graph.edges if edge[0] != edge[1]),
        values=tuple(values),
        link=cluster.link,
        stages=stages,
        speeds=tuple(device.speed for device in cluster.devices[:stages]),
    )


def _fewer(solution: Solution) -> list[str]:
    """Say so when a plan with fewer devices would be at least as fast as the one asked for."""
    if not solution.fewer:
        return []
    stages = min(solution.fewer, key=lambda count: (solution.fewer[count], count))
    if solution.fewer[stages] >= solution.objective:
        return []
    return [
        f"{stages} of {len(solution.loads)} devices would be faster by prediction: "
        f"{solution.fewer[stages] * 1e3:.4g} ms a sample instead of {solution.objective * 1e3:.4g} ms"
    ]


__all__ = ["Partition", "problem_of"]
