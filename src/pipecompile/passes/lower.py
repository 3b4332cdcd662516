"""Lower: from what each device computes to what it also receives and sends."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import pairwise

from pipecompile.errors import PlanError, ProgramError
from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program

#: A message of at most this many bytes gets deep rings: a stage that stutters then stops nobody.
SMALL = 64 << 10

#: Bytes a ring may take. A larger one is made as shallow as still lets copies and computing overlap.
RING = 8 << 20

_DEEP, _USUAL, _LEAST = 4, 2, 1

#: Messages for so many seconds of work, at most so many, so that nobody is woken for each of them.
_WAKE, _DEEPEST = 3e-3, 16


@dataclass(frozen=True)
class Lower:
    """Add edges, sends and receives to a compute-only program.

    ``ahead`` is how many messages beyond the one at hand a stage has posted towards its
    neighbour; 0 means that a receive is posted only when its stage is about to wait for it.
    ``None`` chooses by message size: 4 for small messages, 1 for huge ones, else 2; and up to 16
    where stages are so short that being woken for every message would cost more than computing.

    Edges that jump stages get more. Let every hop from one stage to the next be ``a`` ahead. A
    stage in iteration ``n`` has posted up to message ``n + a``; the stage before it can then have
    sent that much and be in iteration ``n + a + 1``, where it blocks. So each hop adds a lead of
    ``a + 1`` iterations, and a stage ``d`` hops up can have sent message ``n + d * (a + 1) - 1``
    while its far reader is in iteration ``n``. A direct edge between the two that is
    ``d * (a + 1) - 1`` ahead never makes it wait for what the chain would have let through. (For
    ``d = 1`` this is ``a`` again; where hops differ, the leads add up.) The caller counts as one
    stage before the first, for inputs, and as one stage behind the last, for results.

    Where stages are replicated, ``ahead`` counts turns, and a turn of a hop is as many samples as
    the end of it with more replicas has: so each replica has as many messages on the way as a
    stage alone. How many turns of its target an edge is ahead follows from the samples that its
    hops lead by.
    """

    ahead: int | None = None

    def __post_init__(self) -> None:
        if self.ahead is not None and self.ahead < 0:
            raise ProgramError(f"ahead={self.ahead}: a stage cannot receive less than 0 messages ahead")

    def apply(self, graph: ModelGraph, plan: Plan, program: Program) -> Program:
        """The program with edges in pipeline order and, per device, RECV ahead, F and SEND.

        Raises:
            ProgramError: if the plan sends a value backwards, lacks a layer or the graph lacks a
                spec, or if the program's bodies do more than compute the sample at hand.
        """
        crossing = crossings(graph, plan)
        edges = self._edges(graph, [len(stage.devices) for stage in plan.stages], crossing, plan.slowest)
        devices = tuple(_device(device, edges) for device in program.devices)
        return Program(devices, edges, program.schedule)

    def _edges(
        self, graph: ModelGraph, replicas: list[int], crossing: dict[tuple[int, int], tuple[str, ...]], seconds: float
    ) -> tuple[Edge, ...]:
        edges: list[Edge] = []
        for (source, target), values in crossing.items():
            specs = tuple(_spec(graph, value) for value in values)
            copies = [1 if end == HOST else replicas[end] for end in (source, target)]
            edges.append(
                Edge(source, target, values, specs, 0, 1, source_replicas=copies[0], target_replicas=copies[1])
            )
        stages = len(replicas)
        edges.sort(key=lambda edge: _span(edge, stages))
        turns = [max(pair) for pair in pairwise([1, *replicas, 1])]
        leads = self._leads(edges, turns, seconds)
        return tuple(ring for edge in edges for ring in _rings(self._with_ahead(edge, leads, turns)))

    def _leads(self, edges: list[Edge], turns: list[int], seconds: float) -> list[int]:
        """Samples that each position may be ahead of the next: caller, stages, caller."""
        stages = len(turns) - 1
        sizes = {_span(edge, stages): edge.nbytes for edge in edges}
        hops = pairwise(range(-1, stages + 1))
        ahead = [_depth(sizes.get(hop), seconds) if self.ahead is None else self.ahead for hop in hops]
        return [turn * (1 + depth) for turn, depth in zip(turns, ahead, strict=True)]

    def _with_ahead(self, edge: Edge, leads: list[int], turns: list[int]) -> Edge:
        first, last = _span(edge, len(turns) - 1)
        lead = sum(leads[first + 1 : last + 1])
        if self.ahead is None and lead * edge.nbytes > RING:
            # The lead of a chain whose hops are all as shallow as possible: full speed, less slack.
            shallow = (_LEAST + 1) * sum(turns[first + 1 : last + 1])
            lead = min(lead, max(shallow, RING // edge.nbytes))
        return replace(edge, ahead=math.ceil(lead / edge.target_replicas) - 1)


def _rings(edge: Edge) -> list[Edge]:
    """The ring of every pair of replicas between which samples travel, with the slots it needs."""
    common = math.gcd(edge.source_replicas, edge.target_replicas)
    # Of the turns posted, every ``source_replicas / common``-th has its message in this ring.
    slots = math.ceil((edge.ahead + 1) * common / edge.source_replicas)
    return [
        replace(edge, slots=slots, source_replica=source, target_replica=target)
        for source in range(edge.source_replicas)
        for target in range(edge.target_replicas)
        if source % common == target % common
    ]


def crossings(graph: ModelGraph, plan: Plan) -> dict[tuple[int, int], tuple[str, ...]]:
    """``(source, target)`` -> values, for every pair of stages (or HOST) that share an edge.

    Each value goes straight from the stage that makes it to each stage that reads it. Values of
    free nodes do not cross, except that the last stage makes those the caller gets. A stage that
    receives nothing is clocked by the caller; one that sends nothing confirms each sample to the
    caller. Such edges carry no value. Values are in order of user inputs, then of layers, then of
    outputs.

    Raises:
        ProgramError: if a layer is in no stage or in two, a value is read that nobody makes, or a
            stage would have to send to an earlier one.
    """
    stage_of = _stage_of(graph, plan)
    made_in = {value: stage_of[layer] for value, layer in graph.producer.items()}
    last = len(plan.stages) - 1
    found: defaultdict[tuple[int, int], set[str]] = defaultdict(set)
    for index, layer in enumerate(graph.layers):
        stage = stage_of[index]
        for value in layer.reads:
            if value in graph.free:
                continue
            if value not in made_in and value not in graph.inputs:
                raise ProgramError(f"layer {layer.name} in stage {stage} reads {value!r}, which no layer makes")
            source = made_in.get(value, HOST)
            if source > stage:
                raise ProgramError(
                    f"layer {layer.name} in stage {stage} reads {value!r} of the later stage {source}: "
                    "plan the layers so that each reads only from its own or an earlier stage"
                )
            if source != stage:
                found[source, stage].add(value)
    for ref in graph.outputs:
        if ref.kind != "value":
            continue
        if ref.name not in made_in and ref.name not in graph.free:
            raise ProgramError(f"the model returns {ref.name!r}, which no layer makes")
        found[made_in.get(ref.name, last), HOST].add(ref.name)
    for stage in range(last + 1):
        if not any(target == stage for _, target in found):
            found[HOST, stage] = set()
        if not any(source == stage for source, _ in found):
            found[stage, HOST] = set()
    everything = (*graph.inputs, *made_in, *(ref.name for ref in graph.outputs))
    order = {value: i for i, value in enumerate(dict.fromkeys(everything))}
    return {ends: tuple(sorted(values, key=order.__getitem__)) for ends, values in found.items()}


def _stage_of(graph: ModelGraph, plan: Plan) -> dict[int, int]:
    """Layer -> stage."""
    if [stage.index for stage in plan.stages] != list(range(len(plan.stages))):
        raise ProgramError(f"the plan numbers its stages {[stage.index for stage in plan.stages]}, not 0, 1, ...")
    stage_of: dict[int, int] = {}
    for stage in plan.stages:
        for layer in stage.layers:
            if layer in stage_of or not 0 <= layer < len(graph.layers):
                raise ProgramError(f"the plan gives stage {stage.index} layer {layer}: it is elsewhere or not at all")
            stage_of[layer] = stage.index
    written = {entry.name for entry in graph.state if entry.mutated}
    for index, layer in enumerate(graph.layers):
        if index not in stage_of:
            raise ProgramError(f"the plan puts layer {index} ({layer.name}) in no stage")
        changed = written.intersection(layer.state)
        if changed and plan.stages[stage_of[index]].replicas:
            raise PlanError(
                f"stage {stage_of[index]} is replicated, but its layer {layer.name} writes to {min(changed)!r}: samples "
                "dealt to several devices would not see each other's changes in order"
            )
    return stage_of


def _device(device: DeviceProgram, edges: tuple[Edge, ...]) -> DeviceProgram:
    # One instruction stands for all rings between two stages: the sample says which is meant.
    incoming = {edge.between: edge for edge in edges if edge.target in device.stages}.values()
    outgoing = {edge.between: edge for edge in edges if edge.source in device.stages}.values()
    computed = [step.stage for step in device.body if step.op is Op.FORWARD and step.sample == 0]
    if len(computed) != len(device.body) or sorted(computed) != sorted(device.stages) or device.warm_up or device.drain:
        raise ProgramError(
            f"device {device.device}: only a body that computes the sample at hand once in each of its stages can be "
            f"lowered, got {[str(step) for step in (*device.warm_up, *device.body, *device.drain)]}"
        )
    warm_up = tuple(
        Instruction(Op.RECV, edge.target, device.replica + turn * device.replicas, edge.between)
        for edge in incoming
        for turn in range(edge.ahead)
    )
    # Receives first: an edge between two stages of one device has its slot posted before its send.
    body = [Instruction(Op.RECV, edge.target, edge.ahead, edge.between) for edge in incoming]
    for step in device.body:
        body.append(step)
        # Edges are in order of distance, so the next stage, which the rest waits for, comes first.
        body += [Instruction(Op.SEND, e.source, 0, e.between) for e in outgoing if e.source == step.stage]
    # Nothing to drain: a device that has sent its last message owes nobody anything.
    return replace(device, warm_up=warm_up, body=tuple(body))


def _span(edge: Edge, stages: int) -> tuple[int, int]:
    """Positions of an edge's ends, the caller being first as a source and last as a target."""
    return edge.source, stages if edge.target == HOST else edge.target


def _depth(nbytes: int | None, seconds: float) -> int:
    """How far ahead neighbours receive by default; ``None`` where no edge joins them."""
    if nbytes is None:
        return _USUAL
    short = min(_DEEPEST, math.ceil(_WAKE / seconds)) if seconds else _DEEP
    if short > _DEEP and (short + 1) * nbytes <= RING:
        return short
    if nbytes <= SMALL:
        return _DEEP
    return _USUAL if (_USUAL + 1) * nbytes <= RING else _LEAST


def _spec(graph: ModelGraph, value: str) -> TensorSpec:
    if value not in graph.values:
        raise ProgramError(f"the graph has no spec of {value!r}, which crosses stages: trace the model again")
    return graph.values[value]


__all__ = ["RING", "SMALL", "Lower", "crossings"]
