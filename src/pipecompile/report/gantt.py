"""Places the events of a steady stretch of a timeline on a picture: who did what when, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

from pipecompile.ir.timeline import Timeline
from pipecompile.report.summary import steady

#: Samples shown, at most.
SHOWN = 10


@dataclass(frozen=True)
class Bar:
    """A stretch of time. ``x`` and ``width`` are shares of the picture, 0 to 1; ``seconds`` is its length."""

    kind: str
    stage: int
    sample: int
    x: float
    width: float
    seconds: float
    edge: str


@dataclass(frozen=True)
class Gantt:
    """One row a device. ``span`` is how many seconds the picture covers."""

    origin: str
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]
    span: float
    ticks: tuple[tuple[float, str], ...]


def window(timeline: Timeline, shown: int = SHOWN) -> tuple[float, float]:
    """Begin and length, in seconds, of a stretch in the middle that holds about ``shown`` samples."""
    samples = steady(timeline)
    middle = samples[len(samples) // 2] if samples else 0
    low = max(samples.start, middle - shown // 2) if samples else 0
    chosen = [event for event in timeline.events if event.activity == "F" and low <= event.sample < low + shown]
    if not chosen:
        return 0.0, 0.0
    begin = min(event.start for event in chosen)
    return begin, max(event.end for event in chosen) - begin


def gantt(timeline: Timeline, devices: tuple[str, ...], begin: float, span: float) -> Gantt:
    """The picture of ``begin`` to ``begin + span``; times on it count from ``begin``."""
    rows: list[list[Bar]] = [[] for _ in devices]
    for event in timeline.events:
        if event.end <= begin or event.start >= begin + span or event.device >= len(devices):
            continue
        start, end = max(event.start, begin), min(event.end, begin + span)
        rows[event.device].append(
            Bar(
                event.activity,
                event.stage,
                event.sample,
                (start - begin) / span,
                (end - start) / span,
                event.end - event.start,
                event.edge,
            )
        )
    drawn = tuple((name, tuple(row)) for name, row in zip(devices, rows, strict=True))
    return Gantt(timeline.origin, drawn, span, ticks(span))


def ticks(span: float, about: int = 8) -> tuple[tuple[float, str], ...]:
    """Round times along an axis of ``span`` seconds: share of the axis, and label."""
    if span <= 0:
        return ()
    raw = span / about
    power = 1.0
    while power > raw:
        power /= 10
    while power * 10 <= raw:
        power *= 10
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    unit, scale = ("s", 1.0) if span >= 2 else ("ms", 1e3) if span >= 2e-3 else ("µs", 1e6)
    count = int(span / step + 1e-9)
    return tuple((i * step / span, f"{i * step * scale:g} {unit}") for i in range(count + 1))
