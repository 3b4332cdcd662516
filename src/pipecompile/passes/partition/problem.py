"""The partitioning problem: layers with costs, values that cross, and the devices to place them on.

A *placement* gives each layer its stage, and each stage the devices that run it. It is feasible
when no layer reads from a later stage, no stage is empty, pins and memory limits hold, and no
device has two stages (unless the plan is to be interleaved in ``chunks``). What a placement costs,
only :func:`pipecompile.passes.partition.load.judge` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, isfinite
from typing import Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link

#: The caller, as the producer of a user input and the reader of a result.
HOST = -1

#: The stage of every layer.
Assignment = tuple[int, ...]
#: The devices of every stage.
Arrangement = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Value:
    """Something that may cross stages: made by layer ``producer`` (HOST: sent by the caller).

    ``consumers`` are layers, ``nbytes`` the size of one copy; ``returned``: the caller gets it too.
    ``gradient`` is the size of what flows back over each copy in training. ``backward`` marks a
    value that belongs to a backward pass written out as layers: it runs against the pipeline, so
    its consumers may lie in earlier stages.
    """

    producer: int
    consumers: tuple[int, ...]
    nbytes: float
    returned: bool = False
    gradient: float = 0.0
    backward: bool = False


@dataclass(frozen=True)
class Place:
    """A device as the planner sees it.

    ``speed`` divides the layers' costs; ``cost``, if given, are this device's own seconds per
    layer instead. ``memory`` is in bytes. ``copies`` multiplies the time the device itself spends
    on transfers: 0 where others do the copying.
    """

    name: str = ""
    speed: float = 1.0
    memory: float = inf
    cost: tuple[float, ...] = ()
    copies: float = 1.0


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of ``nbytes``, used by the layers ``users``: several if it is tied."""

    nbytes: float
    users: tuple[int, ...]


@dataclass(frozen=True)
class Traffic:
    """What a transfer costs whom.

    ``multicast`` False: a value read in three other stages is copied three times; True: its
    producer pays once, whoever reads it. ``receive`` is the share of a copy's bytes / bandwidth
    that the reader pays too (0: it reads in place). ``overlap`` is the share of transfer time that
    hides behind computing: 0 adds the two up, 1 takes the larger.
    """

    multicast: bool = False
    receive: float = 0.0
    overlap: float = 0.0


@dataclass(frozen=True)
class Memory:
    """What a device keeps.

    ``copies`` of every weight (1; in training also gradients and optimizer state), activations of
    as many samples as the schedule has in flight at the stage, and ``slots`` of every value
    received. ``schedule``: ``stream`` has one sample in flight, ``gpipe`` all ``micro_batches``,
    ``1f1b`` as many as there are stages from this one to the end, ``zb_h1`` as many as there are
    stages, both up to ``micro_batches``.
    ``update_every`` is the number of samples per update after which copies of a weight on several
    devices sum their gradients; 0: never.
    """

    copies: float = 1.0
    schedule: Literal["stream", "gpipe", "1f1b", "zb_h1"] = "stream"
    micro_batches: int = 1
    slots: float = 0.0
    update_every: float = 0.0

    def in_flight(self, stage: int, stages: int) -> int:
        """Samples whose activations stage ``stage`` of ``stages`` keeps at the same time."""
        most = {"stream": 1, "gpipe": self.micro_batches, "1f1b": stages - stage, "zb_h1": stages}[self.schedule]
        return most if self.schedule == "stream" else min(self.micro_batches, most)


@dataclass(frozen=True)
class Goal:
    """What to minimise, seconds: the busiest device's time per sample, or one sample's time through all stages.

    ``limit`` bounds the other of the two.
    """

    kind: Literal["throughput", "latency"] = "throughput"
    limit: float = inf


@dataclass(frozen=True)
class Placement:
    """``stage_of`` each layer, and the ``devices`` of each stage (several: samples are dealt in turn)."""

    stage_of: Assignment
    devices: Arrangement


