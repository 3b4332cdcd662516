"""Refine on a machine whose layers take what the test says: it must find the cut the profile hides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

from pipecompile.errors import PipelineError
from pipecompile.pipelines.infer_driver import Compiler
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.measure import Job
from pipecompile.ir.package import Package
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import Partition
from pipecompile.passes.trace import Trace
from pipecompile.simulate import simulate

LINK = Link(0.0, 1e12)


@dataclass
class Machine:
    """A stand-in for the clock: layer i takes ``truth[i]`` seconds, and everything ``pace`` times that."""

    truth: tuple[float, ...]
    pace: float = 1.0
    rates: list[float] = field(default_factory=list[float])
    factors: tuple[float, ...] = ()
    cores: list[int | None] = field(default_factory=list[int | None])

    def functions(self, jobs: Sequence[Job], budget: float) -> list[float]:
        used = [{int(i) for i in re.findall(r"p_(\d+)_weight", job.source)} for job in jobs]
        return [self.pace * sum(self.truth[i] for i in layers) for layers in used]

    def layers(self, source: str, arguments: Sequence[Any], marks: int, budget: float) -> tuple[list[float], float, int]:
        raise AssertionError("the profile is given")

    def streams(
        self, packages: Sequence[Package], tensors: Mapping[str, torch.Tensor], leaves: Sequence[Any]
    ) -> list[float]:
        return self.rates

    def slowdowns(self, jobs: Sequence[Job], cores: Sequence[int | None], budget: float) -> list[float]:
        if not self.factors:
            raise PipelineError("no workers here")
        self.cores = list(cores)
        return list(self.factors)

    def link(self) -> Link:
        return LINK


def refined(profiled: tuple[float, ...], machine: Machine, cluster: Cluster, **options: Any) -> tuple[Compiler, Plan]:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in profiled)).eval()
    traced = Trace().apply(model, (torch.ones(1, 4),), {})
    compiler = Compiler(traced, [torch.ones(1, 4)], machine, Lower(), Partition(2, **options), 0.1)
    sizes = {name: spec.nbytes for name, spec in traced.graph.values.items()} | dict.fromkeys(traced.graph.inputs, 16)
    return compiler, compiler.plan(Profile(profiled, sizes, LINK, sum(profiled)), cluster)


def cluster(*speeds: float) -> Cluster:
    return Cluster(tuple(Device(f"cpu:{i}", speed=speed) for i, speed in enumerate(speeds)), LINK)


@pytest.mark.parametrize("pace", [1.0, 3.0])
def test_a_profile_that_is_wrong_about_one_layer_is_put_right(pace: float) -> None:
    truth = (1.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 2.0)
    _, plan = refined((1.0,) * 8, Machine(truth, pace), cluster(1.0, 1.0))
    # Half of the layers each: 7 and 5, which no other cut beats.
    assert [stage.layers for stage in plan.stages] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert [stage.measured for stage in plan.stages] == pytest.approx([7.0 * pace, 5.0 * pace])


def test_what_all_cuts_tried_have_told_counts() -> None:
    """The heavy layer is in the second half, then in the first: only both together show where."""
    truth = (1.0, 1.0, 1.0, 1.0, 9.0, 1.0, 1.0, 1.0)
    _, plan = refined((1.0,) * 8, Machine(truth), cluster(1.0, 1.0))
    best = min(max(sum(truth[:i]), sum(truth[i:])) for i in range(1, 8))
    assert plan.slowest == pytest.approx(best)
    assert any("by timing the finished stages" in note for note in plan.notes)


def test_a_device_of_half_the_speed_is_predicted_to_take_twice_as_long() -> None:
    compiler, plan = refined((1.0,) * 6, Machine((1.0,) * 6), cluster(1.0, 0.5))
    assert [stage.measured for stage in plan.stages] == pytest.approx([4.0, 4.0])
    assert [stage.seconds for stage in plan.stages] == pytest.approx([4.0, 4.0])
    assert len(plan.notes) == 0, "it was right at once, and timing the stages changed nothing"
    assert simulate(compiler.program(plan), plan, LINK, 32).period == pytest.approx(4.0)
    assert plan.total == pytest.approx(6.0)
    slower = replace(plan, stages=tuple(replace(stage, measured=None) for stage in plan.stages))
    assert simulate(compiler.program(slower), slower, LINK, 32).period == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("truth", "rates", "devices", "said"),
    [
        ((1.0,) * 7, [10.0, 9.0], [1, 1], "tried in workers: 2 stages 10 samples/s, 2 replicas 9 samples/s"),
        ((1.0,) * 7, [9.0, 10.0], [2], "tried in workers: 2 stages 9 samples/s, 2 replicas 10 samples/s"),
        ((1.0, 9.0), [], [2], "by simulation 2 stages 1.11x the model itself, 2 replicas 2.00x"),
    ],
)
def test_stages_and_replicas_that_come_close_are_tried(
    truth: tuple[float, ...], rates: list[float], devices: list[int], said: str
) -> None:
    machine = Machine(truth, rates=rates)
    compiler, _ = refined(truth, machine, cluster(1.0, 1.0))
    graph = compiler.traced.graph
    sizes = {name: spec.nbytes for name, spec in graph.values.items()} | dict.fromkeys(graph.inputs, 16)
    plan = compiler.fastest(Profile(truth, sizes, LINK, sum(truth)), cluster(1.0, 1.0))
    assert sorted(len(stage.devices) for stage in plan.stages) == sorted(devices)
    assert said in plan.notes[-1]


def test_stages_are_predicted_as_they_run_beside_each_other() -> None:
    """The first stage works half as long as the second: it is in the second one's way half of the time."""
    machine = Machine((4.0, 8.0), factors=(1.5, 1.25))
    compiler, alone = refined((4.0, 8.0), machine, cluster(1.0, 1.0))
    beside = replace(compiler, beside=True)
    profile = Profile((4.0, 8.0), {name: 0 for name in compiler.traced.graph.values} | {"input": 16}, LINK, 12.0)
    plan = beside.plan(profile, Cluster((Device("cpu:0", core=3), Device("cpu:1", core=5)), LINK))
    assert machine.cores == [3, 5]
    assert [stage.alone for stage in plan.stages] == pytest.approx([4.0, 8.0])
    assert [stage.measured for stage in plan.stages] == pytest.approx([4.0 * 1.5, 8.0 * 1.125])
    assert plan.slowest == pytest.approx(9.0)
    assert plan.balance == pytest.approx(alone.balance), "which is no fault of the cut"
    assert simulate(beside.program(plan), plan, LINK, 32).period == pytest.approx(9.0)
    assert Plan.from_json(plan.to_json()) == plan


def test_without_workers_stages_stay_as_timed_alone() -> None:
    compiler, _ = refined((1.0, 1.0), Machine((1.0, 1.0)), cluster(1.0, 1.0))
    profile = Profile((1.0, 1.0), {name: 0 for name in compiler.traced.graph.values} | {"input": 16}, LINK, 2.0)
    plan = replace(compiler, beside=True).plan(profile, cluster(1.0, 1.0))
    assert [stage.measured for stage in plan.stages] == [1.0, 1.0]
    assert plan.notes == ("stages were timed alone only, not side by side: no workers here",)
