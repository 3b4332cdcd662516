"""Verify: refuse a Program that could hang, mix up samples, use a value too early or overrun a ring."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Never

from pipecompile.errors import ProgramError
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program


@dataclass(frozen=True)
class Verify:
    """Check a program by carrying it out without data.

    The caller is taken to submit and collect as eagerly as the rings allow. Enough samples are
    run for every ring to come round twice. That settles it for any number: in as many samples as
    the rounds of all replicas take to meet, each edge moves by the same number of messages, and
    since a message must be posted no later than in the turn that uses it, nothing waits for a
    later sample; so a deadlock lies within one such round, and every round after the warm-up is
    like the one before.
    """

    def apply(self, program: Program, graph: ModelGraph | None = None, plan: Plan | None = None) -> Program:
        """The program, unchanged. With its graph and plan, values are checked too.

        Raises:
            ProgramError: naming device, stage, sample and edge, if the program breaks a rule.
        """
        _structure(program)
        if graph is not None and plan is not None:
            _values(program, graph, plan)
        _Machine(program).run()
        return program


def _structure(program: Program) -> None:
    """Every name means one thing, and every instruction is where it can be carried out."""
    owner: defaultdict[int, dict[int, DeviceProgram]] = defaultdict(dict)
    for device in program.devices:
        for stage in device.stages:
            other = owner[stage].setdefault(device.replica, device)
            if other is not device:
                raise ProgramError(f"stage {stage} is on device {other.device} and on device {device.device}")
            if device.replicas != other.replicas or not 0 <= device.replica < device.replicas:
                raise ProgramError(f"device {device.device} is replica {device.replica} of {device.replicas}")
    for stage, devices in owner.items():
        counts = {device.replicas for device in devices.values()}
        if counts != {len(devices)}:
            raise ProgramError(f"stage {stage} is on {len(devices)} devices that count {sorted(counts)} replicas")
    edges: dict[str, Edge] = {}
    for edge in program.edges:
        if edge.name in edges:
            raise ProgramError(f"there are two edges {edge.name}: one carries all values between its ends")
        edges[edge.name] = edge
        for stage in (edge.source, edge.target):
            if stage != HOST and stage not in owner:
                raise ProgramError(f"edge {edge.name} ends at stage {stage}, which is on no device")
        if edge.source == edge.target:
            raise ProgramError(f"edge {edge.name} leads from a stage to itself")
        posted = 1 + edge.ahead // (edge.stride // edge.target_replicas)
        if edge.slots < 1 or edge.ahead < 0 or posted > edge.slots:
            raise ProgramError(f"edge {edge.name} is {edge.ahead} ahead with {edge.slots} slots: it needs one more")
        if len(edge.values) != len(edge.specs):
            raise ProgramError(f"edge {edge.name} has {len(edge.values)} values, but {len(edge.specs)} specs")
        _ends(edge, owner)
    for edge in program.edges:
        _complete(program.rings(edge.between))
    for device in program.devices:
        steps = (*device.warm_up, *device.body, *device.drain)
        for step in steps:
            _place(step, device, edges, owner)
        sent = {step.edge for step in steps if step.op is Op.SEND}
        for edge in program.edges:
            if edge.source in device.stages and edge.between not in sent:
                raise ProgramError(f"device {device.device}: stage {edge.source} never sends on edge {edge.name}")


def _ends(edge: Edge, owner: Mapping[int, Mapping[int, DeviceProgram]]) -> None:
    """The replicas at both ends of a ring are those there are, and share samples."""
    for stage, replica, replicas in (
        (edge.source, edge.source_replica, edge.source_replicas),
        (edge.target, edge.target_replica, edge.target_replicas),
    ):
        count = 1 if stage == HOST else len(owner[stage])
        if replicas != count or not 0 <= replica < count:
            end = "the caller" if stage == HOST else f"stage {stage}"
            raise ProgramError(f"edge {edge.name} ends at replica {replica} of {replicas}, but {end} has {count}")
    assert edge.first >= 0, "raises where the two never meet"


def _complete(rings: Sequence[Edge]) -> None:
    """Every sample finds one ring between two stages, and all of them carry the same."""
    one = rings[0]
    for sample in range(one.stride):
        if not any(ring.carries(sample) for ring in rings):
            raise ProgramError(f"no edge {one.between} carries sample {sample}")
    for ring in rings:
        if (ring.values, ring.specs, ring.ahead) != (one.values, one.specs, one.ahead):
            raise ProgramError(f"edges {one.name} and {ring.name} differ in values or in how far they are ahead")


def _place(
    step: Instruction, device: DeviceProgram, edges: Mapping[str, Edge], owner: Mapping[int, Mapping[int, DeviceProgram]]
) -> None:
    where = f"device {device.device}: {step}"
    if step.stage not in device.stages:
        there = ", ".join(f"device {other.device}" for other in owner.get(step.stage, {}).values())
        place = there or "no device"
        raise ProgramError(f"{where} is an instruction on the wrong device: stage {step.stage} is on {place}")
    if step.op is Op.FORWARD:
        if step.edge:
            raise ProgramError(f"{where}: a forward reads all edges of its stage and names none")
        return
    edge = next((edge for edge in edges.values() if edge.between == step.edge), None)
    if edge is None:
        raise ProgramError(f"{where}: there is no edge {step.edge!r}")
    if step.stage != (edge.source if step.op is Op.SEND else edge.target):
        end = "sent by" if step.op is Op.SEND else "received by"
        raise ProgramError(f"{where}: edge {edge.name} is not {end} stage {step.stage}")


def _values(program: Program, graph: ModelGraph, plan: Plan) -> None:
    """What each stage reads reaches it, and what it sends it makes."""
    devices_of: defaultdict[int, dict[int, int]] = defaultdict(dict)
    for device in program.devices:
        devices_of.update({s: {**devices_of[s], device.replica: device.device} for s in device.stages})
    incoming: defaultdict[int, set[str]] = defaultdict(set)
    to_host: Counter[str] = Counter()
    results = {ref.name for ref in graph.outputs if ref.kind == "value"}
    free = graph.free & results
    makes = {s.index: {v for i in s.layers for v in graph.layers[i].makes} for s in plan.stages}
    for edge in program.edges:
        source = "the caller" if edge.source == HOST else f"stage {edge.source}"
        made = set(graph.inputs) if edge.source == HOST else makes.get(edge.source, set())
        for value, spec in zip(edge.values, edge.specs, strict=True):
            if value not in made and not (edge.target == HOST and value in free):
                raise ProgramError(f"edge {edge.name} carries {value!r}, which {source} does not make")
            if spec != graph.values.get(value):
                raise ProgramError(f"edge {edge.name} has another layout of {value!r} than the graph")
        if edge.target == HOST:
            # Of the rings of replicas each sample takes one.
            to_host.update(edge.values if edge is program.rings(edge.between)[0] else ())
        else:
            incoming[edge.target].update(edge.values)
    for stage in plan.stages:
        where = f"device {stage.device}, stage {stage.index}"
        placed = devices_of[stage.index]
        if [placed.get(replica) for replica in range(max(len(placed), 1))] != list(stage.devices):
            on = ", ".join(f"{device}" for _, device in sorted(placed.items())) or "None"
            raise ProgramError(f"{where}: the program has this stage on device {on}")
        for layer in (graph.layers[i] for i in stage.layers):
            for value in layer.reads:
                if value not in incoming[stage.index] | makes[stage.index] | graph.free:
                    raise ProgramError(f"{where}: layer {layer.name} reads {value!r}, which no edge brings")
    for name in results:
        if to_host[name] != 1:
            raise ProgramError(f"the caller gets result {name!r} {to_host[name]} times: exactly one edge must bring it")


@dataclass
class _Ring:
    """The sample whose message is next to be posted, to be sent and to be consumed."""

    edge: Edge
    posted: int
    sent: int
    used: int


@dataclass
class _Worker:
    """A device with what it still has to do."""

    device: DeviceProgram
    steps: Sequence[Instruction]
    at: int = 0
    waits: str = ""
    edge: Edge | None = None

    @property
    def step(self) -> Instruction:
        return self.steps[self.at]


@dataclass
class _Machine:
    """Carries a program out, each device as far as it gets, until all are done or none can go on.

    ``computed`` is the sample each device has to compute next in each of its stages.
    """

    program: Program
    samples: int = 0
    submitted: int = 0
    collected: int = 0
    rings: dict[str, _Ring] = field(default_factory=dict[str, _Ring])
    incoming: dict[int, list[_Ring]] = field(default_factory=lambda: defaultdict(list))
    outgoing: dict[int, list[_Ring]] = field(default_factory=lambda: defaultdict(list))
    computed: dict[tuple[int, int], int] = field(default_factory=dict[tuple[int, int], int])

    def run(self) -> None:
        program = self.program
        stages = [stage for device in program.devices for stage in device.stages]
        rounds = math.lcm(*(device.replicas for device in program.devices))
        self.samples = 2 * max((edge.reach for edge in program.edges), default=0) + (rounds + 1) * len(stages) + 3
        if not any(device.body for device in program.devices):
            steps = [step for device in program.devices for step in device.warm_up]
            self.samples = 1 + max((step.sample for step in steps), default=-1)
        for edge in program.edges:
            first = edge.first
            posted = first + (edge.reach if edge.target == HOST else 0)
            ring = self.rings[edge.name] = _Ring(edge, posted, first, first)
            self.incoming[edge.target].append(ring)
            self.outgoing[edge.source].append(ring)
        self.computed = {(d.device, stage): d.replica for d in program.devices for stage in d.stages}
        workers = [
            _Worker(device, steps) for device, steps in zip(program.devices, program.unroll(self.samples), strict=True)
        ]
        while self._caller() + sum(self._advance(worker) for worker in workers):
            pass
        stuck = [worker for worker in workers if worker.at < len(worker.steps)]
        if stuck:
            self._stuck(stuck)
        for device in program.devices:
            for stage in device.stages:
                due = self.computed[device.device, stage]
                if due < self.samples:
                    raise ProgramError(f"device {device.device}: stage {stage} never computes sample {due}")
        for ring in self.rings.values():
            if ring.sent < self.samples:
                raise ProgramError(f"edge {ring.edge.name}: message {ring.sent} is never sent")

    def _stuck(self, stuck: Sequence[_Worker]) -> Never:
        left = [step for worker in stuck for step in worker.steps[worker.at :]]
        for worker in stuck:
            edge, sample = worker.edge, worker.step.sample
            assert edge is not None, "whoever stopped early waits at an edge"
            # A wait for someone who has nothing of the kind left to do is more than a deadlock.
            op = Op.SEND if worker.step.op is Op.FORWARD else Op.RECV
            other = edge.source if op is Op.SEND else edge.target
            if other != HOST and Instruction(op, other, sample, edge.name) not in left:
                verb = "sends" if op is Op.SEND else "posts"
                raise ProgramError(f"{worker.waits}, but stage {other} never {verb} message {sample}")
        for ring in self.rings.values():
            if ring.edge.target == HOST and ring.sent == ring.used < self.samples:
                wanted = Instruction(Op.SEND, ring.edge.source, ring.sent, ring.edge.name)
                if wanted not in left:
                    raise ProgramError(f"edge {ring.edge.name}: message {ring.sent} is never sent")
        raise ProgramError(f"deadlock: {'; '.join(worker.waits for worker in stuck)}")

    def _caller(self) -> int:
        """Collect and submit what can be; returns how much that was."""
        moved = 0
        while results := self._of(self.incoming[HOST], self.collected):
            if not all(ring.sent > self.collected for ring in results):
                break
            for ring in results:
                ring.used += ring.edge.stride
                ring.posted += ring.edge.stride
            self.collected += 1
            moved += 1
        while self.submitted < self.samples and (inputs := self._of(self.outgoing[HOST], self.submitted)):
            if not all(ring.posted > self.submitted for ring in inputs):
                break
            for ring in inputs:
                ring.sent += ring.edge.stride
            self.submitted += 1
            moved += 1
        return moved

    @staticmethod
    def _of(rings: Sequence[_Ring], sample: int) -> list[_Ring]:
        """Those of the rings that carry a sample."""
        return [ring for ring in rings if ring.edge.carries(sample)]

    def _advance(self, worker: _Worker) -> int:
        """Carry out instructions of one device until one has to wait; returns how many."""
        begin = worker.at
        while worker.at < len(worker.steps):
            step = worker.step
            where = f"device {worker.device.device}, stage {step.stage}, sample {step.sample}"
            if step.op is Op.FORWARD:
                waits = self._forward(worker.device, step, where)
            elif step.op is Op.SEND:
                waits = self._send(worker.device, step, where)
            else:
                waits = self._receive(step, where)
            if waits is not None:
                worker.edge = waits.edge
                need = "a message" if step.op is Op.FORWARD else "a posted slot"
                worker.waits = f"{where}: {step} waits for {need} on edge {waits.edge.name}"
                break
            worker.at += 1
        return worker.at - begin

    def _receive(self, step: Instruction, where: str) -> None:
        ring = self.rings[step.edge]
        slots, before = ring.edge.slots, step.sample - ring.edge.reach
        if step.sample != ring.posted:
            raise ProgramError(
                f"{where}: {step} posts message {step.sample} on edge {step.edge} when {ring.posted} is due; "
                "messages are posted in order, each once"
            )
        if ring.used <= before:
            raise ProgramError(
                f"{where}: {step} overruns edge {step.edge}: message {ring.used} is not yet consumed, and the ring "
                f"has {slots} slots"
            )
        for sibling in self._of(self.outgoing[step.stage], before):
            # What a stage sends may be a view of what it received.
            if 0 <= before and sibling.sent <= before:
                raise ProgramError(
                    f"{where}: {step} gives away the slot of message {before} on edge {step.edge} before "
                    f"that sample is sent on edge {sibling.edge.name}"
                )
        ring.posted += ring.edge.stride

    def _forward(self, device: DeviceProgram, step: Instruction, where: str) -> _Ring | None:
        due = self.computed[device.device, step.stage]
        if step.sample < due:
            raise ProgramError(f"{where}: {step} computes the sample twice")
        if step.sample > due:
            raise ProgramError(f"{where}: {step} skips sample {due}")
        incoming = self._of(self.incoming[step.stage], step.sample)
        for ring in incoming:
            if ring.posted <= step.sample:
                raise ProgramError(f"{where}: {step} uses message {step.sample} of edge {ring.edge.name}, never posted")
        for ring in incoming:
            if ring.sent <= step.sample:
                return ring
        for ring in incoming:
            ring.used += ring.edge.stride
        self.computed[device.device, step.stage] += device.replicas
        return None

    def _send(self, device: DeviceProgram, step: Instruction, where: str) -> _Ring | None:
        ring = self.rings[step.edge]
        if step.sample != ring.sent:
            raise ProgramError(
                f"{where}: {step} sends message {step.sample} on edge {step.edge} when {ring.sent} is due; "
                "messages are sent in order, each once"
            )
        due = self.computed[device.device, step.stage]
        if due <= step.sample:
            raise ProgramError(f"{where}: {step} on edge {step.edge} comes before the forward that makes it")
        if due > step.sample + device.replicas:
            raise ProgramError(f"{where}: {step} on edge {step.edge} comes after the next forward; its values are gone")
        if ring.posted <= step.sample:
            return ring
        ring.sent += ring.edge.stride
        return None


__all__ = ["Verify"]
