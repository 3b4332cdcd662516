"""Training on a card, as far as a CPU can show it: whatever one stream reads, another has been told to have written.

A record of a step takes the place of the card: it computes on the host, in the order things are handed over, and notes
which stream every operator was given to and what waits for what. `lane_record.races` then looks for two uses of the
same bytes that nothing orders, over all operators, messages, sums, weights and buffers.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipecompile
from lane_record import Record, RecordedCard, RecordedLane, races
from models.training import TRAINING, Job
from pipecompile.errors import InputError, PipelineClosed, PipelineError, PlanError, StepError, TraceError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.passes.check import run_once
from pipecompile.pipelines import training_state
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.runtime.card_lanes import CardLanes
from pipecompile.runtime.channels.lane_edge import Crossing, LaneReceiver
from pipecompile.runtime.channels.ring import RingReceiver
from pipecompile.runtime.cuda import lanes_of
from pipecompile.schedules.training import STEP_SCHEDULES
from test_training import ADAMW, SGD, STEPS, compiled, every_layer_alike, furthest, reference
from test_training_drop_in import dropped_in

__all__ = ["every_layer_alike"]  # the fixture, for this file too

TWO = ["cuda:0", "cuda:0"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> Record:
    """A record that takes the place of the card for every pipeline started from now on."""
    record = Record()
    monkeypatch.setattr(training_state, "lanes_of", lambda *_: CardLanes(RecordedCard(record)))
    return record


def two_steps(record: Record, pipe: TrainingPipeline, job: Job) -> None:
    """Two steps, before each of which the caller writes to inputs and weights."""
    values = job.inputs.values() if isinstance(job.inputs, dict) else job.inputs
    with record:
        for _ in range(2):
            with torch.no_grad():
                for tensor in (*values, *job.model.parameters()):
                    tensor.mul_(1)
            pipe.train_step(job.inputs, job.targets)


WAYS = [(name, schedule, 2 + i % 3) for i, (name, schedule) in enumerate(product(TRAINING, STEP_SCHEDULES))]


@pytest.mark.parametrize(
    ("name", "schedule", "stages"),
    [pytest.param(*way, marks=[] if i % 9 == 0 else pytest.mark.slow) for i, way in enumerate(WAYS)],
)
def test_no_two_streams_use_the_same_bytes_unordered(
    name: str, schedule: str, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, job = recorded(monkeypatch), TRAINING[name].make()
    with compiled(job, stages, schedule, ADAMW, recompute="stage" if schedule == "gpipe" else "none") as pipe:
        two_steps(record, pipe, job)
        lanes = {lane for what, lane, _ in record.events if what == "op"}
        edges = [edge for edge in pipe.program.edges if edge.slots]
        assert len(lanes) >= 1 + len(pipe.package.modules) + len(edges)  # the caller's, devices', those of copies
    assert races(record) == []


def forget(cls: type, method: str, **instead: Any) -> Any:
    """A mutation: ``method`` of a class does nothing, or something else."""
    return lambda patch: patch.setattr(cls, method, instead.get("by", lambda *_: None))


@contextmanager
def unfenced(crossing: Crossing, slot: int, *, values: bool, free: bool) -> Generator[None]:
    """`Crossing.writing` without one of its waits."""
    if values and crossing.source is not None:
        crossing.copies.wait(crossing.source.mark())
    if free:
        crossing.copies.wait(crossing.given[slot])
    with crossing.copies.use():
        yield
    crossing.filled[slot] = crossing.copies.mark()


MUTATIONS = {
    "a copy does not wait for the values": forget(
        Crossing, "writing", by=lambda self, slot: unfenced(self, slot, values=False, free=True)
    ),
    "a copy does not wait for the slot": forget(
        Crossing, "writing", by=lambda self, slot: unfenced(self, slot, values=True, free=False)
    ),
    "who takes a message does not wait for it": forget(LaneReceiver, "take", by=RingReceiver.take),
    "what lies in a slot is sent as it is": forget(Crossing, "steady", by=lambda self, value: value),
    "memory is not kept for the copy": forget(RecordedLane, "keep"),
    "a step does not wait for the caller": forget(CardLanes, "begin"),
    "the host does not wait for a step": forget(CardLanes, "finish"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_search_finds_what_is_left_out(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[mutation](monkeypatch)
    record, job = recorded(monkeypatch), TRAINING["statistics"].make()  # a stage sends on a view of what it received
    with compiled(job, 4, "1f1b", SGD) as pipe:
        two_steps(record, pipe, job)
    assert races(record)


@pytest.mark.parametrize(("name", "schedule"), [("resnet", "zb_h1"), ("gpt2", "1f1b"), ("unet", "gpipe")])
def test_rings_on_a_card_carry_what_plain_training_computes(
    name: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch)
    job, wanted = TRAINING[name].make(), reference(TRAINING[name].make(), SGD)
    with compiled(job, 3, schedule, SGD) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(STEPS)]
        assert furthest(pipe.gradients(), wanted.gradients) <= 1e-10
        assert [event.start for event in pipe.timeline().events] == sorted(e.start for e in pipe.timeline().events)
    assert losses == pytest.approx(wanted.losses, rel=1e-10)
    assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10


@pytest.mark.parametrize(("name", "stages", "more"), [("autoencoder", 3, {}), ("attention", 4, {"data_parallel": 2})])
def test_a_drop_in_pipeline_is_ordered_as_well(
    name: str, stages: int, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, job = recorded(monkeypatch), TRAINING[name].make()
    with dropped_in(job, stages, "gpipe", **more) as pipe, record:
        for _ in range(2):
            loss = job.loss_fn(pipe(*job.inputs), job.targets)
            loss.backward()
            SGD(list(pipe.parameters())).step()
    assert races(record) == []


def test_pipelines_that_share_a_batch_are_ordered_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    record, job = recorded(monkeypatch), TRAINING["attention"].make()
    with compiled(job, 4, "1f1b", SGD, data_parallel=2) as pipe:
        two_steps(record, pipe, job)
    assert races(record) == []


def test_batches_that_are_smaller_are_ordered_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    record, job = recorded(monkeypatch), TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD, dynamic_batch=True) as pipe, record:
        for size in (8, 3, 8, 5):
            pipe.train_step(job.inputs[0][:size], job.targets[:size])
    assert races(record) == []


class Breaks(TorchDispatchMode):
    """Raises what a card raises, at the first tanh."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.tanh.default:
            raise self.error
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("error", "said", "usable"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
            r"^stage 1 on device 1 raised OutOfMemoryError in 2 .*2\.00 GiB\. The devices .*recompute='stage'",
            True,
        ),
        (
            torch.AcceleratorError("CUDA error: device-side assert triggered"),
            r"^stage 1 on device 1 raised AcceleratorError in 2 .*after the fact.*CUDA_LAUNCH_BLOCKING=1",
            False,
        ),
    ],
)
def test_what_only_a_card_raises_is_named(
    error: Exception, said: str, usable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(monkeypatch)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Tanh(), nn.Linear(8, 2))
    job = Job(model, (torch.ones(8, 4),), torch.ones(8, 2), nn.MSELoss())
    with compiled(job, 2, "1f1b", SGD) as pipe:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(StepError, match=said), Breaks(error):
            pipe.train_step(job.inputs, job.targets)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        if usable:
            pipe.train_step(job.inputs, job.targets)
        else:
            with pytest.raises(PipelineClosed, match="AcceleratorError"):
                pipe.train_step(job.inputs, job.targets)