@dataclass(frozen=True)
class Problem:
    """Cut ``len(cost)`` layers into stages on ``places``.

    ``cost`` is seconds per sample (forward and backward) of a layer on a device of speed 1,
    ``edges`` pairs (i, j), i < j, of layers where j needs i. ``link`` joins all devices and the
    caller, ``links`` names exceptions by (sender, receiver). ``allowed`` pins layers to sets of
    devices, ``together`` lists layers that must share a stage. ``activations`` is bytes per sample
    and layer. ``chunks`` is how many stages every device takes. ``replicas``: a stage may take
    several devices, except one with a layer in ``single``. ``idle``: devices may be left unused.

    Raises:
        PlanError: if a cost, a device, an edge or an option makes no sense.
    """

    cost: tuple[float, ...]
    edges: tuple[tuple[int, int], ...]
    values: tuple[Value, ...]
    places: tuple[Place, ...]
    link: Link = Link()
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict[tuple[int, int], Link])
    traffic: Traffic = Traffic()
    goal: Goal = Goal()
    memory: Memory = Memory()
    weights: tuple[Weight, ...] = ()
    activations: tuple[float, ...] = ()
    allowed: Mapping[int, frozenset[int]] = field(default_factory=dict[int, frozenset[int]])
    together: tuple[tuple[int, ...], ...] = ()
    single: frozenset[int] = frozenset()
    chunks: int = 1
    replicas: bool = False
    idle: bool = False
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.places:
            raise PlanError("there is no device to plan for")
        for place in self.places:
            if not 0 < place.speed < inf or not place.memory >= 0 or not 0 <= place.copies < inf:
                raise PlanError(f"device {place.name!r}: speed must be positive, memory and copies not negative")
            if place.cost and len(place.cost) != self.layers:
                raise PlanError(f"device {place.name!r} has costs of {len(place.cost)} layers, not {self.layers}")
        for costs in (self.cost, *(place.cost for place in self.places)):
            for layer, cost in enumerate(costs):
                if not 0 <= cost < inf:
                    raise PlanError(f"{self.name(layer)} costs {cost} s: costs must be finite and not negative")
        self._check_edges()
        if self.activations and len(self.activations) != self.layers:
            raise PlanError(f"activations of {len(self.activations)} layers, not {self.layers}")
        if self.chunks < 1 or (self.chunks > 1 and self.replicas):
            raise PlanError(f"chunks={self.chunks}: must be positive, and 1 where stages may be replicated")
        if self.traffic.multicast and self.links:
            raise PlanError("multicast needs the same link between all devices")
        if not self.idle and self.least_stages > max(1, self.layers):
            raise PlanError(
                f"{self.layers} layers cannot fill {self.least_stages} stages: ask for 1 to {max(1, self.layers)}"
            )

    def _check_edges(self) -> None:
        reads = {(v.producer, c) for v in self.values for c in v.consumers if v.producer != HOST and not v.backward}
        for i, j in (*self.edges, *reads):
            if not 0 <= i < j < self.layers:
                raise PlanError(
                    f"{self.name(j)} needs {self.name(i)}: list layers so that each needs only earlier ones "
                    "(where they need each other, no order exists)"
                )
        for i, j in reads.difference(self.edges):
            raise PlanError(f"{self.name(j)} reads a value of {self.name(i)}, but there is no edge ({i}, {j})")
        used = [layer for weight in self.weights for layer in weight.users]
        used += [layer for value in self.values for layer in (*value.consumers, max(value.producer, 0))]
        for layer in (*used, *self.allowed, *self.single, *(v for group in self.together for v in group)):
            if not 0 <= layer < self.layers:
                raise PlanError(f"there is no layer {layer}: the problem has {self.layers}")

    def name(self, layer: int) -> str:
        """How messages call a layer."""
        known = 0 <= layer < len(self.names) and self.names[layer]
        return f"layer {self.names[layer]!r}" if known else f"layer {layer}"

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.cost)

    @property
    def most_stages(self) -> int:
        """Number of stages if every device has its own."""
        return len(self.places) * self.chunks

    @property
    def least_stages(self) -> int:
        """Number of stages a plan must at least have."""
        return 1 if self.idle or self.replicas else self.most_stages

    @property
    def limited(self) -> bool:
        """Whether any device's memory is limited."""
        return any(isfinite(place.memory) for place in self.places)

    @property
    def positional(self) -> bool:
        """Whether what a stage needs depends on how many stages there are."""
        return self.limited and self.memory.schedule in ("1f1b", "zb_h1") and any(self.activations)

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

    @cached_property
    def around(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cost of each layer with all that must come before it, and with all that must come after it."""
        cost = np.asarray(self.cost, dtype=np.float64)
        ahead, behind = np.zeros(self.layers), np.zeros(self.layers)
        for low in range(0, self.layers, 256):  # in pieces, because the product is taken of a copy
            reach = self.ancestors[low : low + 256].astype(np.float64)
            ahead[low : low + 256] = reach @ cost
            behind += cost[low : low + 256] @ reach
        return ahead, behind

    def seconds(self, device: int) -> NDArray[np.float64]:
        """What each layer would cost on ``device``. Shape (layers,)."""
        place = self.places[device]
        if place.cost:
            return np.asarray(place.cost, dtype=np.float64)
        return np.asarray(self.cost, dtype=np.float64) / place.speed

    def between(self, source: int, target: int) -> Link:
        """The link from one device to another (HOST: the caller)."""
        return self.links.get((source, target), self.link)

    def permits(self, layer: int, devices: Sequence[int]) -> bool:
        """Whether the pins and the state of a layer let it run on a stage of these devices."""
        wanted = self.allowed.get(layer)
        return (wanted is None or wanted.issuperset(devices)) and (len(devices) == 1 or layer not in self.single)

    def check(self, placement: Placement) -> str:
        """Why the placement is no pipeline on these devices, or ``""``; memory is the judge's matter."""
        stage_of, devices = placement.stage_of, placement.devices
        if len(stage_of) != self.layers:
            return f"it places {len(stage_of)} of {self.layers} layers"
        if set(stage_of) != set(range(len(devices))):
            return f"stages {sorted(set(range(len(devices))) ^ set(stage_of))} are empty or unknown"
        for i, j in self.edges:
            if stage_of[i] > stage_of[j]:
                return f"{self.name(j)} in stage {stage_of[j]} needs {self.name(i)} in stage {stage_of[i]}"
        for layer, stage in enumerate(stage_of):
            if not self.permits(layer, devices[stage]):
                return f"{self.name(layer)} must not run on devices {devices[stage]}"
        for group in self.together:
            if len({stage_of[layer] for layer in group}) > 1:
                return f"{self.name(group[0])} is parted from what it must share a stage with"
        used = [device for stage in devices for device in stage]
        if self.chunks == 1 and len(set(used)) < len(used):
            return "a device has two stages"
        if self.chunks > 1 and any(stage != devices[s % len(self.places)] for s, stage in enumerate(devices)):
            return "chunks are not dealt to the devices in turn"
        if not self.replicas and any(len(stage) > 1 for stage in devices):
            return "a stage is replicated"
        if not self.idle and len(set(used)) < len(self.places):
            return f"devices {sorted(set(range(len(self.places))) - set(used))} are unused"
        return ""


__all__ = [
    "HOST",
    "Arrangement",
    "Assignment",
    "Goal",
    "Memory",
    "Place",
    "Placement",
    "Problem",
    "Traffic",
    "Value",
    "Weight",
]
