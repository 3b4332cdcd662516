"""Layers whose compute is a wait: devices that this machine does not have.

Workers import this module for its operator. Everything else (stage modules, rings, updates) is real.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16


@torch.library.custom_op("pipecompile_bench::wait", mutates_args=())
def wait(x: Tensor, forward: float, backward: float) -> Tensor:
    """``x``, after ``forward`` seconds; its gradient takes ``backward`` seconds."""
    del backward
    time.sleep(forward)
    return x.clone()


@wait.register_fake
def _(x: Tensor, forward: float, backward: float) -> Tensor:
    del forward, backward
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.backward_seconds = inputs[2]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    time.sleep(ctx.backward_seconds)
    return gradient, None, None


wait.register_autograd(_backward, setup_context=_setup)


class Waiting(nn.Module):
    """A layer with a few weights that takes as long as another did."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """The linear layer's result, later."""
        return torch.ops.pipecompile_bench.wait(self.linear(x), *self.seconds)


def lengths(layers: nn.Sequential, x: Tensor, repeats: int = 7) -> list[tuple[float, float]]:
    """Seconds that each layer takes on this thread, forward and backward, in its place: medians."""
    seen: list[list[tuple[float, float]]] = [[] for _ in layers]
    for _ in range(repeats + 2):
        values, y = list[tuple[Tensor, Tensor]](), x
        times = list[float]()
        for layer in layers:
            y = y.detach().requires_grad_()
            begin = time.perf_counter()
            out = layer(y)
            times.append(time.perf_counter() - begin)
            values.append((y, out))
            y = out
        for i, (y, out) in reversed(list(enumerate(values))):
            gradient, wanted = torch.ones_like(out), [y, *layers[i].parameters()]
            begin = time.perf_counter()
            torch.autograd.grad(out, wanted, gradient)
            seen[i].append((times[i], time.perf_counter() - begin))
    medians = [[statistics.median(pair[k] for pair in pairs[2:]) for k in (0, 1)] for pairs in seen]
    return [(forward, backward) for forward, backward in medians]
