"""A pipeline as a part of an ordinary autograd graph: ``loss = criterion(pipe(x), y); loss.backward()``.

The forward of all micro-batches runs when the pipeline is called, their backward when autograd
comes to it: fill, then drain. So only schedules of that order can be used, and every stage keeps
the activations of all micro-batches meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.autograd.function import once_differentiable

from pipecompile.errors import InputError
from pipecompile.ir.training import StepPackage, StepRequest
from pipecompile.ir.tree import unflatten

#: Schedules whose forwards are all done before the first backward.
FILL_AND_DRAIN = ("gpipe", "breadth_first")


class Halves(Protocol):
    """Runs a step in two halves; see :class:`pipecompile.runtime.inline_step.Trainer`."""

    def forward(self, request: StepRequest) -> list[dict[str, Any]]:
        """Results of each micro-batch by name."""
        ...

    def backward(self, gradients: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Gradients of weights by placeholder name."""
        ...


class DropIn:
    """Calls a pipeline as autograd would call an operator. ``tensors`` are the weights by placeholder name."""

    def __init__(self, step: StepPackage, tensors: Mapping[str, torch.Tensor]) -> None:
        self._step, self._tensors = step, tensors
        self._owned = [name for names in step.owned.values() for name in names]
        edges = step.package.program.edges
        self._learned = [v for edge in edges if edge.kind == "gradient" for v in edge.values]
        refs = [ref.name for ref in step.package.outputs if ref.kind == "value"]
        self._values = list(dict.fromkeys(refs))
        self._latest = 0

    def call(self, ready: Callable[[], Halves], request: StepRequest, whole: Sequence[Any], sizes: list[int]) -> Any:
        """The model's result for a whole batch, as part of the graph.

        Args:
            ready: gives the trainer.
            request: the step; only its inputs and number are used.
            whole: the flat inputs of the whole batch, for results that are inputs.
            sizes: samples per micro-batch.

        Raises:
            InputError: if an input wants a gradient, or a result cannot be put together.
        """
        package = self._step.package
        for name, leaf in zip(package.input_names, whole, strict=True):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise InputError(
                    f"input {name!r} requires gradients, which a pipeline does not compute: detach it, or put what "
                    "computes it into the pipelined model"
                )
        self._latest += 1
        weights = [self._tensors[name] for name in self._owned]
        results = _Pipelined.apply(self, ready(), request, sizes, self._latest, *weights)
        found = dict(zip(self._values, results, strict=True))
        leaves = {
            "value": found,
            "input": dict(zip(package.input_names, whole, strict=True)),
            "state": self._tensors,
        }
        return unflatten(package.out_tree, [leaves[ref.kind][ref.name] for ref in package.outputs])

    def forward(self, halves: Halves, request: StepRequest, sizes: list[int]) -> list[Any]:
        """All results of a batch, micro-batches put together again."""
        rows = halves.forward(request)
        return [_joined(name, [row[name] for row in rows], sizes) for name in self._values]

    def backward(
        self, halves: Halves, call: int, gradients: Sequence[torch.Tensor | None], sizes: list[int]
    ) -> list[torch.Tensor | None]:
        """Gradients of the weights, owned by the caller; None where nothing depends on one.

        Raises:
            InputError: if another batch went through since.
        """
        if call != self._latest:
            raise InputError(
                "backward() of an earlier call: a pipeline keeps the activations of its latest call, and of that one "
                "until its backward. Call, backward, call, backward"
            )
        self._latest += 1
        given = dict(zip(self._values, gradients, strict=True))
        parts = {name: _cut(given[name], sizes) for name in self._learned}
        rows = [{name: part[i] for name, part in parts.items()} for i in range(len(sizes))]
        found = halves.backward(rows)
        return [found[name].clone() if name in found else None for name in self._owned]

    @property
    def constant(self) -> list[int]:
        """Positions of the results that have no gradient."""
        return [i for i, name in enumerate(self._values) if name not in self._learned]


class _Pipelined(torch.autograd.Function):
    """One call of a pipeline; its inputs are the weights."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, drop_in: DropIn, halves: Halves, request: StepRequest, sizes: list[int], call: int, *_weights: Any
    ) -> tuple[Any, ...]:
        ctx.drop_in, ctx.halves, ctx.sizes, ctx.call = drop_in, halves, sizes, call
        results = drop_in.forward(halves, request, sizes)
        constant = [results[i] for i in drop_in.constant]
        ctx.mark_non_differentiable(*(value for value in constant if isinstance(value, torch.Tensor)))
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = ctx.drop_in.backward(ctx.halves, ctx.call, gradients, ctx.sizes)
        return (None, None, None, None, None, *found)


def _joined(name: str, parts: list[Any], sizes: list[int]) -> Any:
    """The result of the batch from those of its micro-batches."""
    first = parts[0]
    if not isinstance(first, torch.Tensor):
        return first
    if [part.shape[0] if part.dim() else -1 for part in parts] != sizes:
        shapes = [tuple(part.shape) for part in parts]
        raise InputError(
            f"result {name!r} has shapes {shapes} for micro-batches of {sizes} samples: without a batch dimension it "
            "cannot be put together; return results per sample, or give compile() the loss and use train_step()"
        )
    return torch.cat(parts)


def _cut(gradient: torch.Tensor | None, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    assert gradient is not None, "autograd fills in zeros"
    return gradient.split(sizes)


__all__ = ["FILL_AND_DRAIN", "DropIn"]
