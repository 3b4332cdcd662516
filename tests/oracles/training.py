"""Training in one process and one graph, over the same micro-batches: what a pipeline must equal.

Shares no code with the package. Gradients are accumulated by plain ``backward()`` calls; the
random operators of a micro-batch are seeded by the documented rule (four rounds of SplitMix64
over seed, step, micro-batch, number of the operator) in a dispatch mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

RANDOM = {
    "aten::bernoulli_", "aten::bernoulli", "aten::native_dropout", "aten::rand_like", "aten::randn_like",
    "aten::rrelu_with_noise",
}  # fmt: skip


class Masks(TorchDispatchMode):
    """Seeds every random operator."""

    def __init__(self, seed: int, step: int, micro_batch: int) -> None:
        super().__init__()
        self.key, self.count = (seed, step, micro_batch), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in RANDOM:
            where = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
            cuda = where.type == "cuda"
            generator = torch.cuda.default_generators[where.index] if cuda else torch.default_generator
            generator.manual_seed(mixed([*self.key, self.count]))
            self.count += 1
        return func(*args, **(kwargs or {}))


def mixed(parts: Sequence[int]) -> int:
    size, seed = 2**64, 0
    for part in parts:
        seed = ((seed ^ part) + 11400714819323198485) % size
        seed = ((seed ^ (seed >> 30)) * 13787848793156543929) % size
        seed = ((seed ^ (seed >> 27)) * 10723151780598845931) % size
        seed ^= seed >> 31
    return seed // 2


@dataclass
class Run:
    """What a run leaves: losses, the last gradients, and the model."""

    model: nn.Module
    losses: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)


def train(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss_fn: Callable[[Any, Any], torch.Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    parts: int,
    weights: Sequence[float],
    steps: int,
    seed: int = 0,
    clip: float | None = None,
    accumulate: int = 1,
) -> Run:
    """``steps`` steps over one batch, in ``parts`` micro-batches whose losses are scaled by ``weights``."""
    run = Run(model)
    update = optimizer([p for p in model.parameters() if p.requires_grad])
    pieces = list(zip(pieces_of(inputs, parts), pieces_of(targets, parts), strict=True))
    for step in range(steps):
        if step % accumulate == 0:
            update.zero_grad()
        total = 0.0
        for i, ((piece, target), weight) in enumerate(zip(pieces, weights, strict=True)):
            with Masks(seed, step, i), torch.random.fork_rng(devices=[]):
                result = model(**piece) if isinstance(piece, dict) else model(*piece)
                loss = loss_fn(result, target)
            loss = loss * weight
            loss.backward()
            total += loss.item()
        run.losses.append(total)
        if (step + 1) % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            update.step()
    run.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return run


def pieces_of(nest: Any, parts: int) -> list[Any]:
    """A nest of tensors cut along dimension 0 into pieces whose sizes differ by one at most."""
    if isinstance(nest, torch.Tensor):
        return list(torch.tensor_split(nest, parts))
    if isinstance(nest, dict):
        columns = {key: pieces_of(value, parts) for key, value in nest.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(parts)]
    columns_list = [pieces_of(value, parts) for value in nest]
    return [tuple(column[i] for column in columns_list) for i in range(parts)]
