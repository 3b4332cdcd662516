"""Run a Program on paper: the rules of the runtime, with costs in place of work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping

from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Link
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.timeline import Activity, Event, Timeline
from pipecompile.simulate.engine import Actor, Busy, Engine, Moment


def simulate(
    program: Program,
    plan: Plan,
    link: Link,
    samples: int,
    *,
    throttle: Mapping[str, Link] | None = None,
    host: Link | None = None,
    interval: float = 0.0,
) -> Timeline:
    """Predict when each device does what for a stream of ``samples`` samples.

    A stage pays ``link.latency`` for each message it receives (its waking up, within the event
    ``wait``) and ``link.seconds(bytes)`` for each it sends, once the receiver has posted the slot.
    It computes for its ``measured`` seconds, or for its ``seconds`` where it was not measured.
    Devices on one core take turns, a whole activity at a time.

    Args:
        program: a lowered program.
        plan: the seconds of its stages and the cores of its devices.
        link: what a message costs the device at either end.
        samples: how many samples the caller submits, each as soon as there is room for it.
        throttle: edge (``0>1``, all rings of its replicas) -> a slower link, which delivers a message
            only after its latency and bytes / bandwidth, one message at a time, without work for
            either device.
        host: what a message costs the caller at its end; None: nothing, as in the plan's loads.
        interval: least seconds from one submission to the next, for the latency under light load.

    Returns:
        A timeline of origin ``simulated``; the caller's own work is no event in it.

    Raises:
        ProgramError: if the program comes to a halt before the last sample, or ``throttle`` names
            an edge that does not exist.
    """
    run = _Run(program, plan, link, throttle or {}, host or Link(0.0, float("inf")))
    return run.timeline(samples, interval)


class _Ring:
    """Credits and arrivals of an edge as moments, by sample."""

    def __init__(self, edge: Edge, engine: Engine, throttle: Link | None) -> None:
        self.edge, self._engine, self._throttle, self._last = edge, engine, throttle, 0.0
        self._credits: dict[int, Moment] = {}
        self._arrivals: dict[int, Moment] = {}

    def credit(self, sample: int) -> Moment:
        """When the receiver has posted the message."""
        return self._credits.setdefault(sample, Moment(f"a slot for message {sample} on edge {self.edge.name}"))

    def arrival(self, sample: int) -> Moment:
        """When the message is there for the receiver."""
        return self._arrivals.setdefault(sample, Moment(f"message {sample} on edge {self.edge.name}"))

    def post(self, sample: int) -> None:
        """The receiver offers a slot."""
        self._engine.fire(self.credit(sample))

    def sent(self, sample: int) -> tuple[float, float]:
        """The sender has finished; returns when the message begins and ends to travel."""
        begin = end = self._engine.now
        if self._throttle is not None:
            # A slot is always posted before it is filled, so only the link itself can be later.
            begin = max(begin, self._last)
            self._last = end = begin + self._throttle.seconds(self.edge.nbytes)
        self._engine.fire(self.arrival(sample), end)
        return begin, end


class _Run:
    """One simulation."""

    def __init__(self, program: Program, plan: Plan, link: Link, throttle: Mapping[str, Link], host: Link) -> None:
        for name in throttle:
            program.rings(name)
        self._program, self._link, self._host = program, link, host
        self._engine = Engine()
        self._rings = {edge.name: _Ring(edge, self._engine, throttle.get(edge.between)) for edge in program.edges}
        self._incoming: defaultdict[int, list[_Ring]] = defaultdict(list)
        self._outgoing: defaultdict[int, list[_Ring]] = defaultdict(list)
        for ring in self._rings.values():
            self._incoming[ring.edge.target].append(ring)
            self._outgoing[ring.edge.source].append(ring)
        self._seconds = {s.index: s.seconds if s.measured is None else s.measured for s in plan.stages}
        self._devices: defaultdict[int, dict[int, int]] = defaultdict(dict)
        for device in program.devices:
            for stage in device.stages:
                self._devices[stage][device.replica] = device.device
        cores = {index: device.core for index, device in enumerate(plan.cluster.devices)}
        self._core: dict[int, Hashable] = {
            device.device: ("device", device.device) if cores.get(device.device) is None else cores[device.device]
            for device in program.devices
        }
        self._events: list[Event] = []
        self._submitted: list[float] = []
        self._finished: list[float] = []

    def timeline(self, samples: int, interval: float) -> Timeline:
        """Let everyone run; see :func:`simulate`."""
        steps = self._program.unroll(samples)
        actors = [self._work(device, own) for device, own in zip(self._program.devices, steps, strict=True)]
        waiting = self._engine.run(*actors, self._submit(samples, interval), self._collect(samples))
        if waiting:
            raise ProgramError(
                f"the program stops for ever after {len(self._finished)} of {samples} samples, "
                f"waiting for {'; for '.join(waiting)}: see what Verify says"
            )
        self._events.sort(key=lambda event: (event.start, event.end, event.device))
        latencies = tuple(end - begin for begin, end in zip(self._submitted, self._finished, strict=True))
        return Timeline(tuple(self._events), "simulated", latencies, tuple(self._finished))

    def _work(self, device: DeviceProgram, steps: Iterable[Instruction]) -> Actor:
        engine, core = self._engine, self._core[device.device]
        for step in steps:
            stage, sample = step.stage, step.sample
            if step.op is Op.RECV:
                self._rings[step.edge].post(sample)
            elif step.op is Op.FORWARD:
                for ring in self._of(self._incoming[stage], sample):
                    begin = engine.now
                    yield ring.arrival(sample)
                    yield Busy(core, self._link.latency)
                    self._note(stage, "wait", sample, begin, engine.now, ring.edge.name)
                start = yield Busy(core, self._seconds[stage])
                self._note(stage, "F", sample, start, engine.now)
            else:
                ring, begin = self._rings[step.edge], engine.now
                yield ring.credit(sample)
                self._note(stage, "wait", sample, begin, engine.now, step.edge)
                start = yield Busy(core, self._link.seconds(ring.edge.nbytes))
                self._note(stage, "SEND", sample, start, engine.now, step.edge)
                self._send(ring, sample)

    def _submit(self, samples: int, interval: float) -> Actor:
        for sample in range(samples):
            yield sample * interval
            # A sample goes to all its readers or to none, as in the runtime.
            rings = self._of(self._outgoing[HOST], sample)
            for ring in rings:
                yield ring.credit(sample)
            self._submitted.append(self._engine.now)
            for ring in rings:
                yield Busy("host", self._host.seconds(ring.edge.nbytes))
                self._send(ring, sample)

    def _collect(self, samples: int) -> Actor:
        for ring in self._incoming[HOST]:
            for turn in range(ring.edge.slots):
                ring.post(ring.edge.first + turn * ring.edge.stride)
        for sample in range(samples):
            rings = self._of(self._incoming[HOST], sample)
            for ring in rings:
                yield ring.arrival(sample)
            for ring in rings:
                yield Busy("host", self._host.seconds(ring.edge.nbytes))
                ring.post(sample + ring.edge.reach)
            self._finished.append(self._engine.now)

    @staticmethod
    def _of(rings: Iterable[_Ring], sample: int) -> list[_Ring]:
        """Those of the rings that carry a sample."""
        return [ring for ring in rings if ring.edge.carries(sample)]

    def _send(self, ring: _Ring, sample: int) -> None:
        begin, end = ring.sent(sample)
        stage = ring.edge.source if ring.edge.target == HOST else ring.edge.target
        self._note(stage, "TRANSFER", sample, begin, end, ring.edge.name)

    def _note(self, stage: int, activity: Activity, sample: int, start: float, end: float, edge: str = "") -> None:
        # Only what takes time is an event; computing always is, so that each sample shows up.
        if end > start or activity == "F":
            devices = self._devices[stage]
            self._events.append(Event(devices[sample % len(devices)], stage, activity, sample, start, end, edge))


__all__ = ["simulate"]
