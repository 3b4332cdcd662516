"""Run a training step on paper: the closed program that verify, codegen and report read too."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Cluster, Link
from pipecompile.ir.program import COMPUTE, HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.timeline import Activity, Event, Timeline
from pipecompile.ir.training import UNIT, StageCost, chain_edges
from pipecompile.simulate.engine import Actor, Busy, Engine, Moment

_FREE = Link(0.0, float("inf"))


def simulate_step(
    program: Program,
    costs: Sequence[StageCost],
    link: Link = _FREE,
    *,
    cluster: Cluster | None = None,
    throttle: Mapping[str, Link] | None = None,
) -> Timeline:
    """Predict when each device does what in one training step.

    A program without edges is taken to be a chain of stages between which nothing travels.
    Otherwise the rules are those of :func:`pipecompile.simulate.simulate`: a message costs its
    receiver ``link.latency`` and its sender ``link.seconds(bytes)``, once the slot is posted.

    Args:
        program: a closed program.
        costs: per stage what its work takes.
        link: what a message costs the device at either end.
        cluster: the cores of the devices; without it each device has its own.
        throttle: edge name -> a slower link that delivers one message at a time.

    Returns:
        A timeline of origin ``simulated`` whose only finish is the end of the step.

    Raises:
        ProgramError: if the program comes to a halt before its end.
    """
    return _Step(program, costs, link, cluster, throttle or {}).timeline()


def step_ticks(program: Program) -> Timeline:
    """The timeline of a step in unit time: F, B and W take one second each, a whole backward two."""
    count = 1 + max((stage for device in program.devices for stage in device.stages), default=-1)
    return simulate_step(program, [UNIT] * count)


def bubble(timeline: Timeline) -> float:
    """The fraction of the step in which devices neither compute nor update: 0.0 to 1.0."""
    work = [e for e in timeline.events if e.activity in COMPUTE or e.activity == "STEP"]
    end = max((event.end for event in work), default=0.0)
    devices = len({event.device for event in work})
    return 1.0 - sum(event.end - event.start for event in work) / (devices * end) if end else 0.0


def step_table(timeline: Timeline, tick: float = 1.0) -> str:
    """One row a device, one column a tick: ``0F2`` stage 0 computes micro-batch 2; a dot is a bubble.

    What takes longer goes on in ``~``; a whole backward is drawn as a ``B`` that does.
    """
    rows: dict[int, dict[int, str]] = {}
    for event in timeline.events:
        if event.activity in COMPUTE:
            row = rows.setdefault(event.device, {})
            word = f"{event.stage}{event.activity[0]}{event.sample}"
            first, last = round(event.start / tick), round(event.end / tick)
            row[first] = word
            row.update((column, "~") for column in range(first + 1, last))
    columns = 1 + max((column for row in rows.values() for column in row), default=-1)
    width = 1 + max((len(word) for row in rows.values() for word in row.values()), default=1)
    return "\n".join(
        f"dev {device}" + "".join(row.get(column, ".").rjust(width) for column in range(columns))
        for device, row in sorted(rows.items())
    )


class _Step:
    """One simulated step."""

    def __init__(
        self,
        program: Program,
        costs: Sequence[StageCost],
        link: Link,
        cluster: Cluster | None,
        throttle: Mapping[str, Link],
    ) -> None:
        self._program, self._costs, self._link, self._throttle = program, costs, link, throttle
        self._edges = {edge.name: edge for edge in program.edges or chain_edges(program)}
        self._device = {stage: device.device for device in program.devices for stage in device.stages}
        self._engine = Engine()
        self._events: list[Event] = []
        self._moments: dict[tuple[str, str, int], Moment] = {}
        self._busy_until: dict[str, float] = {}
        cores = {} if cluster is None else {i: device.core for i, device in enumerate(cluster.devices)}
        self._core: dict[int, Hashable] = {
            device: ("device", device) if cores.get(device) is None else cores[device]
            for device in self._device.values()
        }

    def timeline(self) -> Timeline:
        """Let everyone run."""
        actors = [self._work(device) for device in self._program.devices]
        actors += [self._submit(edge) for edge in self._edges.values() if edge.source == HOST]
        for edge in self._edges.values():
            for sample in range(self._program.micro_batches if edge.target == HOST else 0):
                self._engine.fire(self._moment("a slot for message", edge, sample))
        waiting = self._engine.run(*actors)
        if waiting:
            raise ProgramError(f"the step stops for ever, waiting for {'; for '.join(waiting)}: see what Verify says")
        self._events.sort(key=lambda event: (event.start, event.end, event.device))
        end = max((event.end for event in self._events), default=0.0)
        return Timeline(tuple(self._events), "simulated", (end,), (end,))

    def _moment(self, what: str, edge: Edge, sample: int) -> Moment:
        return self._moments.setdefault((what, edge.name, sample), Moment(f"{what} {sample} on edge {edge.name}"))

    def _work(self, device: DeviceProgram) -> Actor:
        engine, core = self._engine, self._core[device.device]
        for step in device.warm_up:
            if step.op is Op.RECV:
                engine.fire(self._moment("a slot for message", self._edges[step.edge], step.sample))
                continue
            if step.op is Op.SEND:
                edge, begin = self._edges[step.edge], engine.now
                yield self._moment("a slot for message", edge, step.sample)
                self._note(step, "wait", begin, engine.now)
                start = yield Busy(core, self._link.seconds(edge.nbytes))
                self._note(step, "SEND", start, engine.now)
                self._deliver(edge, step.sample)
                continue
            for edge in self._reads(step):
                begin = engine.now
                yield self._moment("message", edge, step.sample)
                if edge.slots:
                    yield Busy(core, self._link.latency)
                self._note(step, "wait", begin, engine.now, edge.name)
            seconds = self._costs[step.stage].of(step.op)
            if step.op is Op.REDUCE:  # to add what came reads as much as to copy it
                seconds += self._link.seconds(self._edges[step.edge].nbytes) - self._link.latency
            start = yield Busy(core, seconds)
            self._note(step, step.op.value, start, engine.now)
            for edge in self._edges.values():
                if not edge.slots and edge.source == step.stage and self._made_by(edge, step.op):
                    engine.fire(self._moment("message", edge, step.sample))

    def _reads(self, step: Instruction) -> list[Edge]:
        """The edges whose message an instruction waits for."""
        into = [edge for edge in self._edges.values() if edge.target == step.stage]
        if step.op is Op.REDUCE:
            return [edge for edge in into if edge.name == step.edge]
        if step.op is Op.FORWARD:
            return [edge for edge in into if edge.forward]
        return [edge for edge in into if edge.backward and step.op in (Op.BACKWARD, Op.BACKWARD_INPUT)]

    def _made_by(self, edge: Edge, op: Op) -> bool:
        return op in (Op.BACKWARD, Op.BACKWARD_INPUT) if edge.backward else op is Op.FORWARD

    def _submit(self, edge: Edge) -> Actor:
        """The caller hands over all messages as fast as there are slots, without cost; gradients after all results."""
        count = self._program.micro_batches
        for result in self._edges.values():
            if edge.kind == "gradient" and result.target == HOST:
                yield self._moment("message", result, count - 1)
        for sample in range(count):
            yield self._moment("a slot for message", edge, sample)
            self._deliver(edge, sample)

    def _deliver(self, edge: Edge, sample: int) -> None:
        begin = end = self._engine.now
        if edge.name in self._throttle:
            begin = max(begin, self._busy_until.get(edge.name, 0.0))
            self._busy_until[edge.name] = end = begin + self._throttle[edge.name].seconds(edge.nbytes)
        self._engine.fire(self._moment("message", edge, sample), end)
        if end > begin:
            stage = edge.source if edge.source != HOST else edge.target
            self._events.append(Event(self._device[stage], stage, "TRANSFER", sample, begin, end, edge.name))

    def _note(self, step: Instruction, activity: Activity, start: float, end: float, edge: str = "") -> None:
        if end > start or (step.op in COMPUTE and activity == step.op.value):
            device = self._device[step.stage]
            self._events.append(Event(device, step.stage, activity, step.sample, start, end, edge or step.edge))


__all__ = ["bubble", "simulate_step", "step_table", "step_ticks"]
