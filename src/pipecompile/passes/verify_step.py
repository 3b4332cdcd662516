"""Verify a training step: refuse one that could hang, use a value too early, lose a gradient or overrun a ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipecompile.errors import ProgramError
from pipecompile.ir.program import COMPUTE, HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.training import chain_edges

_BACKWARD = (Op.BACKWARD, Op.BACKWARD_INPUT)
_WEIGHT = (Op.BACKWARD, Op.BACKWARD_WEIGHT)


@dataclass(frozen=True)
class VerifyStep:
    """Check a closed program by carrying it out without data.

    A compute-only program is checked as a chain of stages. Beyond what a stream must keep to: each
    stage computes each micro-batch exactly once in each direction and in order, weight gradients
    after input gradients, nothing after its STEP; a STEP comes when every gradient of its stage is
    there, reduced ones included; and a slot is posted again only when nothing in it is needed for
    a backward any more.
    """

    def apply(self, program: Program) -> Program:
        """The program, unchanged.

        Raises:
            ProgramError: naming device, instruction and edge, if the program breaks a rule.
        """
        _structure(program)
        _Machine(program).run()
        return program


def _structure(program: Program) -> None:
    owner: dict[int, int] = {}
    for device in program.devices:
        if device.body or device.drain:
            raise ProgramError(f"device {device.device} has a loop body: a training step is closed")
        for stage in device.stages:
            if stage in owner:
                raise ProgramError(f"stage {stage} is on device {owner[stage]} and on device {device.device}")
            owner[stage] = device.device
    edges: dict[str, Edge] = {}
    for edge in program.edges:
        if edge.name in edges:
            raise ProgramError(f"there are two edges {edge.name}: one carries all values between its ends")
        edges[edge.name] = edge
        within = owner.get(edge.source) == owner.get(edge.target)
        for stage in (edge.source, edge.target):
            if stage not in owner and stage != HOST:
                raise ProgramError(f"edge {edge.name} ends at stage {stage}, which is on no device")
        if within != (edge.slots == 0):
            raise ProgramError(f"edge {edge.name} has {edge.slots} slots: none within a device, else at least one")
        if len(edge.values) != len(edge.specs):
            raise ProgramError(f"edge {edge.name} has {len(edge.values)} values, but {len(edge.specs)} specs")
    for device in program.devices:
        for step in device.warm_up:
            _place(step, device, edges)


def _place(step: Instruction, device: DeviceProgram, edges: dict[str, Edge]) -> None:
    where = f"device {device.device}: {step}"
    if step.stage not in device.stages:
        raise ProgramError(f"{where} is an instruction on the wrong device, which has stages {device.stages}")
    if step.op in COMPUTE or step.op is Op.STEP:
        if step.edge:
            raise ProgramError(f"{where}: it uses all edges of its stage and names none")
        return
    if step.edge not in edges:
        raise ProgramError(f"{where}: there is no edge {step.edge!r}")
    edge = edges[step.edge]
    if step.stage != (edge.source if step.op is Op.SEND else edge.target):
        raise ProgramError(f"{where}: stage {step.stage} is at the other end of edge {edge.name}")
    if edge.slots == 0:
        raise ProgramError(f"{where}: nothing travels on edge {edge.name}, whose ends are on one device")
    if step.op is Op.REDUCE and not edge.tied:
        raise ProgramError(f"{where}: edge {edge.name} carries no gradients of tied weights")


@dataclass
class _Ring:
    edge: Edge
    posted: int = 0
    sent: int = 0
    released: int = 0


@dataclass
class _Stage:
    """How many micro-batches a stage has computed, in each direction."""

    device: int
    trains: bool
    forward: int = 0
    backward: int = 0
    weight: int = 0
    again: int = 0
    recomputes: bool = False
    reduced: set[str] = field(default_factory=set[str])
    stepped: bool = False


class _Machine:
    """Carries a step out, each device as far as it gets, until all are done or none can go on."""

    def __init__(self, program: Program) -> None:
        self.program, self.count = program, program.micro_batches
        backward = {s.stage for d in program.devices for s in d.warm_up if s.op in (*_BACKWARD, *_WEIGHT)}
        again = {s.stage for d in program.devices for s in d.warm_up if s.op is Op.RECOMPUTE}
        self.stages = {
            s: _Stage(d.device, s in backward, recomputes=s in again) for d in program.devices for s in d.stages
        }
        self.rings = {edge.name: _Ring(edge) for edge in program.edges or chain_edges(program)}

    def run(self) -> None:
        """Carry everything out; see :class:`VerifyStep`."""
        at = {device.device: 0 for device in self.program.devices}
        blocked: dict[int, str] = {}
        moved = True
        while moved:
            moved = self._submit()
            for device in self.program.devices:
                while at[device.device] < len(device.warm_up):
                    step = device.warm_up[at[device.device]]
                    waits = self._carry_out(step, f"device {device.device}: {step}")
                    blocked.pop(device.device, None)
                    if waits:
                        blocked[device.device] = waits
                        break
                    at[device.device] += 1
                    moved = True
        if blocked:
            raise ProgramError(f"deadlock: {'; '.join(blocked.values())}")
        self._complete()

    def _submit(self) -> bool:
        """What the caller does: hand over inputs, take every result, and only then send gradients of them."""
        moved = False
        results = [ring for ring in self.rings.values() if ring.edge.target == HOST]
        for ring in results:
            ring.posted = self.count
        for ring in self.rings.values():
            if ring.edge.kind == "gradient" and any(result.sent < self.count for result in results):
                continue
            if ring.edge.source == HOST and ring.sent < min(ring.posted, self.count):
                ring.sent = min(ring.posted, self.count)
                moved = True
        return moved

    def _carry_out(self, step: Instruction, where: str) -> str:
        """Do one instruction, or say what it waits for."""
        if self.stages[step.stage].stepped and step.op not in (Op.STEP, Op.REDUCE, Op.SEND):
            raise ProgramError(f"{where} comes after the weights of stage {step.stage} were updated")
        match step.op:
            case Op.RECV:
                return self._receive(step, where)
            case Op.SEND:
                return self._send(step, where)
            case Op.REDUCE:
                return self._reduce(step, where)
            case Op.STEP:
                return self._update(step, where)
            case _:
                return self._compute(step, where)

    def _compute(self, step: Instruction, where: str) -> str:
        stage, i = self.stages[step.stage], step.sample
        for ops, done, kind in (
            ((Op.FORWARD,), stage.forward, "forward"),
            (_BACKWARD, stage.backward, "backward"),
            (_WEIGHT, stage.weight, "weight gradients"),
            ((Op.RECOMPUTE,), stage.again, "second forward"),
        ):
            if step.op in ops and i != done:
                raise ProgramError(f"{where} comes when the {kind} of micro-batch {done} is due")
        if step.op is Op.RECOMPUTE and (stage.forward <= i or stage.backward != i):
            raise ProgramError(f"{where} comes before the first forward, or not right before its backward")
        if step.op in _BACKWARD and stage.recomputes and stage.again <= i:
            raise ProgramError(f"{where} comes before the second forward of micro-batch {i}")
        if step.op in _BACKWARD and stage.forward <= i:
            raise ProgramError(f"{where} comes before the forward of micro-batch {i}")
        if step.op is Op.BACKWARD_WEIGHT and stage.backward <= i:
            raise ProgramError(f"{where} comes before the input gradients of micro-batch {i}")
        waits = step.op not in (Op.BACKWARD_WEIGHT, Op.RECOMPUTE)
        reads = self._incoming(step.stage, step.op is not Op.FORWARD) if waits else []
        for ring in reads:
            if ring.edge.slots and ring.posted <= i:
                raise ProgramError(f"{where} uses message {i} of edge {ring.edge.name}, never posted")
        for ring in reads:
            if (ring.sent if ring.edge.slots else self._made(ring.edge)) <= i:
                return f"{where} waits for message {i} on edge {ring.edge.name}"
        stage.forward += step.op is Op.FORWARD
        stage.backward += step.op in _BACKWARD
        stage.weight += step.op in _WEIGHT
        stage.again += step.op is Op.RECOMPUTE
        if step.op in _WEIGHT or not stage.trains:
            for ring in self._incoming(step.stage, True) + self._incoming(step.stage, False):
                ring.released = i + 1
        return ""

    def _incoming(self, stage: int, backward: bool) -> list[_Ring]:
        return [
            r for r in self.rings.values()
            if r.edge.target == stage and not r.edge.tied and r.edge.backward == backward
        ]  # fmt: skip

    def _made(self, edge: Edge) -> int:
        """How many messages the source of an edge has computed."""
        if edge.tied:
            return int(all(stage.weight == self.count for stage in self._users(edge)))
        source = self.stages[edge.source]
        return source.backward if edge.backward else source.forward

    def _users(self, edge: Edge) -> Sequence[_Stage]:
        """Stages whose weight gradients may be in a message of summed ones: all of the device that train."""
        device = self.stages[edge.source].device
        return [stage for stage in self.stages.values() if stage.device == device and stage.trains]

    def _receive(self, step: Instruction, where: str) -> str:
        ring = self.rings[step.edge]
        if step.sample != ring.posted:
            raise ProgramError(f"{where} posts a message when {ring.posted} is due; each is posted once, in order")
        if step.sample - ring.released >= ring.edge.slots:
            raise ProgramError(
                f"{where} overruns the ring: message {ring.released} is still needed and it has {ring.edge.slots} slots"
            )
        ring.posted += 1
        return ""

    def _send(self, step: Instruction, where: str) -> str:
        ring = self.rings[step.edge]
        if step.sample != ring.sent:
            raise ProgramError(f"{where} sends a message when {ring.sent} is due; each is sent once, in order")
        if self._made(ring.edge) <= step.sample:
            raise ProgramError(f"{where} comes before what it sends is computed")
        if not ring.edge.tied and self._made(ring.edge) > step.sample + 1:
            raise ProgramError(f"{where} comes after the next micro-batch is computed; its values are gone")
        if ring.posted <= step.sample:
            return f"{where} waits for a posted slot"
        ring.sent += 1
        return ""

    def _reduce(self, step: Instruction, where: str) -> str:
        ring = self.rings[step.edge]
        if ring.posted < 1:
            raise ProgramError(f"{where} uses a message never posted")
        if ring.sent < 1:
            return f"{where} waits for the gradients of tied weights"
        if step.edge in self.stages[step.stage].reduced:
            raise ProgramError(f"{where} adds the same gradients twice")
        self.stages[step.stage].reduced.add(step.edge)
        ring.released = 1
        return ""

    def _update(self, step: Instruction, where: str) -> str:
        stage = self.stages[step.stage]
        if stage.stepped:
            raise ProgramError(f"{where} updates the weights twice")
        tied = [ring.edge for ring in self.rings.values() if ring.edge.tied and ring.edge.target == step.stage]
        for other in (step.stage, *(edge.source for edge in tied if not edge.slots)):
            if self.stages[other].trains and self.stages[other].weight < self.count:
                raise ProgramError(f"{where} comes before the weight gradients of stage {other} are complete")
        for edge in tied:
            if edge.slots and edge.name not in stage.reduced:
                raise ProgramError(f"{where} comes before the gradients on edge {edge.name} are added")
        stage.stepped = True
        return ""

    def _complete(self) -> None:
        for number, stage in self.stages.items():
            where = f"device {stage.device}: stage {number}"
            if stage.forward < self.count:
                raise ProgramError(f"{where} never computes micro-batch {stage.forward}")
            if stage.trains and stage.backward < self.count:
                raise ProgramError(f"{where} never computes the backward of micro-batch {stage.backward}")
            if stage.trains and stage.weight < self.count:
                raise ProgramError(f"{where} never computes the weight gradients of micro-batch {stage.weight}")
        for ring in self.rings.values():
            wanted = 1 if ring.edge.tied else self.count
            if ring.edge.slots and ring.sent < wanted:
                raise ProgramError(f"edge {ring.edge.name}: message {ring.sent} is never sent")


__all__ = ["VerifyStep"]
