"""Arguments that a measured function may write to, as they were: a cache of keys has an end, a counter a limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Untouched:
    """Puts tensors that were written to back. Those that require gradients nobody writes to without them."""

    def __init__(self, arguments: Iterable[Any]) -> None:
        tensors = {id(a): a for a in arguments if isinstance(a, torch.Tensor) and not a.requires_grad}
        self._kept = [(tensor, tensor.clone(), _version(tensor)) for tensor in tensors.values()]

    def restore(self) -> None:
        """Copy back what has another version than at the start, or than after the last call."""
        for i, (tensor, copy, version) in enumerate(self._kept):
            if _version(tensor) != version:
                tensor.copy_(copy)
                self._kept[i] = (tensor, copy, _version(tensor))


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


__all__ = ["Untouched"]
