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
        self._alone = False
        self.targets: Sequence[Any] = ()
        self.weights: Sequence[float] = ()

    def __call__(self, micro_batch: int, outputs: Sequence[Any]) -> torch.Tensor:
        """The weighted loss, a tensor of no dimension.

        Raises:
            InputError: if the loss is no scalar tensor, has no gradient, or asks for one of what is not the model's.
            NotFinite: if it is NaN or infinite, and that is to be refused.
        """
        weight = self.weights[micro_batch]
        if self._full:
            outputs = [full_precision(value) for value in outputs]
        if weight == 0.0:
            # A mean over nothing (every target ignored) is NaN, and so would be its gradients.
            return sum((o * 0.0).sum() for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad)  # type: ignore[return-value]
        before = None if self._alone else [o.grad_fn for o in outputs if isinstance(o, torch.Tensor)]
        loss = self._loss_fn(unflatten(self._tree, list(outputs)), self.targets[micro_batch])
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise InputError(f"loss_fn returned {got}: it must return a scalar tensor (reduce it with mean or sum)")
        if not loss.requires_grad:
            raise InputError("the loss depends on nothing that has gradients: loss_fn must use the model's result")
        if before is not None:
            self._refuse_others(loss, outputs, before)
            self._alone = True
        if self._finite and not bool(torch.isfinite(loss)):
            raise NotFinite(f"the loss of micro-batch {micro_batch} is {loss.item()}", micro_batch)
        return loss if weight == 1.0 else loss * weight

    def _refuse_others(self, loss: torch.Tensor, outputs: Sequence[Any], before: Sequence[Any]) -> None:
        """Weights that the loss uses itself would silently stay as they are: they are copies in a worker."""
        others = _other_leaves(loss, [value for value in outputs if isinstance(value, torch.Tensor)], before)
        if not others:
            return
        own = self._loss_fn.named_parameters() if isinstance(self._loss_fn, torch.nn.Module) else ()
        names = {id(tensor): f"{name!r} of shape {tuple(tensor.shape)}" for name, tensor in own}
        said = [names.get(id(other), f"a tensor of shape {tuple(other.shape)}") for other in others]
        raise InputError(
            f"loss_fn uses {', '.join(said[:3])}{' and others' if len(said) > 3 else ''}, which would want gradients "
            "but is none of the model's results: only parameters of the model are trained. Put it into the model and "
            "return what the loss needs of it, or take its gradients away with requires_grad_(False)"
        )


def _other_leaves(loss: torch.Tensor, outputs: Sequence[torch.Tensor], before: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that want gradients of a loss other than through ``outputs``.

    ``before`` is where these came from when the loss was called: it may have written to them.
    """
    own = {id(output) for output in outputs}
    waiting, found = list[Any]([loss.grad_fn]), list[torch.Tensor]()
    seen: set[Any] = {None, *before, *(output.grad_fn for output in outputs)}
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def full_precision(value: Any) -> Any:
    """A tensor of bfloat16 or float16 as float32; anything else as it is."""
    half = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


__all__ = ["Criterion", "full_precision"]
