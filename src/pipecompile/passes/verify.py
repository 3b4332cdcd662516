"""Verify: refuse a Program that could hang, mix up samples, use a value too early or overrun a ring."""

from __future__ import annotations

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
    run for every ring to come round twice. That settles it for any number: each turn of a body
    moves every edge by one message, and since a message must be posted no later than in the turn
    that uses it, nothing waits for a later turn; so a deadlock lies within one turn, and every
    turn after the warm-up is like the one before.
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
    owner: dict[int, int] = {}
    for device in program.devices:
        for stage in device.stages:
            if stage in owner:
                raise ProgramError(f"stage {stage} is on device {owner[stage]} and on device {device.device}")
            owner[stage] = device.device
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
        if edge.slots < 1 or not 0 <= edge.ahead < edge.slots:
            raise ProgramError(f"edge {edge.name} is {edge.ahead} ahead with {edge.slots} slots: it needs one more")
        if len(edge.values) != len(edge.specs):
            raise ProgramError(f"edge {edge.name} has {len(edge.values)} values, but {len(edge.specs)} specs")
    for device in program.devices:
        steps = (*device.warm_up, *device.body, *device.drain)
        for step in steps:
            _place(step, device, edges, owner)
        sent = {step.edge for step in steps if step.op is Op.SEND}
        for edge in program.edges:
            if edge.source in device.stages and edge.name not in sent:
                raise ProgramError(f"device {device.device}: stage {edge.source} never sends on edge {edge.name}")


def _place(step: Instruction, device: DeviceProgram, edges: Mapping[str, Edge], owner: Mapping[int, int]) -> None:
    where = f"device {device.device}: {step}"
    if step.stage not in device.stages:
        place = f"device {owner[step.stage]}" if step.stage in owner else "no device"
        raise ProgramError(f"{where} is an instruction on the wrong device: stage {step.stage} is on {place}")
    if step.op is Op.FORWARD:
        if step.edge:
            raise ProgramError(f"{where}: a forward reads all edges of its stage and names none")
        return
    if step.edge not in edges:
        raise ProgramError(f"{where}: there is no edge {step.edge!r}")
    edge = edges[step.edge]
    if step.stage != (edge.source if step.op is Op.SEND else edge.target):
        end = "sent by" if step.op is Op.SEND else "received by"
        raise ProgramError(f"{where}: edge {edge.name} is not {end} stage {step.stage}")


def _values(program: Program, graph: ModelGraph, plan: Plan) -> None:
    """What each stage reads reaches it, and what it sends it makes."""
    device_of = {stage: device.device for device in program.devices for stage in device.stages}
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
            to_host.update(edge.values)
        else:
            incoming[edge.target].update(edge.values)
    for stage in plan.stages:
        where = f"device {stage.device}, stage {stage.index}"
        if device_of.get(stage.index) != stage.device:
            raise ProgramError(f"{where}: the program has this stage on device {device_of.get(stage.index)}")
        for layer in (graph.layers[i] for i in stage.layers):
            for value in layer.reads:
                if value not in incoming[stage.index] | makes[stage.index] | graph.free:
                    raise ProgramError(f"{where}: layer {layer.name} reads {value!r}, which no edge brings")
    for name in results:
        if to_host[name] != 1:
            raise ProgramError(f"the caller gets result {name!r} {to_host[name]} times: exactly one edge must bring it")


