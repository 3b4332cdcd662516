"""torch's own schedulers set the learning rate of a pipeline, step by step as in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR

from models.training import TRAINING, Job
from oracles.training import pieces_of
from pipecompile.errors import InputError
from pipecompile.pipelines.training import TrainingPipeline
from test_training import PARTS, SGD, STEPS, compiled, every_layer_alike, furthest

__all__ = ["every_layer_alike"]  # the fixture, for this file too

Scheduler = Callable[[torch.optim.Optimizer], LRScheduler]
STEP: Scheduler = partial(StepLR, step_size=3, gamma=0.5)
CYCLE: Scheduler = partial(OneCycleLR, max_lr=0.1, total_steps=STEPS + 1)  # warms up, and cycles momentum too


def eager(job: Job, scheduler: Scheduler) -> tuple[list[float], list[float]]:
    """Losses and learning rates of a loop as torch's documentation writes it; the job's model is trained."""
    optimizer = SGD(job.model.parameters())
    rates, losses, used = scheduler(optimizer), [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for piece, target in zip(pieces_of(job.inputs, PARTS), pieces_of(job.targets, PARTS), strict=True):
            loss = job.loss_fn(job.model(*piece), target) / PARTS
            loss.backward()
            total += loss.item()
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
        losses.append(total)
    return losses, used


class Rates:
    """A scheduler on an optimizer without weights, whose settings a pipeline takes before each step."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.optimizer = SGD([torch.zeros(0)])
        self.scheduler = scheduler(self.optimizer)

    def drive(self, pipe: TrainingPipeline, job: Job, steps: int) -> tuple[list[float], list[float]]:
        losses, used = [], []
        for _ in range(steps):
            group = self.optimizer.param_groups[0]
            pipe.set_optimizer(lr=group["lr"], momentum=group["momentum"])
            losses.append(float(pipe.train_step(job.inputs, job.targets)))
            self.optimizer.step()
            self.scheduler.step()
            used.append(pipe.optimizer_state_dict()["param_groups"][0]["lr"])
        return losses, used


@pytest.mark.parametrize("scheduler", [STEP, CYCLE], ids=["step", "one_cycle"])
def test_a_scheduler_drives_a_pipeline_as_it_drives_an_optimizer(scheduler: Scheduler) -> None:
    job, twin = TRAINING["mlp"].make(), TRAINING["mlp"].make()
    wanted, rates = eager(twin, scheduler)
    with compiled(job, 3, "1f1b", SGD) as pipe:
        losses, used = Rates(scheduler).drive(pipe, job, STEPS)
    assert used == rates
    assert len(set(rates)) > 5, "the learning rate never changed"
    assert losses == pytest.approx(wanted, rel=1e-10)
    assert furthest(dict(job.model.state_dict()), dict(twin.model.state_dict())) <= 1e-10


def test_a_scheduler_goes_on_from_a_checkpoint(tmp_path: Any) -> None:
    """With both states as ``extra``: a scheduler reckons from the learning rate of its optimizer."""
    twin, path = TRAINING["mlp"].make(), tmp_path / "at_ten.safetensors"
    wanted, rates = eager(twin, STEP)
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        first = Rates(STEP)
        first.drive(pipe, job, 10)
        extra = {"rates": first.optimizer.state_dict(), "scheduler": first.scheduler.state_dict()}
        pipe.save_checkpoint(path, extra=extra)
    again = TRAINING["mlp"].make()
    with compiled(again, 3, "gpipe", SGD) as pipe:
        extra, second = pipe.load_checkpoint(path), Rates(STEP)
        second.optimizer.load_state_dict(extra["rates"])
        second.scheduler.load_state_dict(extra["scheduler"])
        losses, used = second.drive(pipe, again, STEPS - 10)
    assert used == rates[10:]
    assert losses == pytest.approx(wanted[10:], rel=1e-10)
    assert furthest(dict(again.model.state_dict()), dict(twin.model.state_dict())) <= 1e-10


def test_a_setting_that_no_optimizer_has() -> None:
    pipe = compiled(TRAINING["mlp"].make(), 2, "gpipe", SGD)
    with pipe, pytest.raises(InputError, match=r"has no learning_rate; there are .* lr, "):
        pipe.set_optimizer(learning_rate=3.0)
