"""A step that fails changes nothing, and training goes on; what is not finite is stopped and named."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import nn

import pipecompile
from models.training import BATCH, TRAINING, Job
from pipecompile.errors import InputError, NonFiniteError, PipecompileWarning, PipelineClosed, StepError
from test_training import ADAMW, SCHEDULES, SGD, STEPS, agree, compiled, every_layer_alike, furthest, reference

__all__ = ["every_layer_alike"]  # the fixture, for this file too

Executor = Literal["inline", "process"]


@pytest.mark.parametrize(
    ("schedule", "stages", "executor"),
    [(schedule, 2 + i % 2, "inline") for i, schedule in enumerate(SCHEDULES)] + [("1f1b", 3, "process")],
)
def test_a_failed_step_leaves_no_trace(schedule: str, stages: int, executor: Executor) -> None:
    """In the first stage and in the loss, in the first and in a later micro-batch; clipping, so that devices wait."""
    case = TRAINING["lstm"]
    job, wanted = case.make(), reference(case.make(), ADAMW, clip=0.5)
    with compiled(job, stages, schedule, ADAMW, executor=executor, clip_norm=0.5) as pipe:
        for i in (0, 5):
            bad_inputs, bad_targets = job.inputs[0].clone(), job.targets.clone()
            bad_inputs[i], bad_targets[i] = 999, 77
            for _ in range(2):
                with pytest.raises(StepError, match=r"raised IndexError in embed .* in step 0: index out of"):
                    pipe.train_step(bad_inputs, job.targets)
            with pytest.raises(StepError, match=r"raised IndexError .* in step 0: Target 77 is out of"):
                pipe.train_step(job.inputs, bad_targets)
        agree(pipe, job, wanted, 1e-10)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_buffers_and_accumulated_gradients_are_put_back(executor: Executor) -> None:
    case = TRAINING["resnet"]
    job, wanted = case.make(), reference(case.make(), SGD, accumulate=2)
    bad = job.targets.clone()
    bad[-1] = 77  # in the last micro-batch: the gradients of the others have been added by then
    with compiled(job, 2, "zb_h1", SGD, executor=executor) as pipe:
        losses: list[float] = []
        for step in range(STEPS):
            if step % 4 == 1:  # once half a step is accumulated
                with pytest.raises(StepError, match="Target 77"):
                    pipe.train_step(job.inputs, bad, update=False)
            losses.append(float(pipe.train_step(job.inputs, job.targets, update=step % 2 == 1)))
        assert losses == pytest.approx(wanted.losses, rel=1e-10)
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10


def locked(_lock: Any, weights: Any) -> torch.optim.Optimizer:
    return SGD(weights)


_LOCKED = partial(locked, threading.Lock())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"loss_fn": nn.MSELoss}, r"loss_fn=MSELoss is a class: give an object of it, MSELoss\(\.\.\.\)"),
        ({"loss_fn": "mse"}, "loss_fn='mse' is not callable"),
        ({"loss_fn": _LOCKED}, r"loss_fn= cannot be sent to worker processes \(TypeError"),
        (
            {"optimizer": _LOCKED},
            r"optimizer= cannot be sent to worker processes \(TypeError",
        ),
    ],
)
def test_a_loss_or_optimizer_that_cannot_be_used_is_named_at_once(given: dict[str, Any], said: str) -> None:
    job = TRAINING["mlp"].make()
    options = {"loss_fn": job.loss_fn, "optimizer": SGD, **given}
    with pytest.raises(InputError, match=said):
        compiled(replace(job, loss_fn=options["loss_fn"]), 2, "1f1b", options["optimizer"], executor="process")


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5, dtype=torch.float64))

    def forward(self, result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(result * self.scale, target)


def test_a_loss_with_weights_that_nobody_would_train_is_refused() -> None:
    """Its own, or the model's: in a worker these are copies."""
    job, loss = TRAINING["mlp"].make(), Weighing()
    last = [p for p in job.model.parameters() if p.dim() == 2][-1]

    def regularised(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(result, target) + last.norm()

    with (
        compiled(replace(job, loss_fn=regularised), 2, "1f1b", SGD, reduction="mean") as pipe,
        pytest.raises(StepError, match=r"in loss_fn in step 0: loss_fn uses a tensor of shape \(5, 16\), which would"),
    ):
        pipe.train_step(job.inputs, job.targets)
    with compiled(replace(job, loss_fn=loss), 2, "1f1b", SGD, reduction="mean") as pipe:
        with pytest.raises(StepError, match=r"loss_fn uses 'scale' of shape \(5,\)"):
            pipe.train_step(job.inputs, job.targets)
        loss.requires_grad_(False)
        assert float(pipe.train_step(job.inputs, job.targets)) > 0


def test_a_batch_of_one_and_one_smaller_than_the_micro_batches() -> None:
    def short(size: int) -> Job:
        job = TRAINING["mlp"].make()
        return Job(job.model, (job.inputs[0][:size],), job.targets[:size], job.loss_fn)

    job, wanted = short(1), reference(short(1), SGD, parts=1)
    with compiled(job, 2, "1f1b", SGD, parts=1) as pipe:
        agree(pipe, job, wanted, 1e-10)
    with pytest.raises(InputError, match="micro_batches=2: a batch of 1 samples has 1 to 1 micro-batches"):
        compiled(short(1), 2, "1f1b", SGD, parts=2)
    job, few, wanted = short(7), short(6), reference(short(6), SGD, parts=3)
    with compiled(job, 2, "1f1b", SGD, parts=3) as pipe:  # batches may be smaller from then on
        losses = [float(pipe.train_step(few.inputs, few.targets)) for _ in range(STEPS)]
        assert losses == pytest.approx(wanted.losses, rel=1e-10)
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10


class FailsLate(torch.optim.SGD):
    """Refuses to update the weights of the first stage, which come last."""

    def step(self, closure: Any = None) -> Any:
        first = self.param_groups[0]["params"][0]
        if first.shape == (16, 8) and bool(first.grad.any()):  # all zero when an update is timed
            raise RuntimeError("no disk left")
        return super().step(closure)


def test_after_half_an_update_the_pipeline_is_closed() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", partial(FailsLate, lr=0.1)) as pipe:
        with pytest.raises(StepError, match=r"updated its weights already, the pipeline is closed: .* no disk left"):
            pipe.train_step(job.inputs, job.targets)
        with pytest.raises(PipelineClosed, match="no disk left"):
            pipe.train_step(job.inputs, job.targets)


class Delicate(nn.Module):
    """NaN in a known layer for a sample whose first entry is negative, in the loss for one that is 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.slope = nn.BatchNorm1d(4), nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]).expand(4, 2).contiguous())
        self.mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(x[:, :1] * 0.1 + self.mask[0], -1)  # infinite on purpose, as in attention
        hidden = self.norm(torch.tanh(self.a(x))) + weights.sum(-1, keepdim=True)
        hidden = torch.tanh(self.b(hidden) * self.slope.sqrt()) * x[:, :1].sqrt()
        return self.c(hidden)


def delicate_loss(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((result - target).square().sum(1) / (target[:, 0] - 5)).mean()


def delicate(optimizer: Any, executor: Executor) -> Any:
    torch.manual_seed(0)
    job = Job(Delicate().double(), (torch.rand(BATCH, 4).double(),), torch.rand(BATCH, 2).double(), delicate_loss)
    return job, compiled(job, 3, "1f1b", optimizer, executor=executor, check_finite=True)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_is_named(executor: Executor) -> None:
    job, pipe = delicate(ADAMW, executor)
    with pipe:
        pipe.train_step(job.inputs, job.targets)
        before = copy.deepcopy(pipe.state_dict())
        x, y = job.inputs[0].clone(), job.targets.clone()
        x[5, 0] = -1.0
        with pytest.raises(NonFiniteError, match=r"micro-batch 2 is nan in step 1: stage . makes it in layer .*sqrt"):
            pipe.train_step(x, y)
        y[7, 0] = 5.0
        with pytest.raises(NonFiniteError, match=r"micro-batch 3 is -?inf in step 1: the loss function") as found:
            pipe.train_step(job.inputs, y)
        assert found.value.micro_batch == 3
        x[5, 0] = torch.nan
        with pytest.raises(NonFiniteError, match="input 'x' is not finite"):
            pipe.train_step(x, job.targets)
        assert furthest(pipe.state_dict(), before) == 0.0
        with torch.no_grad():
            job.model.get_parameter("b.weight")[0, 0] = torch.nan
        with pytest.raises(NonFiniteError, match=r"'b\.weight' on device . is NaN"):
            pipe.train_step(job.inputs, job.targets)
        pipe.load_state_dict(before)
        assert float(pipe.train_step(job.inputs, job.targets)) > -100


def test_memory_that_is_not_written_yet_is_not_blamed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)).double()
    job = Job(model, (torch.rand(BATCH, 4).double(),), torch.rand(BATCH, 2).double(), nn.MSELoss())
    with compiled(job, 2, "1f1b", SGD, check_finite=True) as pipe:
        with torch.no_grad():
            model[2].weight.fill_(torch.inf)  # times what was dropped is NaN
        torch.use_deterministic_algorithms(True)  # fills the memory that a dropout asks for with NaN
        try:
            with pytest.raises(NonFiniteError, match=r"stage 1 makes it in layer 2 "):
                pipe.train_step(job.inputs, job.targets)
        finally:
            torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_gradients_that_are_not_finite_stop_every_stage(executor: Executor) -> None:
    """The loss is finite, but the square root of zero is infinitely steep."""
    job, pipe = delicate(SGD, executor)
    with pipe:
        before = copy.deepcopy(pipe.state_dict())
        with torch.no_grad():
            job.model.get_parameter("slope")[1] = 0.0
        changed = copy.deepcopy(pipe.state_dict())
        with pytest.raises(NonFiniteError, match="gradients are NaN or infinite in step 0: of slope in stage") as found:
            pipe.train_step(job.inputs, job.targets)
        assert found.value.weights == ("slope",)
        assert furthest(pipe.state_dict(), changed) == 0.0
        pipe.load_state_dict(before)
        pipe.train_step(job.inputs, job.targets)


def test_without_the_option_a_step_with_nan_goes_on() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        assert bool(torch.isnan(pipe.train_step(job.inputs[0] * torch.nan, job.targets)))


def test_a_loss_that_hides_its_reduction_is_asked_for_it() -> None:
    job = TRAINING["mlp"].make()

    def hidden(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(result, target, reduction="sum")

    hidden_job = replace(job, loss_fn=hidden)
    with pytest.warns(PipecompileWarning, match="does not say how it is reduced: taken as a mean"):
        pipecompile.compile(job.model, job.inputs, mode="train", loss_fn=hidden, optimizer=SGD, profile_seconds=0.02)
    with compiled(hidden_job, 2, "gpipe", SGD, reduction="sum") as pipe:
        wanted = hidden(job.model(*job.inputs), job.targets)
        assert pipe.train_step(job.inputs, job.targets).item() == pytest.approx(wanted.item(), rel=1e-12)
