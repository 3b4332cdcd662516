"""Models whose gradients are of an odd kind: sparse ones, and none where plain PyTorch has none."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from models.training import BATCH, Job, classes
from oracles.training import train
from test_training import PARTS, compiled, every_layer_alike, furthest, loss_shares

__all__ = ["every_layer_alike"]  # the fixture, for this file too

_STEPS = 4
#: Moves a weight whose gradient is zero, and leaves one alone that has none.
_DECAY = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)


class Aside(nn.Module):
    """Three layers behind one another of which the first two lead to nothing that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).tanh()).detach())


def aside() -> Job:
    return Job(Aside(), (torch.randn(BATCH, 6),), classes(3), nn.CrossEntropyLoss())


def sparse() -> Job:
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3))
    return Job(model, (classes(20, BATCH, 3),), classes(3), nn.CrossEntropyLoss())


@pytest.mark.parametrize(
    ("build", "schedule", "optimizer", "shared"),
    [
        (sparse, "1f1b", partial(torch.optim.SGD, lr=0.1), 1),  # ids lie in ring slots that are used again
        (sparse, "1f1b", partial(torch.optim.SGD, lr=0.1), 2),  # what the other pipeline sends is dense
        (aside, "1f1b", _DECAY, 1),
        (aside, "zb_h1", _DECAY, 1),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_odd_gradients_are_those_of_plain_pytorch(build: Any, schedule: str, optimizer: Any, shared: int) -> None:
    torch.manual_seed(5)
    job = build()
    job.model.double()
    inputs = tuple(value.double() if value.is_floating_point() else value for value in job.inputs)
    job = Job(job.model, inputs, job.targets, job.loss_fn)
    wanted = train(
        copy.deepcopy(job.model), inputs, job.targets, job.loss_fn, optimizer, parts=PARTS,
        weights=loss_shares(job, PARTS), steps=_STEPS,
    )  # fmt: skip
    with compiled(job, 2, schedule, optimizer, data_parallel=shared) as pipe:
        losses = [float(pipe.train_step(inputs, job.targets)) for _ in range(_STEPS)]
    assert losses == pytest.approx(wanted.losses, rel=1e-10)
    assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10
