"""The pass: from a measured graph to a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.profile import Profile
from pipecompile.passes.partition.contract import forced
from pipecompile.passes.partition.problem import HOST, Goal, Memory, Place, Problem, Traffic, Value, Weight
from pipecompile.passes.partition.requests import find_layers, pins
from pipecompile.passes.partition.search import Solution, SolverName, solve

ObjectiveName = Literal["throughput", "latency"]


@dataclass(frozen=True)
class Training:
    """What training adds to the problem.

    ``backward`` is seconds per layer of the backward pass; empty: the profile counts them already. Weights are kept ``copies`` times
    (themselves, gradients, optimizer state: 2 for plain SGD, 4 for Adam). Activations of as many
    micro-batches are kept as ``schedule`` has in flight. One update follows ``micro_batches``.
    """

    backward: tuple[float, ...] = ()
    schedule: Literal["gpipe", "1f1b", "zb_h1"] = "1f1b"
    micro_batches: int = 1
    copies: float = 2.0


@dataclass(frozen=True)
class Partition:
    """Cut a model's layers into pipeline stages.

    ``stages`` is the number of devices to use, the first ones of the cluster; a model with fewer
    layers uses fewer. ``objective`` is what to minimise: the busiest device's time per sample
    (``throughput``), one sample's time through all stages (``latency``), or ``(name, limit)``: the
    one named, while the other stays at most ``limit`` seconds. ``pin`` maps patterns of layers to a
    device name or several, ``colocate`` lists patterns (or lists of them) whose layers share a stage.
    ``chunks`` is the number of stages a device takes; with ``replicas`` a stage may take several
    devices. ``time_limit`` is in seconds, ``gap`` the relative distance from the optimum at which to
    stop. ``solver``: ``auto`` (dynamic programs, HiGHS, CBC), ``highs``, ``cbc`` or ``none`` (dynamic
    programs alone, which give a valid plan whenever memory allows one along some order).
    """

    stages: int
    time_limit: float = 10.0
    gap: float = 1e-4
    solver: SolverName = "auto"
    objective: ObjectiveName | tuple[ObjectiveName, float] = "throughput"
    pin: Mapping[str, str | Sequence[str]] = field(default_factory=dict[str, "str | Sequence[str]"])
    colocate: Sequence[str | Sequence[str]] = ()
    chunks: int = 1
    replicas: bool = False
    training: Training | None = None
    slots: float = 3.0

    def apply(self, graph: ModelGraph, profile: Profile, cluster: Cluster) -> Plan:
        """The best plan found, with its proof: ``objective``, ``bound``, ``solver``, ``solve_seconds``.

        Raises:
            PlanError: if more stages are asked for than the cluster has devices, the profile is not
                of this graph, a name is unknown, or no plan meets the constraints (which one, and
                by how much).
        """
        if not 1 <= self.stages <= len(cluster.devices):
            raise PlanError(
                f"asked for {self.stages} stages on {len(cluster.devices)} devices: "
                f"ask for 1 to {len(cluster.devices)}, or add devices to the cluster"
            )
        problem, notes = self.problem(graph, profile, cluster)
        if not graph.layers:
            return Plan((Stage(0, 0, (), 0.0),), cluster, 0.0, 0.0, "chain", 0.0, profile.total, notes=tuple(notes))
        solution = solve(problem, self.time_limit, self.gap, self.solver)
        notes += [*solution.notes, *_fewer(problem, solution)]
        goal = problem.goal.kind
        return Plan(
            stages=_stages(problem, solution),
            cluster=cluster,
            objective=solution.objective,
            bound=solution.bound,
            solver=solution.solver,
            solve_seconds=solution.seconds,
            total=profile.total + (sum(self.training.backward) if self.training else 0.0),
            layer_names=tuple(layer.name for layer in graph.layers),
            notes=tuple(notes),
            goal=goal,
            memory=solution.verdict.memory,
        )

    def problem(self, graph: ModelGraph, profile: Profile, cluster: Cluster) -> tuple[Problem, list[str]]:
        """The problem this pass solves, and what to tell the user about the number of devices.

        Raises:
            PlanError: as :meth:`apply`.
        """
        together = tuple(
            tuple(dict.fromkeys(v for p in ([group] if isinstance(group, str) else group) for v in find_layers(graph, p)))
            for group in self.colocate
        )
        loose = problem_of(graph, profile, cluster, self.stages, self.training, self.slots)
        loose = replace(loose, together=(*loose.together, *together), idle=True)
        # With the pins to all devices, so that pins which keep layers apart that must not be are told as such.
        wanted = pins(graph, cluster, self.pin, self.stages)
        groups = len(forced(replace(loose, allowed=wanted)).groups)
        used = max(1, min(self.stages, groups // self.chunks))
        notes: list[str] = []
        if used < self.stages:
            count = len(graph.layers) if groups == len(graph.layers) else groups
            what = f"{count} layer{'s' * (count != 1)}" if groups == len(graph.layers) else f"{count} part{'s' * (count != 1)} that can be parted"
            notes.append(f"{self.stages} devices asked for, but the model has {what}: {used} used")
        goal: Any = self.objective
        kind, limit = goal if isinstance(goal, tuple) and len(goal) == 2 else (goal, inf)
        if kind not in ("throughput", "latency") or not (isinstance(limit, (int, float)) and limit > 0):
            raise PlanError(f"objective {self.objective!r}: 'throughput', 'latency', or one of them and a limit in seconds")
        return (
            replace(
                loose,
                places=loose.places[:used],
                links={ends: link for ends, link in loose.links.items() if max(ends) < used},
                allowed=pins(graph, cluster, self.pin, used),
                goal=Goal(kind, limit),
                chunks=self.chunks,
                replicas=self.replicas,
                idle=False,
            ),
            notes,
        )


def problem_of(
    graph: ModelGraph,
    profile: Profile,
    cluster: Cluster,
    stages: int,
    training: Training | None = None,
    slots: float = 3.0,
) -> Problem:
    """The partitioning problem of a profiled graph on the first ``stages`` devices of a cluster.

    The links are the cluster's; ``slots`` is how many of each value a ring holds. Values nobody
    reads outside their layer are left out. Layers that share a buffer which is written to must
    share a stage, and cannot be replicated; layers that share a parameter may be parted: each stage
    keeps it, and in training they sum its gradient.

    Raises:
        PlanError: if the profile is not of this graph.
    """
    count = len(graph.layers)
    if len(profile.seconds) != count:
        raise PlanError(f"the profile has {len(profile.seconds)} layers, the graph {count}: profile this graph again")
    backward = training.backward if training is not None and training.backward else (0.0,) * count
    if len(backward) != count:
        raise PlanError(f"backward times of {len(backward)} layers, the graph has {count}")
    made_by = graph.producer
    readers: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(graph.layers):
        for name in dict.fromkeys(layer.reads):
            if made_by.get(name) != index:
                readers[name].append(index)
    returned = {ref.name for ref in graph.outputs if ref.kind == "value"}
    values: list[Value] = []
    activations = [0.0] * count
    for name in (*graph.inputs, *made_by):
        if not readers[name] and name not in returned:
            continue
        if name not in profile.value_bytes:
            raise PlanError(f"the profile lacks the size of value {name!r}: profile this graph again")
        consumers, nbytes = tuple(readers[name]), float(profile.value_bytes[name])
        spec = graph.values.get(name)
        learns = training is not None and name in made_by and spec is not None and spec.torch_dtype.is_floating_point
        values.append(
            Value(
                made_by.get(name, HOST),
                consumers,
                nbytes,
                name in returned and name in made_by,
                gradient=nbytes if learns else 0.0,
            )
        )
        if name in made_by:
            activations[made_by[name]] += nbytes
    users: dict[str, list[int]] = defaultdict(list)
    for index, layer in enumerate(graph.layers):
        for name in layer.state:
            users[name].append(index)
    state = {entry.name: entry for entry in graph.state}
    written = [tuple(layers) for name, layers in users.items() if name in state and state[name].mutated]
    devices = cluster.devices[:stages]
    pairs = [(i, j) for i in range(stages) for j in range(stages) if i != j]
    links = {pair: cluster.between(*pair) for pair in pairs if cluster.between(*pair) != cluster.link}
    return Problem(
        cost=tuple(forward + back for forward, back in zip(profile.seconds, backward, strict=True)),
        edges=tuple(edge for edge in graph.edges if edge[0] != edge[1]),
        values=tuple(values),
        places=tuple(Place(d.name, d.speed, inf if d.memory is None else d.memory) for d in devices),
        link=cluster.link,
        links=links,
        traffic=Traffic(overlap=cluster.link.overlap),
        memory=Memory(
            copies=training.copies if training else 1.0,
            schedule=training.schedule if training else "stream",
            micro_batches=training.micro_batches if training else 1,
            slots=slots,
            update_every=float(training.micro_batches) if training else 0.0,
        ),
        weights=tuple(
            Weight(float(state[name].nbytes), tuple(layers)) for name, layers in users.items() if name in state
        ),
        activations=tuple(activations),
        together=tuple(layers for layers in written if len(layers) > 1),
        single=frozenset(layer for layers in written for layer in layers),
        names=tuple(layer.name for layer in graph.layers),
        idle=True,
    )


def _stages(problem: Problem, solution: Solution) -> tuple[Stage, ...]:
    layers: dict[int, list[int]] = defaultdict(list)
    for layer, stage in enumerate(solution.placement.stage_of):
        layers[stage].append(layer)
    found: list[Stage] = []
    for index, devices in enumerate(solution.placement.devices):
        compute, transfer = solution.verdict.stages[index]
        if problem.chunks == 1:  # what the device's load shows of it: hidden parts left out, sums included
            busiest = max(solution.verdict.loads[device] for device in devices)
            transfer = max(0.0, busiest * len(devices) - compute)
        found.append(
            Stage(index, devices[0], tuple(layers[index]), compute, transfer, replicas=tuple(devices[1:]))
        )
    return tuple(found)


def _fewer(problem: Problem, solution: Solution) -> list[str]:
    """Say so when a plan with fewer devices would be at least as fast as the one asked for."""
    if not solution.fewer or problem.goal.kind != "throughput":
        return []
    count = min(solution.fewer, key=lambda devices: (solution.fewer[devices], devices))
    if solution.fewer[count] >= solution.objective:
        return []
    return [
        f"{count} of {len(problem.places)} devices would be faster by prediction: "
        f"{solution.fewer[count] * 1e3:.4g} ms a sample instead of {solution.objective * 1e3:.4g} ms"
    ]


__all__ = ["ObjectiveName", "Partition", "Training", "problem_of"]
