"""Training in worker processes: the same numbers, and what happens when a worker dies, hangs or raises."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from models.training import TRAINING, Job, Training
from pipecompile.errors import PipelineClosed, StepError, WorkerDied, WorkerHung
from pipecompile.ir.cluster import Link
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.runtime.process_step import ProcessTrainer
from test_training import (
    ADAMW,
    CASES,
    OPTIMIZERS,
    SCHEDULES,
    SGD,
    STEPS,
    agree,
    compiled,
    every_layer_alike,
    furthest,
    reference,
)

__all__ = ["every_layer_alike"]  # the fixture, for this file too

QUICK = [
    (TRAINING[name], schedule, 2 + i % 2, "adamw" if i % 2 else "sgd")
    for i, (name, schedule) in enumerate(
        zip(["resnet", "gpt2", "unet", "dropout", "lstm", "statistics"], SCHEDULES, strict=True)
    )
]
EVERYTHING = [(case, SCHEDULES[i % 6], 2 + i % 2, "sgd") for i, case in enumerate(CASES)]


def pids(pipe: TrainingPipeline) -> tuple[int, ...]:
    trainer = pipe._trainer
    assert isinstance(trainer, ProcessTrainer)
    return trainer.pids


def gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(("case", "schedule", "stages", "optimizer"), QUICK, ids=str)
def test_workers_give_what_plain_pytorch_gives(case: Training, schedule: str, stages: int, optimizer: str) -> None:
    job, wanted = case.make(), reference(case.make(), OPTIMIZERS[optimizer])
    with compiled(job, stages, schedule, OPTIMIZERS[optimizer], executor="process") as pipe:
        agree(pipe, job, wanted, 1e-10)
        workers = pids(pipe)
    assert len(workers) == len(pipe.plan.cluster.devices)
    assert all(gone(pid) for pid in workers)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "schedule", "stages", "optimizer"), EVERYTHING, ids=str)
def test_workers_give_what_plain_pytorch_gives_everywhere(
    case: Training, schedule: str, stages: int, optimizer: str
) -> None:
    test_workers_give_what_plain_pytorch_gives(case, schedule, stages, optimizer)


def test_clipping_accumulation_settings_and_optimizer_state_reach_the_workers() -> None:
    job, wanted = TRAINING["mlp"].make(), reference(TRAINING["mlp"].make(), ADAMW, clip=0.05, accumulate=2)
    with compiled(job, 3, "1f1b", ADAMW, executor="process", clip_norm=0.05) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets, update=step % 2 == 1)) for step in range(STEPS)]
        assert losses == pytest.approx(wanted.losses, rel=1e-10)
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10
        state = pipe.optimizer_state_dict()
        plain = ADAMW(list(job.model.parameters()))
        plain.load_state_dict(state)
        assert {int(entry["step"]) for entry in state["state"].values()} == {STEPS // 2}
        before = {name: value.clone() for name, value in pipe.state_dict().items()}
        pipe.load_optimizer_state_dict(state)
        pipe.set_optimizer(lr=0.0, weight_decay=0.0)
        pipe.train_step(job.inputs, job.targets)
        assert furthest(pipe.state_dict(), before) == 0.0


def test_a_state_dict_loaded_between_steps_is_seen_by_the_workers() -> None:
    job = TRAINING["mlp"].make()
    start = {name: value.clone() for name, value in job.model.state_dict().items()}
    plain = partial(torch.optim.SGD, lr=0.1)
    with compiled(job, 2, "1f1b", plain, executor="process") as pipe:
        first = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
        pipe.load_state_dict(start)
        assert [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)] == first


def test_resume_in_a_new_pipeline_goes_on_bit_for_bit(tmp_path: Path) -> None:
    case = TRAINING["dropout"]
    job = case.make()
    with compiled(job, 2, "zb_h1", ADAMW, executor="process") as pipe:
        for _ in range(3):
            pipe.train_step(job.inputs, job.targets)
        torch.save({"model": pipe.state_dict(), "training": pipe.training_state_dict()}, tmp_path / "checkpoint.pt")
        wanted = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
    saved = torch.load(tmp_path / "checkpoint.pt")
    again = case.make()
    with compiled(again, 2, "zb_h1", ADAMW, executor="process") as pipe:
        pipe.load_state_dict(saved["model"])
        pipe.load_training_state_dict(saved["training"])
        assert [float(pipe.train_step(again.inputs, again.targets)) for _ in range(3)] == wanted


def slow_loss(result: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    time.sleep(0.3)
    return nn.functional.cross_entropy(result, targets)


@pytest.mark.parametrize("device", [0, 1])
def test_a_worker_killed_in_a_step_is_one_named_exception(device: int, tmp_path: Path) -> None:
    """And the last checkpoint stays whole: another pipeline goes on from it as if nothing had happened."""
    job, twin = TRAINING["mlp"].make(), TRAINING["mlp"].make()
    with compiled(twin, 2, "1f1b", SGD) as whole:
        wanted = [float(whole.train_step(twin.inputs, twin.targets)) for _ in range(3)]
    pipe = compiled(Job(job.model, job.inputs, job.targets, slow_loss), 2, "1f1b", SGD, executor="process")
    pipe.train_step(job.inputs, job.targets)
    pipe.save_checkpoint(tmp_path / "last.safetensors")
    before = {name: value.clone() for name, value in pipe.state_dict().items()}
    victim = pids(pipe)[device]
    timer = threading.Timer(0.4, os.kill, (victim, signal.SIGKILL))
    timer.start()
    workers = pids(pipe)
    with pytest.raises(WorkerDied, match=rf"device {device} \(stages {device}\) was killed by SIGKILL"):
        pipe.train_step(job.inputs, job.targets)
    timer.join()
    assert all(gone(pid) for pid in workers)
    assert furthest(pipe.state_dict(), before) == 0.0  # no half of an update
    again = TRAINING["mlp"].make()
    with compiled(again, 2, "1f1b", SGD) as other:
        other.load_checkpoint(tmp_path / "last.safetensors")
        assert [float(other.train_step(again.inputs, again.targets)) for _ in range(2)] == wanted[1:]
    with pytest.raises(PipelineClosed, match="it failed: device"):
        pipe.train_step(job.inputs, job.targets)


def hanging_loss(result: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    time.sleep(60)
    return result.sum()


def test_a_worker_that_hangs_is_named() -> None:
    job = TRAINING["mlp"].make()
    hung = Job(job.model, job.inputs, job.targets, hanging_loss)
    with (
        compiled(hung, 2, "1f1b", SGD, executor="process", hang_seconds=1.0) as pipe,
        pytest.raises(WorkerHung, match=r"device 1 \(stages 1\) made no progress for .* after waiting for a message"),
    ):
        pipe.train_step(job.inputs, job.targets)


def test_what_a_stage_raises_comes_back_with_its_place() -> None:
    job = TRAINING["lstm"].make()
    with compiled(job, 2, "1f1b", SGD, executor="process") as pipe:
        bad = job.inputs[0].clone()
        bad[3, 2] = 999
        with pytest.raises(
            StepError, match=r"stage 0 on device 0 raised IndexError in embed .* in step 0: index out of"
        ):
            pipe.train_step(bad, job.targets)
        assert float(pipe.train_step(job.inputs, job.targets)) > 0


def test_a_worker_that_is_stopped_while_it_waits_is_named() -> None:
    """Not a deadlock: device 0 has sent what it can and waits for gradients, which come to nobody."""
    job = TRAINING["mlp"].make()
    pipe = compiled(
        Job(job.model, job.inputs, job.targets, slow_loss), 2, "1f1b", SGD, executor="process", hang_seconds=1.0
    )
    with pipe:
        pipe.train_step(job.inputs, job.targets)
        timer = threading.Timer(0.15, os.kill, (pids(pipe)[0], signal.SIGSTOP))
        timer.start()
        with pytest.raises(WorkerHung, match=r"device 0 .* its process is stopped .* waiting for"):
            pipe.train_step(job.inputs, job.targets)


@pytest.mark.parametrize("edge", ["0>1", "1>0"])
def test_a_slow_edge_changes_no_number(edge: str) -> None:
    job, wanted = TRAINING["mlp"].make(), reference(TRAINING["mlp"].make(), SGD)
    with compiled(job, 2, "zb_h1", SGD, executor="process", throttle={edge: Link(0.002, 1e9)}) as pipe:
        agree(pipe, job, wanted, 1e-10)


def test_nothing_is_left_behind() -> None:
    job = TRAINING["mlp"].make()
    pipe = compiled(job, 2, "1f1b", SGD, executor="process")
    pipe.train_step(job.inputs, job.targets)  # the arena of the weights stays with the model
    pipe.close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        other = compiled(job, 2, "1f1b", SGD, executor="process")
        other.train_step(job.inputs, job.targets)
        workers = pids(other)
        other.close()
        other.close()
        assert all(gone(pid) for pid in workers)
    assert len(os.listdir("/proc/self/fd")) <= before
