"""A pipeline in an ordinary autograd graph, with the caller's loss and optimizer, against plain PyTorch."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from models.training import BATCH, TRAINING, Job
from oracles.training import Masks, pieces_of
from pipecompile.driver import make_cluster
from pipecompile.errors import InputError, PipecompileWarning, PlanError, StepError
from pipecompile.pipelines.train_driver import compile_training
from pipecompile.pipelines.training import TrainingPipeline
from test_training import ADAMW, PARTS, SGD, STEPS, compiled, every_layer_alike, furthest

__all__ = ["every_layer_alike"]  # the fixture, for this file too

#: All but one whose loss is part of the model and has no batch dimension.
NAMES = [name for name in TRAINING if name != "handed_through"]


def dropped_in(job: Job, stages: int, schedule: str, **more: Any) -> TrainingPipeline:
    args, kwargs = ((), job.inputs) if isinstance(job.inputs, dict) else (job.inputs, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        return compile_training(
            job.model, args, kwargs, make_cluster(stages), schedule=schedule, micro_batches=PARTS, profile_seconds=0.02,
            time_limit=2.0, **{"executor": "inline", **more},
        )  # fmt: skip


def call(model: Any, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def eager(job: Job, optimizer: Any) -> tuple[list[float], nn.Module]:
    """Micro-batch by micro-batch through the model, put together, one loss."""
    update, losses = optimizer(list(job.model.parameters())), []
    for step in range(STEPS):
        update.zero_grad()
        parts = []
        for i, piece in enumerate(pieces_of(job.inputs, PARTS)):
            with Masks(0, step, i), torch.random.fork_rng(devices=[]):
                parts.append(call(job.model, piece))
        loss = job.loss_fn(tree_map(lambda *leaves: torch.cat(leaves), *parts), job.targets)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses, job.model


def agree(pipe: TrainingPipeline, job: Job, optimizer: Any, wanted: tuple[list[float], nn.Module]) -> None:
    update, losses = optimizer(list(pipe.parameters())), []
    for _ in range(STEPS):
        update.zero_grad()
        loss = job.loss_fn(call(pipe, job.inputs), job.targets)
        loss.backward()
        update.step()
        losses.append(loss.item())
    assert losses == pytest.approx(wanted[0], rel=1e-10)
    assert losses[0] != losses[-1]
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (job.model, wanted[1])]
    assert furthest(gradients[0], gradients[1]) <= 1e-10
    assert furthest(dict(job.model.state_dict()), dict(wanted[1].state_dict())) <= 1e-10


@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_is_a_part_of_an_autograd_graph(name: str) -> None:
    schedule, stages = ("gpipe", 3) if len(name) % 2 else ("breadth_first", 2)
    optimizer = ADAMW if len(name) % 3 else SGD
    job, wanted = TRAINING[name].make(), eager(TRAINING[name].make(), optimizer)
    with dropped_in(job, stages, schedule) as pipe:
        agree(pipe, job, optimizer, wanted)


@pytest.mark.parametrize("name", ["two_heads", "gpt2"])
def test_in_workers(name: str) -> None:
    job, wanted = TRAINING[name].make(), eager(TRAINING[name].make(), ADAMW)
    with dropped_in(job, 2, "gpipe", executor="process") as pipe:
        agree(pipe, job, ADAMW, wanted)
        result = call(pipe, job.inputs)  # a forward nobody goes on with
        assert torch.allclose(
            job.loss_fn(call(pipe, job.inputs), job.targets).detach(), job.loss_fn(result, job.targets).detach(), atol=1
        )


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_calls_without_backward_failures_and_gradients_that_add_up(executor: str) -> None:
    job = TRAINING["lstm"].make()
    plain = copy.deepcopy(job.model)
    with dropped_in(job, 2, "gpipe", executor=executor) as pipe:
        first = pipe(*job.inputs)
        second = pipe(*job.inputs)
        with pytest.raises(InputError, match="backward\\(\\) of an earlier call"):
            first.sum().backward()
        bad = job.inputs[0].clone()
        bad[3, 1] = 99
        with pytest.raises(StepError, match="raised IndexError in embed"):
            pipe(bad)
        second = pipe(*job.inputs)
        second.sum().backward(retain_graph=True)
        with pytest.raises(InputError, match="backward\\(\\) of an earlier call"):
            second.sum().backward()
        (pipe(*job.inputs) * 2).sum().backward()  # adds to what is there
        (plain(*job.inputs).sum() * 3).backward()
        wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        assert furthest({name: p.grad for name, p in pipe.named_parameters() if p.grad is not None}, wanted) <= 1e-10
        with torch.no_grad():
            assert not pipe(*job.inputs).requires_grad
        assert torch.equal(pipe.eval()(*job.inputs), plain(*job.inputs))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.a(x))
        return self.b(hidden), hidden.argmax(1)


def test_a_result_without_gradient_and_a_weight_without_use() -> None:
    model = Counted().double()
    job = Job(model, (torch.randn(BATCH, 4).double(),), None, nn.MSELoss())
    with dropped_in(job, 2, "gpipe") as pipe:
        result, best = pipe(*job.inputs)
        assert result.requires_grad
        assert not best.requires_grad
        assert torch.equal(best, model(*job.inputs)[1])
        result.sum().backward()
        assert model.unused.grad is None
        assert model.a.weight.grad is not None


def test_what_cannot_be_dropped_in_is_named() -> None:
    job = TRAINING["mlp"].make()
    with pytest.raises(PlanError, match="schedule='1f1b' needs the loss of a micro-batch before the next"):
        dropped_in(job, 2, "1f1b")
    with pytest.raises(InputError, match="loss_fn= and optimizer= go together"):
        dropped_in(job, 2, "gpipe", optimizer=SGD)
    with pytest.raises(InputError, match="clip_norm=, check_finite= and keep_gradients= are for train_step"):
        dropped_in(job, 2, "gpipe", clip_norm=1.0)
    with dropped_in(job, 2, "auto") as pipe:
        assert pipe.program.schedule in ("gpipe", "breadth_first")
        with pytest.raises(InputError, match="compiled without loss_fn= and optimizer="):
            pipe.train_step(job.inputs, job.targets)
        with pytest.raises(InputError, match=r"input '.*' requires gradients"):
            pipe(job.inputs[0].clone().requires_grad_())
    own = TRAINING["handed_through"].make()
    with dropped_in(own, 2, "gpipe") as pipe, pytest.raises(InputError, match="without a batch dimension it cannot"):
        pipe(*own.inputs)
    with compiled(job, 2, "1f1b", partial(torch.optim.SGD, lr=0.1)) as pipe:  # with a loss: the model itself
        assert torch.equal(pipe(*job.inputs), job.model(*job.inputs))
