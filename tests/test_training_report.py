"""The measured timeline of a training step, and the page that shows it beside the predicted one."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.training import TRAINING
from pipecompile.errors import InputError, PipelineClosed, StepError
from pipecompile.ir.program import COMPUTE, Op, Program
from pipecompile.ir.timeline import Timeline
from test_training import SGD, compiled, every_layer_alike
from test_training_drop_in import dropped_in

__all__ = ["every_layer_alike"]  # the fixture, for this file too


def done(timeline: Timeline, device: int) -> list[tuple[str, int, int]]:
    """What a device computed, in the order of time."""
    own = [e for e in timeline.events if e.device == device and (e.activity in COMPUTE or e.activity == "STEP")]
    assert all(one.end <= other.start for one, other in pairwise(own)), "one thing at a time"
    return [(e.activity, e.stage, e.sample) for e in own]


def ordered(program: Program, device: int) -> list[tuple[str, int, int]]:
    """The same as the program says it."""
    steps = program.devices[device].warm_up
    return [(s.op.value, s.stage, s.sample) for s in steps if s.op in COMPUTE or s.op is Op.STEP]


@pytest.mark.parametrize(
    ("name", "schedule", "more"),
    [
        ("autoencoder", "1f1b", {"executor": "process"}),
        ("resnet", "zb_v", {}),
        ("unet", "gpipe", {"recompute": "stage"}),
        ("two_heads", "interleaved", {"clip_norm": 1.0}),
    ],
)
def test_what_was_measured_is_what_the_program_says(name: str, schedule: str, more: dict[str, Any]) -> None:
    job = TRAINING[name].make()
    with compiled(job, 2, schedule, SGD, **more) as pipe:
        with pytest.raises(InputError, match="no step has run"):
            pipe.timeline()
        pipe.set_optimizer(lr=0.05)  # starts what trains, and is no step
        with pytest.raises(InputError, match="no step has run"):
            pipe.timeline()
        for _ in range(2):
            pipe.train_step(job.inputs, job.targets)
        found = pipe.timeline()
        for device in range(2):
            assert done(found, device) == ordered(pipe.program, device)
        assert found.origin == "measured"
        assert min(e.start for e in found.events) == 0.0
        assert found.finishes == (max(e.end for e in found.events),)
        ends = {(e.stage, e.sample): e.end for e in found.events if e.activity == "F"}
        begins = {(e.stage, e.sample): e.start for e in found.events if e.activity == "F"}
        for stage, sample in ends:
            if (stage + 1, sample) in begins and pipe.plan.stages[stage].device != pipe.plan.stages[stage + 1].device:
                assert ends[stage, sample] <= begins[stage + 1, sample]
        sends = {(e.edge, e.sample) for e in found.events if e.activity == "SEND"}
        if more.get("executor") == "process":
            wanted = {
                (s.edge, 0 if s.edge.endswith(":tied") else s.sample)
                for device in pipe.program.devices
                for s in device.warm_up
                if s.op is Op.SEND
            }
            assert sends == wanted
    with pytest.raises(PipelineClosed, match="ask before close"):
        pipe.timeline()


def test_the_page_shows_one_step_and_before_it_what_is_expected(tmp_path: Path) -> None:
    job = TRAINING["resnet"].make()
    with compiled(job, 2, "zb_h1", SGD) as pipe:
        page = pipe.report(tmp_path / "step.html").read_text()
        assert "no step has run" in page
        assert page.count("<svg") == 1
        pipe.train_step(job.inputs, job.targets)
        page = pipe.report(tmp_path / "step.html").read_text()
        assert page.count("<svg") == 2
        for device in pipe.program.devices:
            for s in device.warm_up:
                if s.op in COMPUTE:
                    word = {"F": "forward", "B": "backward, inputs", "W": "backward, weights"}[s.op.value]
                    assert page.count(f"<title>stage {s.stage}, {word} of micro-batch {s.sample}:") == 2
        assert "http" not in page.replace("http://www.w3.org", "")
        assert "<script" not in page
        with pytest.raises(InputError, match="cannot write"):
            pipe.report(tmp_path / "no" / "step.html")
    assert "no step has run" in pipe.report(tmp_path / "closed.html").read_text()


@pytest.mark.parametrize("schedule", ["1f1b", "zb_v"])
def test_a_smaller_batch_is_compared_with_a_step_of_as_many_micro_batches(schedule: str, tmp_path: Path) -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, schedule, SGD, dynamic_batch=True) as pipe:
        pipe.train_step(tuple(x[:5] for x in job.inputs), job.targets[:5])  # 3 micro-batches of 4
        page = pipe.report(tmp_path / "step.html").read_text()
        assert page.count("<title>stage 0, forward of micro-batch 2:") == 2
        assert "of micro-batch 3:" not in page
        assert pipe.simulate(3).finishes[0] < pipe.simulate().finishes[0]


def test_half_a_step_and_a_failed_one_have_no_timeline(tmp_path: Path) -> None:
    job = TRAINING["resnet"].make()
    for executor in ("inline", "process"):
        with dropped_in(job, 2, "gpipe", executor=executor) as pipe:
            result = pipe(*job.inputs)
            with pytest.raises(InputError, match="waits for its backward"):
                pipe.timeline()
            assert "no step has run" in pipe.report(tmp_path / "half.html").read_text()
            result.sum().backward()
            assert pipe.timeline().finishes[0] > 0
    with compiled(job, 2, "1f1b", SGD, executor="process", check_finite=True) as pipe:
        pipe.train_step(job.inputs, job.targets)
        with pytest.raises(StepError):
            pipe.train_step(tuple(x * float("nan") for x in job.inputs), job.targets)
        with pytest.raises(InputError, match="the latest failed"):
            pipe.timeline()


def test_timelines_are_asked_for_while_another_thread_trains() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD, executor="process") as pipe, ThreadPoolExecutor(1) as other:
        pipe.train_step(job.inputs, job.targets)
        losses = other.submit(lambda: [float(pipe.train_step(job.inputs, job.targets)) for _ in range(20)])
        while not losses.done():
            for device in range(2):
                assert done(pipe.timeline(), device) == ordered(pipe.program, device)
        assert len(losses.result()) == 20


def test_one_worker_with_threads_is_drawn_too(tmp_path: Path) -> None:
    from pipecompile.ir.cluster import Cluster, Device
    from pipecompile.pipelines.train_driver import compile_training

    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.randn(4, 4)
    cluster = Cluster((Device("cpu", threads=2),))
    with compile_training(
        model, (x,), {}, cluster, loss_fn=nn.MSELoss(), optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        micro_batches=1, schedule="gpipe", profile_seconds=0.01, executor="inline",
    ) as pipe:  # fmt: skip
        pipe.train_step(x, x)
        page = pipe.report(tmp_path / "one.html").read_text()
    assert "1 stage on 1 device, schedule" in page
    assert "1 micro-batch a step" in page
