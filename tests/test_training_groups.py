"""Parameter groups with settings of their own, against one plain torch optimizer with the same groups."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from models.training import TRAINING
from oracles.training import pieces_of
from pipecompile.errors import InputError
from test_training import ADAMW, PARTS, SGD, STEPS, agree, compiled, every_layer_alike, furthest, reference

__all__ = ["every_layer_alike"]  # the fixture, for this file too


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """No decay and a slower rate for vectors; a frozen parameter among them does no harm."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() > 1]},
        {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0, "lr": 0.001},
    ]


def plain(optimizer: Any, model: nn.Module) -> torch.optim.Optimizer:
    return optimizer(decay_groups(model))


@pytest.mark.parametrize(
    ("name", "optimizer", "stages", "executor"),
    [("gpt2", ADAMW, 3, "inline"), ("frozen", SGD, 2, "inline"), ("resnet", ADAMW, 2, "process")],
)
def test_groups_train_as_in_one_plain_optimizer(name: str, optimizer: Any, stages: int, executor: str) -> None:
    job, twin = TRAINING[name].make(), TRAINING[name].make()
    wanted = reference(twin, lambda _: plain(optimizer, twin.model))
    alone = reference(TRAINING[name].make(), optimizer)
    with compiled(job, stages, "1f1b", optimizer, param_groups=decay_groups, executor=executor) as pipe:
        agree(pipe, job, wanted, 1e-10)
        state = pipe.optimizer_state_dict()
    assert furthest(dict(job.model.state_dict()), dict(alone.model.state_dict())) > 1e-4, "groups made no difference"
    other = plain(optimizer, job.model)
    assert [len(g["params"]) for g in state["param_groups"]] == [len(g["params"]) for g in other.param_groups]
    other.load_state_dict(state)
    mine = [{k: v for k, v in group.items() if k != "params"} for group in other.param_groups]
    theirs = [{k: v for k, v in g.items() if k != "params"} for g in plain(optimizer, twin.model).param_groups]
    assert mine == theirs


def test_state_moves_to_plain_pytorch_and_back_through_a_checkpoint(tmp_path: Any) -> None:
    """Patterns of names, first that fits; three steps here, three there, three here again."""
    groups = [{"params": ["*.bias", "0.weight"], "weight_decay": 0.0}, {"params": "*", "lr": 0.01}]
    case, path = TRAINING["mlp"], tmp_path / "c.safetensors"

    def torch_groups(model: nn.Module) -> list[dict[str, Any]]:
        named = dict(model.named_parameters())
        first = [name for name in named if name.endswith("bias") or name == "0.weight"]
        first.sort(key=lambda name: name == "0.weight")  # in the order of the patterns
        rest = [name for name in named if name not in first]
        return [{**g, "params": [named[n] for n in names]} for g, names in zip(groups, (first, rest), strict=True)]

    def eager_steps(job: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
        losses: list[float] = []
        for _ in range(count):
            optimizer.zero_grad()
            parts = zip(pieces_of(job.inputs[0], PARTS), pieces_of(job.targets, PARTS), strict=True)
            found = [job.loss_fn(job.model(x), y) / PARTS for x, y in parts]
            for loss in found:
                loss.backward()
            optimizer.step()
            losses.append(sum(loss.item() for loss in found))
        return losses

    whole = case.make()
    wanted = eager_steps(whole, ADAMW(torch_groups(whole.model)), 9)
    job, losses = case.make(), list[float]()
    with compiled(job, 3, "zb_h1", ADAMW, param_groups=groups) as pipe:
        losses += [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
        optimizer = ADAMW(torch_groups(job.model))
        optimizer.load_state_dict(copy.deepcopy(pipe.optimizer_state_dict()))
        losses += eager_steps(job, optimizer, 3)
        pipe.load_optimizer_state_dict(optimizer.state_dict())
        pipe.save_checkpoint(path)
    again = case.make()
    with compiled(again, 2, "gpipe", ADAMW, param_groups=groups) as pipe:
        pipe.load_checkpoint(path)
        losses += [float(pipe.train_step(again.inputs, again.targets)) for _ in range(3)]
    assert losses == pytest.approx(wanted, rel=1e-10)


def test_a_scheduler_sets_the_rate_of_each_group() -> None:
    rates = [lambda step: 0.9**step, lambda step: 1.0 / (1 + step)]
    job, twin = TRAINING["mlp"].make(), TRAINING["mlp"].make()
    optimizer = plain(SGD, twin.model)
    scheduler, wanted = LambdaLR(optimizer, rates), list[float]()
    for _ in range(STEPS):
        optimizer.zero_grad()
        parts = zip(pieces_of(twin.inputs[0], PARTS), pieces_of(twin.targets, PARTS), strict=True)
        found = [twin.loss_fn(twin.model(x), y) / PARTS for x, y in parts]
        for loss in found:
            loss.backward()
        optimizer.step()
        scheduler.step()
        wanted.append(sum(loss.item() for loss in found))
    empty = SGD([{"params": [torch.zeros(0)]}, {"params": [torch.zeros(0)], "lr": 0.001}])
    scheduler, losses = LambdaLR(empty, rates), list[float]()
    with compiled(job, 3, "1f1b", SGD, param_groups=decay_groups) as pipe:
        for _ in range(STEPS):
            for group, rate in enumerate(scheduler.get_last_lr()):
                pipe.set_optimizer(group, lr=rate)
            losses.append(float(pipe.train_step(job.inputs, job.targets)))
            empty.step()
            scheduler.step()
    assert losses == pytest.approx(wanted, rel=1e-10)
    assert furthest(dict(job.model.state_dict()), dict(twin.model.state_dict())) <= 1e-10


def test_groups_that_make_no_sense_are_named() -> None:
    job = TRAINING["mlp"].make()
    first = next(iter(job.model.parameters()))
    for groups, message in [
        ([{"params": "*.weight"}], "has no group for 0.bias, 2.bias"),
        (
            [{"params": "*.wieght"}, {"params": "*"}],
            "param_groups[0]: no parameter is called '*.wieght'; there are 0.w",
        ),
        ([{"params": [first]}, {"params": [first]}], "0.weight is in param_groups[0] and param_groups[1]"),
        ([{"params": [torch.zeros(3)]}], "param_groups[0]: Tensor of another model, or no parameter"),
        ([{"lr": 0.1}], "param_groups[0] has no 'params'"),
        ([{"params": "*"}, {"params": "*.bias"}], "param_groups[1] gets no parameter"),
    ]:
        with pytest.raises(InputError, match=re.escape(message)):
            compiled(job, 2, "1f1b", SGD, param_groups=groups)
    with compiled(job, 2, "1f1b", partial(torch.optim.SGD, lr=0.1), param_groups=decay_groups) as pipe:
        with pytest.raises(InputError, match="there is no parameter group 2: this pipeline has 2"):
            pipe.set_optimizer(2, lr=0.1)
        with pytest.raises(InputError, match=r"has parameter groups of \[10\] parameters; expected \[5, 5\]"):
            pipe.load_optimizer_state_dict(SGD(job.model.parameters()).state_dict())
