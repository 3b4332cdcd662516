"""The machines a plan is made for: devices and the links between them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipecompile.errors import PlanError


@dataclass(frozen=True)
class Device:
    """One place that runs stages. A CPU device is a process pinned to ``core``.

    One of kind ``"cuda"`` is a stream of a card, named ``"cuda:<card>/<number>"``.

    ``speed`` divides the profiled seconds of a layer (2.0: twice as fast as the profiled device).
    ``memory`` is in bytes; None: not limited.
    """

    name: str
    kind: str = "cpu"
    core: int | None = None
    threads: int = 1
    speed: float = 1.0
    memory: float | None = None


@dataclass(frozen=True)
class Link:
    """Cost of moving a value between two devices: ``latency`` seconds + bytes / ``bandwidth``.

    Both are busy time of each end (the copy runs on the device's own core). ``overlap`` is the
    share of that time which hides behind computing: 0 where the core copies, 1 where a copy engine
    does and is never in the way.
    """

    latency: float = 30e-6
    bandwidth: float = 5e9
    overlap: float = 0.0

    def seconds(self, nbytes: float) -> float:
        """Time one end spends on a message of ``nbytes`` bytes."""
        return self.latency + nbytes / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Devices, in the order in which they form a pipeline unless another is better, and the links between them.

    ``link`` joins any two devices and the caller; ``links`` names exceptions: ``"a>b"`` from device
    a to b, ``"a<>b"`` both ways.
    """

    devices: tuple[Device, ...]
    link: Link = Link()
    links: Mapping[str, Link] = field(default_factory=dict[str, Link])

    def between(self, source: int, target: int) -> Link:
        """The link from one device to another."""
        a, b = self.devices[source].name, self.devices[target].name
        for key in (f"{a}>{b}", f"{a}<>{b}", f"{b}<>{a}"):
            if key in self.links:
                return self.links[key]
        return self.link

    @property
    def card(self) -> str | None:
        """The CUDA card whose streams the devices are, as torch names it; None where they are CPU cores."""
        first = self.devices[0]
        return first.name.partition("/")[0] if first.kind == "cuda" else None

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cluster:
        """Read a Cluster from a YAML or JSON file (:mod:`pipecompile.ir.cluster_file` has the format).

        Raises:
            PlanError: if there is no such file, or something in it is wrong (with the line and the field).
        """
        from pipecompile.ir.cluster_file import read_cluster

        try:
            text = Path(path).read_text()
        except UnicodeDecodeError:
            raise PlanError(f"cannot read the cluster file {os.fspath(path)}: it is no text") from None
        except OSError as error:
            raise PlanError(f"cannot read the cluster file {os.fspath(path)}: {error.strerror or error}") from None
        return read_cluster(text, os.fspath(path))

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "devices": [vars(device) for device in self.devices],
            "link": vars(self.link),
            "links": {ends: vars(link) for ends, link in self.links.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """The inverse of :meth:`to_json`."""
        links = {ends: Link(**link) for ends, link in data.get("links", {}).items()}
        return cls(tuple(Device(**device) for device in data["devices"]), Link(**data["link"]), links)
