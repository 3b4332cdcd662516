"""A small network, a stream for it, and pipelines that learn from it, cut the same way every time."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn

import pipecompile
from pipecompile import LearningPipeline
from pipecompile.ir.cluster import Link
from pipecompile.ir.profile import Profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.pipelines import learn_driver, step_planner

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
RULES = ("sync", "weight_stashing", "2bw", "stale", "sideways")
CLOCKS = ("1f1b", "lockstep")

Sample = tuple[torch.Tensor, torch.Tensor | None]


class Skip(nn.Module):
    """Five layers with a BatchNorm, and a skip over all inner ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.c, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        y = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.last(torch.tanh(self.c(y)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return Skip().double()


def stream(count: int, without: Iterable[int] = ()) -> list[Sample]:
    generator, missing = torch.Generator().manual_seed(1), set(without)
    samples: list[Sample] = []
    for i in range(count):
        x = torch.randn(4, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (4,), generator=generator)
        samples.append((x, None if i in missing else y))
    return samples


def learning(model: nn.Module, stages: int, updates: Any = "weight_stashing", **more: Any) -> LearningPipeline:
    options: dict[str, Any] = {
        "loss_fn": nn.CrossEntropyLoss(), "optimizer": SGD, "executor": "inline", "profile_seconds": 0.02, **more,
    }  # fmt: skip
    # Layers all alike, so that the cut is the same every time, and nothing is cut again after measuring.
    with (
        mock.patch.object(ProfileLayers, "apply", _alike),
        mock.patch.object(step_planner, "_TOLERANCE", math.inf),
        mock.patch.object(learn_driver, "update_seconds", return_value=0.0),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
        pipe = pipecompile.compile(
            model, (stream(1)[0][0],), mode="learn", devices=stages, updates=updates, time_limit=2.0, **options
        )
    assert len(pipe.plan.stages) == stages
    return pipe


def _alike(_: ProfileLayers, graph: Any, *__: Any) -> Profile:
    sizes = dict.fromkeys(graph.values, 1) | dict.fromkeys(graph.inputs, 1)
    return Profile((1.0,) * len(graph.layers), sizes, Link(1e-6, 1e12), float(len(graph.layers)))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
