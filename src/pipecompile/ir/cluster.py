"""The machines a plan is made for: devices and the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """One place that runs stages. A CPU device is a process pinned to ``core``.

    ``speed`` divides the profiled seconds of a layer (2.0: twice as fast as the profiled device).
    """

    name: str
    kind: str = "cpu"
    core: int | None = None
    threads: int = 1
    speed: float = 1.0


@dataclass(frozen=True)
class Link:
    """Cost of moving a value between two devices: ``latency`` seconds + bytes / ``bandwidth``.

    Both are busy time of each end (the copy runs on the device's own core).
    """

    latency: float = 30e-6
    bandwidth: float = 5e9

    def seconds(self, nbytes: float) -> float:
        """Time one end spends on a message of ``nbytes`` bytes."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Devices in pipeline order, and the link between any two of them."""

    devices: tuple[Device, ...]
    link: Link = Link()

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {"devices": [vars(device) for device in self.devices], "link": vars(self.link)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """The inverse of :meth:`to_json`."""
        return cls(tuple(Device(**device) for device in data["devices"]), Link(**data["link"]))
