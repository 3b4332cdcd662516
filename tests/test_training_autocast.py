"""Stages under bf16 autocast give what plain PyTorch gives under it, micro-batch by micro-batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.training import TRAINING, Job
from oracles.training import pieces_of
from pipecompile.errors import InputError
from pipecompile.ir.program import HOST
from test_training import ADAMW, PARTS, SGD, STEPS, compiled, every_layer_alike, furthest, reference
from test_training_drop_in import dropped_in

__all__ = ["every_layer_alike"]  # the fixture, for this file too

NAMES = [name for name in TRAINING if name != "handed_through"]


class Autocast(nn.Module):
    """The model under autocast, as torch's documentation has it, and its results in float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = self.model(*args, **kwargs)
        return torch.utils._pytree.tree_map(
            lambda v: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v, result
        )


def twin(name: str) -> Job:
    job = TRAINING[name].make(torch.float32)
    return Job(Autocast(job.model), job.inputs, job.targets, job.loss_fn)


@pytest.mark.parametrize(
    ("name", "schedule", "stages", "executor"),
    [
        pytest.param(name, schedule, stages, executor, marks=[] if quick else pytest.mark.slow)
        for i, name in enumerate(NAMES)
        for schedule, stages, executor, quick in (
            ("zb_h1", 2, "inline", i % 4 == 0),
            ("1f1b", 3, "inline", name in ("two_heads", "attention")),
            ("zb_v" if i % 2 else "gpipe", 2, "process", name == "gpt2"),
        )
    ],
)
def test_autocast_equals_plain_autocast(name: str, schedule: str, stages: int, executor: str) -> None:
    job, wanted = TRAINING[name].make(torch.float32), reference(twin(name), SGD)
    full = reference(TRAINING[name].make(torch.float32), SGD)
    with compiled(job, stages, schedule, SGD, executor=executor, autocast=torch.bfloat16) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(STEPS)]
        tied = any(edge.tied for edge in pipe.program.edges)
    # The same kernels. Only where a weight goes to several stages are gradients added in another precision.
    tolerance = 1e-2 if tied else 1e-5
    assert losses == pytest.approx(wanted.losses, rel=tolerance)
    mine = {f"model.{key}": value for key, value in job.model.state_dict().items()}
    assert furthest(mine, dict(wanted.model.state_dict())) <= tolerance
    assert furthest(dict(job.model.state_dict()), dict(full.model.state_dict())) > 1e-4, "nothing was half precision"


def test_what_travels_is_half_and_weights_and_losses_are_not() -> None:
    job = TRAINING["mlp"].make(torch.float32)
    seen: list[torch.dtype] = []

    def loss_fn(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(result.dtype)
        return nn.functional.cross_entropy(result, target)

    job = Job(job.model, job.inputs, job.targets, loss_fn)
    with compiled(job, 2, "zb_h1", ADAMW, autocast=torch.bfloat16) as pipe:
        loss = pipe.train_step(job.inputs, job.targets)
        gradients = pipe.gradients()
        dtypes = {spec.dtype for edge in pipe.program.edges if edge.source != HOST for spec in edge.specs}
        assert dtypes == {"bfloat16"}
        assert "pending" in pipe.step_package.package.modules[0].source, "the backward is still split"
    assert loss.dtype is torch.float32
    assert set(seen) == {torch.float32}
    assert len(seen) == PARTS
    assert {g.dtype for g in gradients.values()} == {torch.float32}
    with pytest.raises(InputError, match=r"autocast=torch\.float16: only torch\.bfloat16"):
        compiled(job, 2, "1f1b", SGD, autocast=torch.float16)
    with pytest.raises(InputError, match=r"autocast='bf16' is no dtype of torch: write autocast=torch\.bfloat16"):
        compiled(job, 2, "1f1b", SGD, autocast="bf16")


def test_autocast_in_a_graph_of_the_caller() -> None:
    job, other = TRAINING["mlp"].make(torch.float32), TRAINING["mlp"].make(torch.float32)
    update, losses, wanted = SGD(job.model.parameters()), list[float](), list[float]()
    with dropped_in(job, 2, "gpipe", autocast=torch.bfloat16) as pipe:
        for _ in range(STEPS):
            update.zero_grad()
            result = pipe(*job.inputs)
            assert result.dtype is torch.bfloat16
            loss = job.loss_fn(result.float(), job.targets)
            loss.backward()
            update.step()
            losses.append(loss.item())
    plain = SGD(other.model.parameters())
    for _ in range(STEPS):
        plain.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):  # a cast for each micro-batch
            result = torch.cat([other.model(piece) for piece in pieces_of(other.inputs[0], PARTS)])
        loss = other.loss_fn(result.float(), other.targets)
        loss.backward()
        plain.step()
        wanted.append(loss.item())
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert len(set(losses)) == STEPS