def test_no_memory_for_what_lies_between_stages_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    recorded(monkeypatch)
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        with monkeypatch.context() as patch:
            patch.setattr(RecordedCard, "memory", full)
            with pytest.raises(PipelineError, match=r"card:0 has no memory .* slots of \d+ "):
                pipe.train_step(job.inputs, job.targets)
        pipe.train_step(job.inputs, job.targets)
        with monkeypatch.context() as patch:
            patch.setattr(RecordedCard, "here", full)
            with pytest.raises(StepError, match="card:0 has no memory left for the targets"):
                pipe.train_step(job.inputs, job.targets)
        pipe.train_step(job.inputs, job.targets)


def test_an_error_the_card_reports_at_the_end_of_a_step_is_one_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: RecordedLane) -> None:
        raise torch.AcceleratorError(
            "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be"
        )

    recorded(monkeypatch)
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        monkeypatch.setattr(RecordedLane, "finish", finish)
        with pytest.raises(StepError, match=r"card:0 failed in a training step: .* encountered\. The card reports"):
            pipe.train_step(job.inputs, job.targets)
        with pytest.raises(PipelineClosed, match="illegal memory access"):
            pipe.train_step(job.inputs, job.targets)


def test_a_weight_that_lies_elsewhere_than_its_stage_is_named() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        devices = tuple(Device(f"cuda:0/{i}", "cuda") for i in range(2))
        package = replace(pipe.package, plan=replace(pipe.plan, cluster=Cluster(devices)))
        with pytest.raises(InputError, match=r"'.*weight' of stage 0 is on cpu, the stage runs on cuda:0: the model"):
            lanes_of(package, dict(pipe._weights.current()))


@pytest.mark.parametrize(
    ("devices", "mode", "said"),
    [
        (["cuda:0", "cuda:0"], "train", "there is no device 'cuda:0': torch .* sees no CUDA card here"),
        (["cuda:0", "cpu:0"], "train", "unknown device 'cuda:0'.*do not go together"),
        (Cluster((Device("cuda:0/0", "cuda"), Device("cpu:0"))), "train", "'cpu:0' is of kind 'cpu'.*not on both"),
        (Cluster((Device("big", "cuda"),)), "train", "name it 'cuda:<card>/<number>'"),
        (Cluster((Device("cuda:0/0", "cuda"), Device("cuda:1/1", "cuda"))), "train", "streams of one card"),
        (Cluster((Device("cuda:0/0", "cuda"),)), "infer", "mode='infer' of this version runs on CPU cores only"),
    ],
)
def test_devices_on_cards_that_make_no_sense(
    devices: Any, mode: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=said):
        pipecompile.compile(nn.Linear(2, 2), torch.ones(4, 2), mode=mode, devices=devices)


def test_workers_are_for_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="executor='process' is for CPU cores: devices on cuda:0 are streams"):
        pipecompile.compile(nn.Linear(2, 2), torch.ones(4, 2), mode="train", devices=TWO, executor="process")
    with pytest.raises(PlanError, match=r"no device 'cuda:1': torch sees 1 \(cuda:0 and up\)"):
        pipecompile.compile(nn.Linear(2, 2), torch.ones(4, 2), mode="train", devices=["cuda:1"])
    with pytest.raises(TraceError, match=r"'weight' of Linear is on cpu .* on cuda:0, as the devices are: .*'cuda:0'"):
        run_once(nn.Linear(2, 2), (), {}, "cuda:0")
