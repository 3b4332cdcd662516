"""Planning a training step: memory is what the schedule really keeps, and unlike devices get their due."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import fx

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Layer, ModelGraph, OutputRef, StateSpec, TensorSpec
from pipecompile.ir.profile import Profile
from pipecompile.ir.training import kept_at_once
from pipecompile.ir.tree import Tree
from pipecompile.passes.plan_step import PlanStep
from pipecompile.runtime.update import OptimizerFactory, copies_kept

VALUE, WEIGHT, SLOTS = 1000, 400, 3


def chain(count: int) -> ModelGraph:
    """Layers in a row, each with a weight of its own."""
    names = [f"l{i}" for i in range(count)]
    layers = tuple(
        Layer(name, name, "", (name,), (names[i - 1] if i else "x",), (name,), (f"w{i}",)) for i, name in enumerate(names)
    )
    spec = TensorSpec((VALUE // 4,), "float32", (1,))
    state = tuple(StateSpec(f"w{i}", f"{name}.weight", "parameter", nbytes=WEIGHT) for i, name in enumerate(names))
    values = dict.fromkeys(["x", *names], spec)
    return ModelGraph(
        "m", "train", fx.Graph(), layers, frozenset(), values, state, ("x",), (OutputRef("value", names[-1]),),
        Tree("leaf"), Tree("leaf"),
    )  # fmt: skip


def profile(graph: ModelGraph) -> Profile:
    return Profile((1.0,) * len(graph.layers), dict.fromkeys(graph.values, VALUE), Link(0.0, 1e12), len(graph.layers))


def cluster(*devices: Device) -> Cluster:
    named = tuple(replace(device, name=f"cpu:{i}") for i, device in enumerate(devices))
    return Cluster(named, Link(0.0, 1e12))


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "breadth_first", "zb_h1", "zb_v"])
@pytest.mark.parametrize("micro_batches", [2, 6])
def test_memory_is_what_the_schedule_keeps(schedule: str, micro_batches: int) -> None:
    graph, devices = chain(12), 3
    planner = PlanStep(schedule, micro_batches=micro_batches, copies=4.0)
    plan = planner.apply(graph, profile(graph), cluster(*[Device("")] * devices))
    kept = kept_at_once(
        planner.program(plan, micro_batches), [float(VALUE * len(stage.layers)) for stage in plan.stages]
    )
    assert len(plan.memory) == devices
    for device, found in enumerate(plan.memory):
        own = [stage for stage in plan.stages if stage.device == device]
        weights = 4 * WEIGHT * sum(len(stage.layers) for stage in own)
        received = sum((stage.index > 0) + (stage.index < len(plan.stages) - 1) for stage in own)
        rings = SLOTS * VALUE * (received + any(stage.index == 0 for stage in own))
        if schedule in ("gpipe", "1f1b", "breadth_first"):
            assert found == pytest.approx(weights + rings + kept[device])
        else:
            assert found >= weights + rings + kept[device] - 1e-6


def test_early_stages_that_keep_more_get_fewer_layers_where_memory_is_short() -> None:
    graph = chain(12)
    loose = PlanStep("1f1b", micro_batches=8).apply(graph, profile(graph), cluster(*[Device("")] * 3))
    assert [len(stage.layers) for stage in loose.stages] == [4, 4, 4]
    limit = loose.memory[0] - 1
    tight = PlanStep("1f1b", micro_batches=8).apply(graph, profile(graph), cluster(*[Device("", memory=limit)] * 3))
    assert len(tight.stages[0].layers) < 4
    assert max(tight.memory) <= limit
    with pytest.raises(PlanError, match="bytes"):
        PlanStep("gpipe", micro_batches=8).apply(graph, profile(graph), cluster(*[Device("", memory=limit)] * 3))


def test_stage_s_is_on_device_s_and_unlike_devices_stand_in_the_order_chosen() -> None:
    graph = chain(6)
    memory = 6.0 * VALUE * 3
    plan = PlanStep("1f1b").apply(graph, profile(graph), cluster(Device(""), Device("", speed=0.5)))
    assert [stage.device for stage in plan.stages] == [0, 1]
    assert {device.speed: len(s.layers) for device, s in zip(plan.cluster.devices, plan.stages, strict=True)} == {
        1.0: 4,
        0.5: 2,
    }
    looped = PlanStep("interleaved").apply(
        graph, profile(graph), cluster(Device("", memory=2 * memory), Device("", speed=0.5, memory=memory))
    )
    assert [stage.device for stage in looped.stages] == [0, 1, 0, 1]
    assert max(looped.memory) <= memory


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        (partial(torch.optim.SGD, lr=0.1), 2.0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 3.0),
        (partial(torch.optim.AdamW, lr=0.1), 4.0),
    ],
)
def test_copies_an_optimizer_keeps(optimizer: OptimizerFactory, copies: float) -> None:
    assert copies_kept(optimizer) == copies
