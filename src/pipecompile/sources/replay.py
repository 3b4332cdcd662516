"""A sliding batch of the latest samples, to learn from more than one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from pipecompile.errors import InputError
from pipecompile.ir.tree import flatten, unflatten


class Replay:
    """Turns a stream of (input, target) pairs into one of batches: each with the ``size`` latest, the newest last.

        for result in pipe.learn(Replay(samples, 16)): newest = result.output[-1]

    Inputs and targets are joined along dimension 0, so a sample is a batch itself, usually of one. In
    the beginning the first sample stands for those that are missing. A sample without a target gives
    a batch without one, and is not kept.

    Args:
        samples: pairs whose tensors have a dimension 0.
        size: how many samples a batch has; the pipeline is compiled for such a batch.
    """

    def __init__(self, samples: Iterable[Any], size: int) -> None:
        if size < 1:
            raise InputError(f"size={size}: a batch has one sample or more")
        self._samples, self._size = samples, size

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """One batch for each sample."""
        window: deque[tuple[Any, Any]] = deque(maxlen=self._size - 1)
        for value, target in self._samples:
            pair = _copied(value), None if target is None else _copied(target)
            pairs = [*(window or [pair] * (self._size - 1)), pair]
            inputs = _joined([one for one, _ in pairs])
            yield inputs, None if target is None else _joined([one for _, one in pairs])
            if target is not None:
                window.extend([pair] if window else [pair] * (self._size - 1))


def _copied(nest: Any) -> Any:
    """The source may use its memory again."""
    leaves, tree = flatten(nest)
    return unflatten(tree, [leaf.detach().clone() for leaf in leaves])


def _joined(nests: list[Any]) -> Any:
    tree = flatten(nests[0])[1]
    return unflatten(tree, [torch.cat(parts) for parts in zip(*(flatten(nest)[0] for nest in nests), strict=True)])


__all__ = ["Replay"]
