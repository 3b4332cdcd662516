"""The loss of one micro-batch, in the last stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipecompile.errors import InputError
from pipecompile.ir.tree import Tree, unflatten
from pipecompile.runtime.step import NotFinite


class Criterion:
    """Calls ``loss_fn(result, target)`` with the model's own result and the target of a micro-batch.

    ``targets`` and ``weights`` are those of the step under way, per micro-batch. With ``finite`` a
    loss that is NaN or infinite is refused; with ``full`` results of half the precision are made float32.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], Any], out_tree: Tree, *, finite: bool = False, full: bool = False
    ) -> None:
        self._loss_fn, self._tree, self._finite, self._full = loss_fn, out_tree, finite, full
        self.targets: Sequence[Any] = ()
        self.weights: Sequence[float] = ()

    def __call__(self, micro_batch: int, outputs: Sequence[Any]) -> torch.Tensor:
        """The weighted loss, a tensor of no dimension.

        Raises:
            InputError: if the loss is no scalar tensor, or has no gradient.
            NotFinite: if it is NaN or infinite, and that is to be refused.
        """
        weight = self.weights[micro_batch]
        if self._full:
            outputs = [full_precision(value) for value in outputs]
        if weight == 0.0:
            # A mean over nothing (every target ignored) is NaN, and so would be its gradients.
            return sum((o * 0.0).sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)  # type: ignore[return-value]
        loss = self._loss_fn(unflatten(self._tree, list(outputs)), self.targets[micro_batch])
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise InputError(f"loss_fn returned {got}: it must return a scalar tensor (reduce it with mean or sum)")
        if not loss.requires_grad:
            raise InputError("the loss depends on nothing that has gradients: loss_fn must use the model's result")
        if self._finite and not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss of micro-batch {micro_batch} is {loss.item()}", micro_batch)
        return loss if weight == 1.0 else loss * weight


def full_precision(value: Any) -> Any:
    """A tensor of bfloat16 or float16 as float32; anything else as it is."""
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


__all__ = ["Criterion", "full_precision"]
