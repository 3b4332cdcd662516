"""The numbers of a report: per stage, per edge and in all, predicted beside measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pipecompile.ir.package import Package
from pipecompile.ir.program import HOST
from pipecompile.ir.timeline import Timeline


@dataclass(frozen=True)
class Cost:
    """Seconds a stage spends on one sample, medians of the steady state.

    ``wait`` is all time in which it neither computes nor sends, so that the three make up ``period``:
    of each replica where there are several.
    """

    compute: float
    send: float
    wait: float

    @property
    def period(self) -> float:
        """Seconds a sample."""
        return self.compute + self.send + self.wait

    @property
    def busy(self) -> float:
        """Share of the time in which the stage works, 0 to 1."""
        return (self.compute + self.send) / self.period if self.period else 0.0


@dataclass(frozen=True)
class StageSummary:
    """One stage. ``alone`` is its compute timed alone after the cut, where that was done.

    Where it has replicas, ``device`` and ``core`` are of all of them, and its costs, but for their
    waits, are those of the one a sample goes to.
    """

    index: int
    device: str
    core: str
    layers: tuple[str, ...]
    alone: float | None
    predicted: Cost
    measured: Cost | None


@dataclass(frozen=True)
class EdgeSummary:
    """One edge. ``predicted`` and ``measured`` are the sender's seconds for a message."""

    name: str
    source: str
    target: str
    values: tuple[str, ...]
    nbytes: int
    ahead: int
    predicted: float
    measured: float | None


@dataclass(frozen=True)
class Flow:
    """A timeline as a whole: samples a second in steady state, latencies in seconds."""

    samples: int
    throughput: float
    latency: float
    worst: float


@dataclass(frozen=True)
class Summary:
    """A report's numbers."""

    model: str
    schedule: str
    solver: str
    gap: float
    balance: float
    total: float
    notes: tuple[str, ...]
    stages: tuple[StageSummary, ...]
    edges: tuple[EdgeSummary, ...]
    predicted: Flow
    measured: Flow | None

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


def summarise(package: Package, predicted: Timeline, measured: Timeline | None = None) -> Summary:
    """The numbers of ``package``, of the timeline simulated for it, and of one measured."""
    plan, program = package.plan, package.program
    expected, seen = _costs(predicted), None if measured is None else _costs(measured)
    sends, seen_sends = _sends(predicted), {} if measured is None else _sends(measured)
    nothing = Cost(0.0, 0.0, 0.0)
    stages = [
        StageSummary(
            stage.index,
            ", ".join(plan.cluster.devices[device].name for device in stage.devices),
            ", ".join(str(core) for d in stage.devices if (core := plan.cluster.devices[d].core) is not None),
            tuple(plan.layer_names[i] if i < len(plan.layer_names) else str(i) for i in stage.layers),
            stage.measured,
            expected.get(stage.index, nothing),
            None if seen is None else seen.get(stage.index, nothing),
        )
        for stage in plan.stages
    ]
    edges = [
        EdgeSummary(
            edge.name,
            _end(edge.source, edge.source_replica, edge.source_replicas),
            _end(edge.target, edge.target_replica, edge.target_replicas),
            edge.values,
            edge.nbytes,
            edge.ahead,
            sends.get(edge.name, 0.0),
            seen_sends.get(edge.name) if edge.source != HOST else None,
        )
        for edge in program.edges
    ]
    return Summary(
        package.model,
        program.schedule,
        plan.solver,
        plan.gap,
        plan.balance,
        plan.total,
        plan.notes,
        tuple(stages),
        tuple(edges),
        _flow(predicted),
        None if measured is None else _flow(measured),
    )


def steady(timeline: Timeline) -> range:
    """Samples of the middle half of a stream, numbered as in its events."""
    numbers = sorted({event.sample for event in timeline.events if event.activity == "F"})
    if not numbers:
        return range(0)
    count = len(numbers)
    low, high = numbers[count // 4], numbers[max(count // 4, count - 1 - count // 4)]
    return range(low, high + 1)


def _flow(timeline: Timeline) -> Flow:
    count = len(timeline.latencies)
    middle = sorted(timeline.latencies[count // 4 : max(count // 4 + 1, count - count // 4)])
    if not middle:
        return Flow(count, 0.0, 0.0, 0.0)
    return Flow(count, timeline.throughput, statistics.median(middle), middle[int(0.99 * (len(middle) - 1))])


#: What a stage computes for a sample: forward, backward and update where it learns.
_COMPUTES = frozenset({"F", "B", "W", "BW", "STEP"})


def _costs(timeline: Timeline) -> dict[int, Cost]:
    """Stage -> its cost in steady state."""
    samples = steady(timeline)
    compute: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    send: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    begins: dict[int, list[tuple[int, float]]] = defaultdict(list)
    devices: dict[int, set[int]] = defaultdict(set)
    for event in timeline.events:
        if event.sample not in samples:
            continue
        if event.activity in _COMPUTES:
            compute[event.stage][event.sample] += event.end - event.start
        if event.activity == "F":
            begins[event.stage].append((event.sample, event.start))
            devices[event.stage].add(event.device)
        elif event.activity == "SEND":
            send[event.stage][event.sample] += event.end - event.start
    found: dict[int, Cost] = {}
    for stage, seconds in compute.items():
        first, last = min(begins[stage]), max(begins[stage])
        period = (last[1] - first[1]) / (last[0] - first[0]) * len(devices[stage]) if last[0] > first[0] else 0.0
        working = statistics.median(seconds.values())
        sending = statistics.median(send[stage].values()) if send[stage] else 0.0
        found[stage] = Cost(working, sending, max(0.0, period - working - sending))
    return found


def _sends(timeline: Timeline) -> dict[str, float]:
    """Edge -> median seconds its sender spends on a message."""
    samples, seconds = steady(timeline), defaultdict[str, list[float]](list)
    for event in timeline.events:
        if event.activity == "SEND" and event.sample in samples:
            seconds[event.edge].append(event.end - event.start)
    return {edge: statistics.median(values) for edge, values in seconds.items()}


def _end(stage: int, replica: int, replicas: int) -> str:
    return "caller" if stage == HOST else f"stage {stage}" + (f".{replica}" if replicas > 1 else "")


def spans(names: Iterable[str]) -> str:
    """Layer names as ``first ... last``."""
    listed = list(names)
    if len(listed) <= 2:
        return ", ".join(name or "(model)" for name in listed)
    return f"{listed[0] or '(model)'} ... {listed[-1] or '(model)'}"
