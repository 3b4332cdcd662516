"""A pipeline's engine without a pipeline: an executor the test drives step by step, a clock it sets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import pipecompile
from pipecompile.errors import PipelineClosed
from pipecompile.streams.ledger import Ledger


class HandDriven:
    """An executor that finishes a sample when told to. Doubles its input."""

    def __init__(self) -> None:
        self.line: deque[tuple[int, list[Any]]] = deque()
        self.done: deque[tuple[int, list[Any]]] = deque()
        self.count = self.nudges = 0
        self.closed = False

    @property
    def in_flight(self) -> int:
        return len(self.line) + len(self.done)

    def submit(self, leaves: list[Any]) -> int:
        self.line.append((self.count, leaves))
        self.count += 1
        return self.count - 1

    def late(self, on: bool) -> None:
        pass

    def finish(self) -> None:
        if self.line:
            number, leaves = self.line.popleft()
            self.done.append((number, [leaf * 2 for leaf in leaves]))

    def poll(self) -> tuple[int, list[Any]] | None:
        return self.done.popleft() if self.done else None

    def seconds(self, sample: int) -> tuple[float, ...]:
        return (float(sample),)

    def nudge(self) -> None:
        self.nudges += 1


class FakeEngine:
    """What a feed asks of an engine; nothing is ever compiled."""

    def __init__(self, stages: int = 2) -> None:
        self.ledger = Ledger()
        self.session = HandDriven()
        self.closed = False
        self.package = SimpleNamespace(modules=range(stages))
        self.arguments = SimpleNamespace(of_item=lambda item: [item])

    def ready(self, leaves: Any) -> HandDriven:
        return self.session

    def takes(self, leaves: Any) -> bool:
        return True

    def guard(self, action: Any) -> Any:
        return action()

    def rebuild(self, leaves: list[Any]) -> Any:
        return leaves[0]

    def check(self) -> None:
        if self.closed:
            raise PipelineClosed("closed")


class Stateful(nn.Module):
    """Each result depends on all samples before it, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.mul_(0.5).add_(x.mean(0), alpha=0.5)
        return self.second(torch.relu(self.first(x - self.mean)))


def mlp(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)).eval()


def compiled(model: nn.Module, *args: Any, **options: Any) -> pipecompile.InferencePipeline:
    options = {"devices": 2, "executor": "inline", "profile_seconds": 0.05, **options}
    return pipecompile.compile(model.eval(), args, **options)


def inputs(count: int, rows: int = 2, width: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


def outputs(model: nn.Module, xs: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(x) for x in xs]


def same(got: Iterable[torch.Tensor], want: Iterable[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def balanced(counts: pipecompile.Counts) -> bool:
    return counts.submitted == counts.delivered + counts.dropped + counts.failed + counts.in_flight