@dataclass
class _Ring:
    """How many messages of an edge have been posted, sent and consumed."""

    edge: Edge
    posted: int = 0
    sent: int = 0
    used: int = 0


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
    """Carries a program out, each device as far as it gets, until all are done or none can go on."""

    program: Program
    samples: int = 0
    submitted: int = 0
    rings: dict[str, _Ring] = field(default_factory=dict[str, _Ring])
    incoming: dict[int, list[_Ring]] = field(default_factory=lambda: defaultdict(list))
    outgoing: dict[int, list[_Ring]] = field(default_factory=lambda: defaultdict(list))
    computed: Counter[int] = field(default_factory=Counter[int])

    def run(self) -> None:
        program = self.program
        stages = [stage for device in program.devices for stage in device.stages]
        self.samples = 2 * max((edge.slots for edge in program.edges), default=0) + len(stages) + 3
        if not any(device.body for device in program.devices):
            steps = [step for device in program.devices for step in device.warm_up]
            self.samples = 1 + max((step.sample for step in steps), default=-1)
        for edge in program.edges:
            ring = self.rings[edge.name] = _Ring(edge, posted=edge.slots if edge.target == HOST else 0)
            self.incoming[edge.target].append(ring)
            self.outgoing[edge.source].append(ring)
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
                if self.computed[stage] < self.samples:
                    raise ProgramError(
                        f"device {device.device}: stage {stage} never computes sample {self.computed[stage]}"
                    )
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
        inputs, results = self.outgoing[HOST], self.incoming[HOST]
        while results and all(ring.sent > ring.used for ring in results):
            for ring in results:
                ring.used += 1
                ring.posted += 1
            moved += 1
        while inputs and self.submitted < self.samples and all(r.posted > self.submitted for r in inputs):
            for ring in inputs:
                ring.sent += 1
            self.submitted += 1
            moved += 1
        return moved

    def _advance(self, worker: _Worker) -> int:
        """Carry out instructions of one device until one has to wait; returns how many."""
        begin = worker.at
        while worker.at < len(worker.steps):
            step = worker.step
            where = f"device {worker.device.device}, stage {step.stage}, sample {step.sample}"
            if step.op is Op.FORWARD:
                waits = self._forward(step, where)
            elif step.op is Op.SEND:
                waits = self._send(step, where)
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
        slots = ring.edge.slots
        if step.sample != ring.posted:
            raise ProgramError(
                f"{where}: {step} posts message {step.sample} on edge {step.edge} when {ring.posted} is due; "
                "messages are posted in order, each once"
            )
        if step.sample - ring.used >= slots:
            raise ProgramError(
                f"{where}: {step} overruns edge {step.edge}: message {ring.used} is not yet consumed, and the ring "
                f"has {slots} slots"
            )
        for sibling in self.outgoing[step.stage]:
            # What a stage sends may be a view of what it received.
            if sibling.sent <= step.sample - slots:
                raise ProgramError(
                    f"{where}: {step} gives away the slot of message {step.sample - slots} on edge {step.edge} before "
                    f"that sample is sent on edge {sibling.edge.name}"
                )
        ring.posted += 1

    def _forward(self, step: Instruction, where: str) -> _Ring | None:
        due = self.computed[step.stage]
        if step.sample < due:
            raise ProgramError(f"{where}: {step} computes the sample twice")
        if step.sample > due:
            raise ProgramError(f"{where}: {step} skips sample {due}")
        incoming = self.incoming[step.stage]
        for ring in incoming:
            if ring.posted <= step.sample:
                raise ProgramError(f"{where}: {step} uses message {step.sample} of edge {ring.edge.name}, never posted")
        for ring in incoming:
            if ring.sent <= step.sample:
                return ring
        for ring in incoming:
            ring.used += 1
        self.computed[step.stage] += 1
        return None

    def _send(self, step: Instruction, where: str) -> _Ring | None:
        ring = self.rings[step.edge]
        if step.sample != ring.sent:
            raise ProgramError(
                f"{where}: {step} sends message {step.sample} on edge {step.edge} when {ring.sent} is due; "
                "messages are sent in order, each once"
            )
        if self.computed[step.stage] <= step.sample:
            raise ProgramError(f"{where}: {step} on edge {step.edge} comes before the forward that makes it")
        if self.computed[step.stage] > step.sample + 1:
            raise ProgramError(f"{where}: {step} on edge {step.edge} comes after the next forward; its values are gone")
        if ring.posted <= step.sample:
            return ring
        ring.sent += 1
        return None


__all__ = ["Verify"]
