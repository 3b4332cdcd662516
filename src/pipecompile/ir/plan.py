"""Which layers run on which device, what that costs, and how well that is proved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipecompile.ir.cluster import Cluster


@dataclass(frozen=True)
class Stage:
    """A run of the pipeline: layers (indices into the graph's layers) placed on one device.

    ``seconds`` is the predicted compute per sample, ``transfer`` the predicted time spent
    receiving and sending; ``measured`` the compute of the finished stage timed alone, once known.
    """

    index: int
    device: int
    layers: tuple[int, ...]
    seconds: float
    transfer: float = 0.0
    measured: float | None = None

    @property
    def load(self) -> float:
        """Busy seconds per sample: the device cannot go faster than one sample in this time."""
        return (self.seconds if self.measured is None else self.measured) + self.transfer


@dataclass(frozen=True)
class Plan:
    """Stages in pipeline order. ``bound`` is the proved lower bound of the largest load."""

    stages: tuple[Stage, ...]
    cluster: Cluster
    objective: float
    bound: float
    solver: str
    solve_seconds: float
    total: float
    layer_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """Relative distance of the objective from its proved bound; 0 means optimal."""
        return 0.0 if self.objective <= 0 else max(0.0, 1.0 - self.bound / self.objective)

    @property
    def slowest(self) -> float:
        """Load of the busiest stage: seconds per sample in steady state."""
        return max(stage.load for stage in self.stages)

    @property
    def balance(self) -> float:
        """(total / stages) / slowest stage: 1.0 is a perfect split."""
        return self.total / len(self.stages) / self.slowest if self.slowest else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            **vars(self),
            "stages": [{**vars(stage), "layers": list(stage.layers)} for stage in self.stages],
            "cluster": self.cluster.to_json(),
            "layer_names": list(self.layer_names),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        stages = tuple(_stage_from_json(stage) for stage in data["stages"])
        fields: dict[str, Any] = {
            **data,
            "stages": stages,
            "cluster": Cluster.from_json(data["cluster"]),
            "layer_names": tuple(data["layer_names"]),
            "notes": tuple(data["notes"]),
        }
        return cls(**fields)


def _stage_from_json(data: dict[str, Any]) -> Stage:
    fields: dict[str, Any] = {**data, "layers": tuple(data["layers"])}
    return Stage(**fields)
