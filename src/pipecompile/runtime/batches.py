"""A training batch as micro-batches: inputs and targets split, and the weight of each part's loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from pipecompile.errors import InputError
from pipecompile.ir.tree import flatten, unflatten

#: How a loss is reduced: by mean or sum, as it says itself (``auto``), or by a mean over what a
#: function counts in a target.
Reduction = Literal["auto", "mean", "sum"] | Callable[[Any], float]


def batched_inputs(leaves: Sequence[Any]) -> tuple[int, tuple[bool, ...]]:
    """The batch size, and which inputs are split: those whose dimension 0 is that of the first with any.

    Raises:
        InputError: if no input has a dimension to split.
    """
    sizes = [leaf.shape[0] if leaf.dim() else 0 for leaf in leaves]
    batch = next((size for size in sizes if size), 0)
    if not batch:
        raise InputError("no input has a batch dimension: training splits inputs along dimension 0")
    return batch, tuple(size == batch for size in sizes)


def parts_of(batch: int, largest: int, parts: int, sizes: tuple[int, int]) -> int:
    """Into how many micro-batches a batch is split that may be smaller than the one which goes into ``parts``.

    As many as leave each of them no more samples on average than those of the largest batch have, so a small batch
    makes fewer of about the same size; fewer still where they would be smaller than ``sizes`` allow, least and most.

    Raises:
        InputError: if it is larger, empty, or cannot be split that way.
    """
    if not 0 < batch <= largest:
        raise InputError(f"a batch of {batch} samples, compiled for 1 to {largest}")
    least, most = sizes
    for count in range(-(-batch * parts // largest), 0, -1):
        if least <= batch // count and -(-batch // count) <= most:
            return count
    each = f"{least} to {most}" if least < most else str(most)
    raise InputError(
        f"a batch of {batch} samples cannot be split into micro-batches of {each} samples, which the model was "
        "captured for: leave it out (drop_last=True of a DataLoader), or compile with fewer micro_batches"
    )


def split_inputs(leaves: Sequence[Any], batched: Sequence[bool], parts: int) -> list[list[Any]]:
    """Per micro-batch the flat inputs; sizes differ by at most one, larger ones first."""
    columns = [
        torch.tensor_split(leaf, parts) if cut else [leaf] * parts for leaf, cut in zip(leaves, batched, strict=True)
    ]
    return [list(row) for row in zip(*columns, strict=True)]


def split_targets(targets: Any, batch: int, parts: int) -> list[Any]:
    """Per micro-batch the targets, in the nest they came in.

    Raises:
        InputError: if a target does not have ``batch`` entries along dimension 0.
    """
    leaves, tree = flatten(targets)
    for i, leaf in enumerate(leaves):
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            which = f"target {i}" if len(leaves) > 1 else "the target"
            raise InputError(
                f"{which} has shape {tuple(leaf.shape)}, the batch {batch} samples: its dimension 0 must be that"
            )
    columns = [torch.tensor_split(leaf.detach(), parts) for leaf in leaves]
    rows = zip(*columns, strict=True) if columns else [()] * parts
    return [unflatten(tree, list(row)) for row in rows]


def moved(nest: Any, device: str) -> Any:
    """The tensors of a nest on a device."""
    leaves, tree = flatten(nest)
    return unflatten(tree, [leaf.to(device) for leaf in leaves])


def loss_weights(
    loss_fn: Callable[..., Any], targets: Sequence[Any], sizes: Sequence[int], reduction: Reduction
) -> list[float]:
    """What to multiply the loss of each micro-batch with, so that the sum is the loss of the batch.

    A sum needs nothing. A mean is over samples, or, where the loss ignores a class or weighs
    classes, over what counts of the targets.

    Args:
        loss_fn: a loss module, function or partial; its ``reduction``, ``ignore_index`` and
            ``weight`` are looked up in it.
        targets: per micro-batch.
        sizes: samples per micro-batch.
        reduction: ``"mean"``, ``"sum"``, ``"auto"`` (what ``loss_fn`` says, else mean), or a function
            of a target that gives how much of it the mean is over.

    Raises:
        InputError: for another reduction, such as ``"none"``.
    """
    if callable(reduction):
        return _shares([float(reduction(target)) for target in targets])
    kind = str(option(loss_fn, "reduction", "mean")) if reduction == "auto" else str(reduction)
    if kind == "sum":
        return [1.0] * len(sizes)
    if kind not in ("mean", "batchmean"):
        raise InputError(
            f"reduction {kind!r}: a loss must be reduced by 'mean' or 'sum' to be summed over micro-batches"
        )
    return _shares([_count(loss_fn, target, size) for target, size in zip(targets, sizes, strict=True)])


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total if total else 1.0 / len(counts) for count in counts]


def option(loss_fn: Callable[..., Any], name: str, default: Any) -> Any:
    """An option of a loss: an attribute of a module, a keyword of a partial, a default of a function."""
    if isinstance(loss_fn, partial):
        return loss_fn.keywords[name] if name in loss_fn.keywords else option(loss_fn.func, name, default)
    if isinstance(loss_fn, torch.nn.Module):
        return getattr(loss_fn, name, default)
    try:
        parameter = inspect.signature(loss_fn).parameters.get(name)
    except (TypeError, ValueError):
        return default
    return default if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def _count(loss_fn: Callable[..., Any], target: Any, size: int) -> float:
    """How much of a micro-batch's targets its mean is over."""
    ignored = option(loss_fn, "ignore_index", None)
    classes = isinstance(target, torch.Tensor) and target.dtype in (torch.int64, torch.int32, torch.uint8)
    if ignored is None or not classes:
        return float(size)
    counted = target != ignored
    weight = option(loss_fn, "weight", None)
    if isinstance(weight, torch.Tensor):
        return float(weight[target[counted].long()].sum())
    return float(counted.sum())


__all__ = ["batched_inputs", "loss_weights", "moved", "option", "parts_of", "split_inputs", "split_targets"]
