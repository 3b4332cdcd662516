"""When each device did what: measured by the runtime or predicted by the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Activity = Literal["wait", "F", "B", "W", "BW", "R", "REDUCE", "STEP", "SEND", "TRANSFER"]


@dataclass(frozen=True)
class Event:
    """One stretch of time: seconds from the timeline's origin."""

    device: int
    stage: int
    activity: Activity
    sample: int
    start: float
    end: float
    edge: str = ""


@dataclass(frozen=True)
class Timeline:
    """Events of all devices and the caller; ``origin`` says who made it."""

    events: tuple[Event, ...]
    origin: Literal["measured", "simulated"]
    latencies: tuple[float, ...] = ()
    finishes: tuple[float, ...] = ()

    @property
    def period(self) -> float:
        """Median seconds between results in the middle half of the stream (steady state)."""
        count = len(self.finishes)
        if count < 2:
            return 0.0
        low, high = count // 4, max(count // 4 + 1, count - 1 - count // 4)
        return (self.finishes[high] - self.finishes[low]) / (high - low)

    @property
    def throughput(self) -> float:
        """Samples per second in steady state."""
        return 1.0 / self.period if self.period else 0.0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "origin": self.origin,
            "events": [vars(event) for event in self.events],
            "latencies": list(self.latencies),
            "finishes": list(self.finishes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Timeline:
        """The inverse of :meth:`to_json`."""
        return cls(
            tuple(Event(**event) for event in data["events"]),
            data["origin"],
            tuple(data["latencies"]),
            tuple(data["finishes"]),
        )
