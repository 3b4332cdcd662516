"""Leave a model as it was found: calls that only look at it may move its state."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from pipecompile.passes.operators import buffers_of


def cards() -> list[int]:
    """The CUDA cards in use, whose random state a call may move: for ``torch.random.fork_rng``."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []


@contextmanager
def state_kept(model: nn.Module) -> Generator[None]:
    """Put a model's parameters, buffers and tensor attributes back: the objects and their values."""
    holders = [(m, key, b) for m in model.modules() for key, b in buffers_of(m).items()]
    attributes = [value for m in model.modules() for value in vars(m).values() if isinstance(value, torch.Tensor)]
    tensors = (*model.parameters(), *model.buffers(), *attributes)
    saved = [(t, t.clone()) for t in tensors if not is_lazy(t) and not t.is_meta and t.layout is torch.strided]
    try:
        yield
    finally:
        for owner, key, buffer in holders:
            buffers_of(owner)[key] = buffer
        with torch.no_grad():
            for tensor, value in saved:
                if not torch.equal(tensor, value):  # weights may be mapped from a file: leave them untouched
                    tensor.copy_(value)


@contextmanager
def attributes_kept(model: nn.Module) -> Generator[None]:
    """Give the mode of every module and its tensor attributes their old values again."""
    before = [(vars(m), dict(vars(m))) for m in model.modules()]
    try:
        yield
    finally:
        for now, then in before:
            for key, value in then.items():
                if key == "training" or isinstance(value, torch.Tensor) or isinstance(now.get(key), torch.Tensor):
                    now[key] = value
