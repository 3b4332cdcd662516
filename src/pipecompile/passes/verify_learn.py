"""Verify learning on a stream: refuse a program that could hang, lose a gradient, overrun a ring or learn later than said."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.errors import ProgramError
from pipecompile.ir.learning import Rule
from pipecompile.ir.program import HOST, Edge, Instruction, Op, Program


@dataclass(frozen=True)
class VerifyLearn:
    """Check an open program by carrying out streams of several lengths up to ``samples``, without data.

    Each stage computes each sample once forward and, where it learns, once backward, in order, and
    updates once for the samples of an update, right after the last of them; a forward finds exactly
    the updates done that the rule says; a message is sent when it is made, and a slot posted again
    when nothing in it is needed any more. What stays in flight does not depend on how long the
    stream is, so longer ones need no test. ``samples``
    None is enough to use every ring twice over.
    """

    rule: Rule
    samples: int | None = None

    def apply(self, program: Program) -> Program:
        """The program, unchanged.

        Raises:
            ProgramError: naming device, instruction and edge, if the program breaks a rule.
        """
        _structure(program)
        stages = sum(len(device.stages) for device in program.devices)
        longest = self.samples
        if longest is None:
            deepest = max((edge.slots for edge in program.edges), default=1)
            longest = 2 * self.rule.ahead(0, stages) + 2 * self.rule.accumulate + 2 * deepest + 1
        # Short streams, whose end may fall into the warm-up; a group more or less; one in the steady state.
        ahead, group = self.rule.ahead(0, stages), self.rule.accumulate
        short = {*range(ahead + 3), *range(group - 1, group + 2), 2 * group + 1}
        for samples in (*sorted(n for n in short if n < longest), longest):
            _Machine(program, self.rule, samples).run()
        return program


def _structure(program: Program) -> None:
    owner = {stage: device.device for device in program.devices for stage in device.stages}
    if sorted(owner) != list(range(len(program.devices))):
        raise ProgramError(f"learning takes one stage a device, got {[device.stages for device in program.devices]}")
    edges: dict[str, Edge] = {}
    for edge in program.edges:
        if edge.name in edges:
            raise ProgramError(f"there are two edges {edge.name}: one carries all values between its ends")
        edges[edge.name] = edge
        if len(edge.values) != len(edge.specs) or edge.slots < 1:
            raise ProgramError(f"edge {edge.name} has {edge.slots} slots, {len(edge.values)} values, {len(edge.specs)} specs")
        if any(stage not in owner and stage != HOST for stage in (edge.source, edge.target)):
            raise ProgramError(f"edge {edge.name} ends at a stage that is on no device")
    for device in program.devices:
        for step in (*device.warm_up, *device.body, *device.drain):
            where = f"device {device.device}: {step}"
            if step.stage not in device.stages:
                raise ProgramError(f"{where} is an instruction on the wrong device, which has stages {device.stages}")
            if step.op in (Op.RECV, Op.SEND):
                edge = edges.get(step.edge)
                if edge is None:
                    raise ProgramError(f"{where}: there is no edge {step.edge!r}")
                if step.stage != (edge.source if step.op is Op.SEND else edge.target):
                    raise ProgramError(f"{where}: stage {step.stage} is at the other end of edge {edge.name}")


@dataclass
class _Ring:
    edge: Edge
    posted: int = 0
    sent: int = 0


@dataclass
class _Stage:
    """How many samples a stage has computed each way, and how many updates it has made."""

    learns: bool
    forward: int = 0
    backward: int = 0
    updates: int = 0


class _Machine:
    """Carries one stream out, each device as far as it gets, until all are done or none can go on."""

    def __init__(self, program: Program, rule: Rule, samples: int) -> None:
        self.program, self.rule, self.count = program, rule, samples
        self.orders = program.unroll(samples)
        self.stages = {
            d.stages[0]: _Stage(any(step.op is Op.BACKWARD for step in d.body)) for d in program.devices
        }
        self.rings = {edge.name: _Ring(edge) for edge in program.edges}

    def run(self) -> None:
        """Carry everything out; see :class:`VerifyLearn`."""
        at = [0] * len(self.orders)
        moved = True
        waits: dict[int, str] = {}
        while moved:
            moved = self._host()
            for i, (device, order) in enumerate(zip(self.program.devices, self.orders, strict=True)):
                waits.pop(i, None)
                while at[i] < len(order):
                    reason = self._carry_out(order[at[i]], f"device {device.device}: {order[at[i]]}")
                    if reason:
                        waits[i] = reason
                        break
                    at[i] += 1
                    moved = True
        if waits:
            raise ProgramError(f"deadlock in a stream of {self.count} samples: {'; '.join(waits.values())}")
        self._complete()

    def _host(self) -> bool:
        """The caller hands over all it can, and takes every result at once."""
        moved = False
        for ring in self.rings.values():
            if ring.edge.source == HOST and ring.sent < min(ring.posted, self.count):
                ring.sent, moved = min(ring.posted, self.count), True
            if ring.edge.target == HOST:
                ring.posted = ring.sent + ring.edge.slots
        return moved

    def _carry_out(self, step: Instruction, where: str) -> str:
        """Do one instruction, or say what it waits for."""
        stage, i = self.stages[step.stage], step.sample
        match step.op:
            case Op.RECV:
                return self._receive(self.rings[step.edge], i, where)
            case Op.SEND:
                return self._send(self.rings[step.edge], i, where)
            case Op.STEP:
                self._update(stage, i, where)
                return ""
            case Op.FORWARD | Op.BACKWARD:
                return self._compute(step, stage, where)
            case _:
                raise ProgramError(f"{where}: learning has no such instruction")

    def _compute(self, step: Instruction, stage: _Stage, where: str) -> str:
        i, back = step.sample, step.op is Op.BACKWARD
        done = stage.backward if back else stage.forward
        if i != done:
            raise ProgramError(f"{where} comes when the {'backward' if back else 'forward'} of sample {done} is due")
        if back and stage.forward <= i:
            raise ProgramError(f"{where} comes before the forward of sample {i}")
        reads = [r for r in self.rings.values() if r.edge.target == step.stage and r.edge.backward == back]
        for ring in reads:
            if ring.posted <= i:
                raise ProgramError(f"{where} uses message {i} of edge {ring.edge.name}, never posted")
            if ring.sent <= i:
                return f"{where} waits for message {i} on edge {ring.edge.name}"
        if back:
            stage.backward += 1
            return ""
        if stage.learns:
            self._check_delay(step.stage, stage, i, where)
        stage.forward += 1
        return ""

    def _check_delay(self, number: int, stage: _Stage, sample: int, where: str) -> None:
        """The updates done when a forward runs are those the rule says."""
        stages, rule = len(self.stages), self.rule
        if rule.updates == "2bw" and stages > 1:
            group = sample // rule.accumulate
            if not max(0, group - 1) <= stage.updates <= group:
                raise ProgramError(f"{where} reads version {max(0, group - 1)}, but {stage.updates} updates are done")
        elif stage.updates != rule.version(sample, number, stages):
            wanted = rule.version(sample, number, stages)
            raise ProgramError(f"{where} comes after {stage.updates} updates; the rule says {wanted}")

    def _needed(self, edge: Edge) -> int:
        """The first message of an edge that is still needed."""
        stage = self.stages[edge.target]
        if edge.backward or not stage.learns:
            return stage.backward if edge.backward else stage.forward
        if self.rule.updates == "sideways" and self.rule.ahead(edge.target, len(self.stages)):
            return stage.forward - 1
        return stage.backward

    def _receive(self, ring: _Ring, i: int, where: str) -> str:
        if i != ring.posted:
            raise ProgramError(f"{where} posts a message when {ring.posted} is due; each is posted once, in order")
        if i - max(0, self._needed(ring.edge)) >= ring.edge.slots:
            raise ProgramError(
                f"{where} overruns the ring: message {self._needed(ring.edge)} is still needed and it has "
                f"{ring.edge.slots} slots"
            )
        ring.posted += 1
        return ""

    def _send(self, ring: _Ring, i: int, where: str) -> str:
        if i != ring.sent:
            raise ProgramError(f"{where} sends a message when {ring.sent} is due; each is sent once, in order")
        source = self.stages[ring.edge.source]
        made = source.backward if ring.edge.backward else source.forward
        if made != i + 1:
            raise ProgramError(f"{where} sends what is {'not yet made' if made <= i else 'gone'}")
        if ring.posted <= i:
            return f"{where} waits for a posted slot"
        ring.sent += 1
        return ""

    def _update(self, stage: _Stage, first: int, where: str) -> None:
        if first != stage.updates * self.rule.accumulate:
            due = stage.updates * self.rule.accumulate
            raise ProgramError(f"{where} comes when the update that begins with sample {due} is due")
        if stage.backward != min(first + self.rule.accumulate, self.count):
            raise ProgramError(f"{where} comes after {stage.backward} backwards; its samples begin with {first}")
        stage.updates += 1

    def _complete(self) -> None:
        groups = -(-self.count // self.rule.accumulate)
        for number, stage in self.stages.items():
            where = f"stage {number}, in a stream of {self.count} samples,"
            for done, what in ((stage.forward, "forward"), (stage.backward, "backward")):
                if done < self.count and (stage.learns or what == "forward"):
                    raise ProgramError(f"{where} never computes the {what} of sample {done}")
            if stage.learns and stage.updates < groups:
                raise ProgramError(f"{where} never makes update {stage.updates}")
        for ring in self.rings.values():
            if ring.sent < self.count:
                raise ProgramError(f"edge {ring.edge.name}: message {ring.sent} is never sent")


__all__ = ["VerifyLearn"]
