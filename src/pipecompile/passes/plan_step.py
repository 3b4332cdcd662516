"""Plan a training step: how many stages, which layers in each, on which device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import Program
from pipecompile.ir.training import Gradients
from pipecompile.passes.operators import heavy_weights
from pipecompile.passes.partition import Partition
from pipecompile.schedules.training import STEP_SCHEDULES, StepSchedule


@dataclass(frozen=True)
class PlanStep:
    """Cut a model for one of :data:`~pipecompile.schedules.training.STEP_SCHEDULES`.

    ``time_limit`` is the solver's, in seconds.
    """

    schedule: str = "1f1b"
    time_limit: float = 10.0

    def apply(self, graph: ModelGraph, profile: Profile, cluster: Cluster) -> Plan:
        """The plan, with as many stages on each device as the schedule wants.

        A model with too few layers uses fewer devices; the plan's notes say so.

        Raises:
            PlanError: for an unknown schedule, or a model with too few layers for one device.
        """
        chosen = step_schedule(self.schedule)
        devices = min(len(cluster.devices), len(graph.layers) // chosen.chunks)
        if devices < 1:
            raise PlanError(
                f"schedule {self.schedule!r} needs {chosen.chunks} layers or more, the model has {len(graph.layers)}: "
                "use '1f1b' or 'gpipe'"
            )
        place = chosen.place(devices)
        spread = replace(cluster, devices=tuple(cluster.devices[device] for device in place))
        plan = Partition(len(place), time_limit=self.time_limit).apply(graph, profile, spread)
        stages = tuple(replace(stage, device=place[stage.index]) for stage in plan.stages)
        notes = plan.notes
        if devices < len(cluster.devices):
            notes = (*notes, f"{len(cluster.devices)} devices asked for, {devices} used: {len(graph.layers)} layers")
        return replace(plan, stages=stages, cluster=replace(cluster, devices=cluster.devices[:devices]), notes=notes)

    def program(self, plan: Plan, micro_batches: int) -> Program:
        """The compute-only order of the schedule for a plan made for it."""
        return step_schedule(self.schedule).order(plan, micro_batches)


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
