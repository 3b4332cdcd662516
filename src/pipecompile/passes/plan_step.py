"""Plan a training step: how many stages, which layers in each, on which device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.ir.training import Gradients
from pipecompile.passes.operators import heavy_weights
from pipecompile.passes.partition import Partition, Training
from pipecompile.schedules.training import STEP_SCHEDULES, StepSchedule


@dataclass(frozen=True)
class PlanStep:
    """Cut a model for one of :data:`~pipecompile.schedules.training.STEP_SCHEDULES`.

    A device's memory holds its weights ``copies`` times (themselves, gradients, optimizer state) and
    the activations of as many of ``micro_batches`` as the schedule has in flight there: under ``1f1b``
    as many as there are stages from there to the end, under ``zb_h1`` at most as many as there are
    stages, else all of them (exact for ``gpipe`` and ``breadth_first``, the most there can be for the
    others). ``time_limit`` is the solver's, in seconds. Layers named in one of ``colocate`` share a stage.
    """

    schedule: str = "1f1b"
    time_limit: float = 10.0
    micro_batches: int = 1
    copies: float = 2.0
    colocate: Sequence[Sequence[str]] = ()

    def apply(self, graph: ModelGraph, profile: Profile, cluster: Cluster) -> Plan:
        """The plan, with as many stages on each device as the schedule wants.

        The profile's seconds are those of both passes (:func:`training_profile`). Schedules want stage s
        on device s, so the plan's cluster lists the devices in the order the planner chose. Stages that
        share a device are balanced one by one, each with its share of the memory, and unlike devices then
        count as the weakest of them. A model with too few layers uses fewer devices; the plan's notes say so.

        Raises:
            PlanError: for an unknown schedule, a model with too few layers for one device, or too little memory.
        """
        chosen = step_schedule(self.schedule)
        devices = min(len(cluster.devices), len(graph.layers) // chosen.chunks)
        if devices < 1:
            raise PlanError(
                f"schedule {self.schedule!r} needs {chosen.chunks} layers or more, the model has {len(graph.layers)}: "
                "use '1f1b' or 'gpipe'"
            )
        place = chosen.place(devices)
        among = cluster.devices[:devices]
        spread = tuple(_chunk(among, device, chosen.chunks) for device in place) if chosen.chunks > 1 else among
        flying: dict[str, Literal["1f1b", "zb_h1"]] = {"1f1b": "1f1b", "zb_h1": "zb_h1"}
        training = Training(schedule=flying.get(self.schedule, "gpipe"), micro_batches=self.micro_batches, copies=self.copies)
        partition = Partition(len(place), time_limit=self.time_limit, training=training, colocate=self.colocate)
        plan = partition.apply(graph, profile, replace(cluster, devices=spread))
        if chosen.chunks == 1:
            among = tuple(among[stage.device] for stage in plan.stages)
        memory = [0.0] * len(among)
        for stage in plan.stages:
            memory[place[stage.index]] += plan.memory[stage.device]
        notes = plan.notes
        if devices < len(cluster.devices):
            notes = (*notes, f"{len(cluster.devices)} devices asked for, {devices} used: {len(graph.layers)} layers")
        return replace(
            plan,
            stages=tuple(replace(stage, device=place[stage.index]) for stage in plan.stages),
            cluster=replace(cluster, devices=among),
            notes=notes,
            memory=tuple(memory) if plan.memory else (),
        )

    def program(self, plan: Plan, micro_batches: int) -> Program:
        """The compute-only order of the schedule for a plan made for it."""
        return step_schedule(self.schedule).order(plan, micro_batches)


def _chunk(devices: Sequence[Device], index: int, chunks: int) -> Device:
    """One of ``chunks`` equal parts of a device, as weak as the weakest of all."""
    limits = [device.memory for device in devices if device.memory is not None]
    memory = min(limits) / chunks if limits else None
    return replace(devices[index], speed=min(device.speed for device in devices), memory=memory)


def step_schedule(name: str) -> StepSchedule:
    """The schedule of that name.

    Raises:
        PlanError: if there is none.
    """
    if name not in STEP_SCHEDULES:
        raise PlanError(f"there is no schedule {name!r}: choose one of auto, {', '.join(STEP_SCHEDULES)}")
    return STEP_SCHEDULES[name]


def training_profile(graph: ModelGraph, profile: Profile, gradients: Gradients, *, again: bool = False) -> Profile:
    """Seconds of forward and backward together, estimated from those of the forward.

    A layer with a trained convolution or matrix computes three products of equal size (the
    result, the gradient of its input, that of its weight); another one goes forward and back;
    one without gradients only forward. With ``again`` the forward counts twice.
    """
    nodes = {node.name: node for node in graph.graph.nodes}

    def factor(names: Sequence[str], has_gradient: Callable[[str], bool]) -> float:
        if not any(has_gradient(name) for name in names):
            return 1.0 + again
        heavy = any(w.name in gradients.weights for name in names for w in heavy_weights(nodes[name]))
        return (3.0 if heavy else 2.0) + again

    factors = {i: factor(layer.nodes, gradients.values.__contains__) for i, layer in enumerate(graph.layers)}
    scaled = profile.scaled(factors)
    return replace(scaled, total=sum(scaled.seconds))


__all__ = ["PlanStep", "step_schedule", "training_profile"]
