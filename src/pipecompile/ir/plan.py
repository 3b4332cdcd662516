"""Which layers run on which device, what that costs, and how well that is proved."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pipecompile.ir.cluster import Cluster


@dataclass(frozen=True)
class Stage:
    """A run of the pipeline: layers (indices into the graph's layers) placed on one device, or on replicas.

    ``seconds`` is the predicted compute per sample, ``transfer`` the predicted time spent
    receiving and sending that computing does not hide; ``measured`` the compute of the finished
    stage, once known, on a device of this speed: in a pipeline, so timed while the other stages
    computed, too, where that was measured; ``alone`` the same with all other cores idle.
    ``replicas`` are further devices with a copy of the stage: samples are dealt to ``device`` and them in turn.
    """

    index: int
    device: int
    layers: tuple[int, ...]
    seconds: float
    transfer: float = 0.0
    measured: float | None = None
    replicas: tuple[int, ...] = ()
    alone: float | None = None

    @property
    def devices(self) -> tuple[int, ...]:
        """All devices that run the stage, in the order in which samples are dealt."""
        return (self.device, *self.replicas)

    @property
    def load(self) -> float:
        """Busy seconds per sample of the stream on each of its devices: they cannot go faster than that."""
        return ((self.seconds if self.measured is None else self.measured) + self.transfer) / len(self.devices)


@dataclass(frozen=True)
class Plan:
    """Stages in pipeline order, and how good they are proved to be.

    ``objective`` is the predicted value in seconds of what was minimised, ``goal``: the largest
    load of a device (``throughput``), or one sample's time through all stages (``latency``).
    ``bound`` is the proved lower bound of it over all plans. ``memory`` is predicted bytes by device.

    For training the stages may be those of ``data_parallel`` equal pipelines, one after the other.
    """

    stages: tuple[Stage, ...]
    cluster: Cluster
    objective: float
    bound: float
    solver: str
    solve_seconds: float
    total: float
    layer_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    goal: str = "throughput"
    memory: tuple[float, ...] = ()
    data_parallel: int = 1

    @property
    def pipeline(self) -> tuple[Stage, ...]:
        """The stages of one pipeline: all of them, or of several equal ones the first's."""
        return self.stages[: len(self.stages) // self.data_parallel]

    def repeated(self, data_parallel: int, cluster: Cluster) -> Plan:
        """So many pipelines like this one, each on as many further devices of ``cluster`` as this one uses."""
        stages, devices = len(self.stages), 1 + max(stage.device for stage in self.stages)
        return replace(
            self,
            stages=tuple(
                replace(stage, index=stage.index + k * stages, device=stage.device + k * devices)
                for k in range(data_parallel)
                for stage in self.stages
            ),
            cluster=replace(self.cluster, devices=cluster.devices[: devices * data_parallel]),
            total=self.total * data_parallel,
            memory=self.memory * data_parallel,
            data_parallel=data_parallel,
        )

    def ends(self, stage: int) -> bool:
        """Whether a stage is the last of its pipeline."""
        return stage % len(self.pipeline) == len(self.pipeline) - 1

    @property
    def gap(self) -> float:
        """Relative distance of the objective from its proved bound; 0 means optimal."""
        return 0.0 if self.objective <= 0 else max(0.0, 1.0 - self.bound / self.objective)

    @property
    def loads(self) -> dict[int, float]:
        """Busy seconds per sample of every device in use: of all its stages together."""
        found: dict[int, float] = {}
        for stage in self.stages:
            for device in stage.devices:
                found[device] = found.get(device, 0.0) + stage.load
        return found

    @property
    def replicated(self) -> bool:
        """Whether any stage is on several devices."""
        return any(stage.replicas for stage in self.stages)

    @property
    def shape(self) -> str:
        """How many stages and copies of them, in words: ``2 stages``, ``2 replicas``, ``2 stages (1 + 3 devices)``."""
        if self.data_parallel > 1:
            one = replace(self, stages=self.pipeline, data_parallel=1)
            return f"{self.data_parallel} pipelines of {one.shape}"
        copies = [len(stage.devices) for stage in self.stages]
        if max(copies) == 1:
            return f"{len(copies)} stage{'s' * (len(copies) > 1)}"
        if len(copies) == 1:
            return f"{copies[0]} replicas"
        return f"{len(copies)} stages ({' + '.join(map(str, copies))} devices)"

    @property
    def slowest(self) -> float:
        """Load of the busiest device: seconds per sample in steady state."""
        return max(self.loads.values())

    @property
    def balance(self) -> float:
        """(total / devices) / busiest device: 1.0 is a perfect split.

        Total and stages are compared as they are alone: that cores slow each other down is no fault of the cut.
        """
        if any(stage.alone is not None for stage in self.stages):
            alone = (replace(s, measured=s.measured if s.alone is None else s.alone, alone=None) for s in self.stages)
            return replace(self, stages=tuple(alone)).balance
        return self.total / len(self.loads) / self.slowest if self.slowest else 1.0

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            **vars(self),
            "stages": [
                {**vars(stage), "layers": list(stage.layers), "replicas": list(stage.replicas)} for stage in self.stages
            ],
            "cluster": self.cluster.to_json(),
            "layer_names": list(self.layer_names),
            "notes": list(self.notes),
            "memory": list(self.memory),
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
            "memory": tuple(data.get("memory", ())),
        }
        return cls(**fields)


def _stage_from_json(data: dict[str, Any]) -> Stage:
    fields: dict[str, Any] = {**data, "layers": tuple(data["layers"]), "replicas": tuple(data.get("replicas", ()))}
    return Stage(**fields)
