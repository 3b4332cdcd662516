"""What shapes the state of an optimizer has: torch takes over any, and fails in the step after."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from pipecompile.errors import InputError

#: Sizes of a weight that is only there to look at its state: such as nothing else in it has.
_SIZES = (5, 7, 11, 13, 17, 19)


class StateShapes:
    """The shapes of an optimizer's state, found by one step on a small weight of as many dimensions.

    What an optimizer keeps for a weight has that weight's size or 1 in each dimension (a factored second moment
    has both), or none at all. State that is not of this kind, or comes later than the first step, is not judged.
    """

    def __init__(self, factory: Callable[[list[Any]], torch.optim.Optimizer]) -> None:
        self._factory = factory
        self._known: dict[int, dict[str, tuple[bool, ...]]] = {}

    @classmethod
    def like(cls, optimizer: torch.optim.Optimizer) -> StateShapes:
        """Those of an optimizer that is there already."""
        kind, taken = type(optimizer), inspect.signature(type(optimizer).__init__).parameters
        options = {key: value for key, value in optimizer.defaults.items() if key in taken}
        return cls(lambda weights: kind(weights, **options))

    def check(self, states: Iterable[tuple[str, torch.Tensor, Mapping[str, Any]]], source: object) -> None:
        """Compare states with their weights, of which each comes under its name; ``source`` is where they are from.

        Raises:
            InputError: naming the first that does not fit.
        """
        for name, weight, state in states:
            for key, dims in self._of(weight.dim()).items():
                found = state.get(key)
                wanted = tuple(n if own else 1 for n, own in zip(weight.shape, dims, strict=False))
                if isinstance(found, torch.Tensor) and tuple(found.shape) != wanted:
                    raise InputError(
                        f"{source} is of another model: {key!r} of weight {name!r} has shape {tuple(found.shape)} "
                        f"there; this weight has shape {tuple(weight.shape)}, so {wanted} is expected. Nothing "
                        "was changed"
                    )

    def _of(self, dims: int) -> dict[str, tuple[bool, ...]]:
        """By key, whether the state has the size of the weight (else 1) in each dimension; () for a single number."""
        if dims not in self._known:
            self._known[dims] = self._seen(dims) if dims <= len(_SIZES) else {}
        return self._known[dims]

    def _seen(self, dims: int) -> dict[str, tuple[bool, ...]]:
        weight = torch.nn.Parameter(torch.zeros(_SIZES[:dims]))
        weight.grad = torch.zeros_like(weight)
        try:
            optimizer = self._factory([weight])
            optimizer.step()
        except Exception:  # an optimizer for weights of certain dimensions, or one that wants more than gradients
            return {}
        found: dict[str, tuple[bool, ...]] = {}
        for key, value in optimizer.state[weight].items():
            if not isinstance(value, torch.Tensor):
                continue
            if value.dim() == 0:
                found[key] = ()
            elif value.dim() == dims and all(n in (1, own) for n, own in zip(value.shape, weight.shape, strict=True)):
                found[key] = tuple(n != 1 for n in value.shape)
        return found


__all__ = ["StateShapes"]
