"""Losses for learning on a stream: at named layers, and between successive samples.

Both are plain modules: they also work in an eager loop, which is what tests compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError


class Tapped(nn.Module):
    """A model that also gives what named layers make, for losses at them.

        pipe = pipecompile.compile(Tapped(model, ["encoder.3"]), (x,), mode="learn", loss_fn=loss, ...)

    ``loss`` is called with a dict: ``output`` is the model's result, and each layer's under its own
    name. A value from an early stage goes straight to the last, and its gradient straight back.

    Args:
        model: its parameters are under ``model.`` in this one's ``state_dict``.
        layers: names of submodules that give a tensor.

    Raises:
        InputError: if there is no such layer.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        known = dict(model.named_modules())
        missing = [name for name in layers if name not in known or not name]
        if missing:
            names = ", ".join(filter(None, known))
            raise InputError(f"{type(model).__name__} has no layer {missing[0]!r}; there are {names}")
        self.model, self._layers = model, tuple(layers)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's result and the layers'."""
        found: dict[str, Any] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _given: Any, result: Any) -> None:
                found[name] = result

            return hook

        handles = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in self._layers]
        try:
            output = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return {"output": output, **{name: found[name] for name in self._layers}}


class Coherent(nn.Module):
    """A loss, and ``weight`` times the mean squared change of a result from one sample to the next.

    On a slow stream successive results should differ little (temporal coherence, slowness). The one
    before is taken as it was, without gradient. Samples without a target have no loss, and so count
    for neither side. After a restart or in a new pipeline the first sample has none before it.

    Args:
        loss_fn: called with the result and the target.
        weight: of the change.
        of: the tensor of the result that should change slowly, such as ``lambda r: r["features"]``.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], torch.Tensor],
        weight: float,
        of: Callable[[Any], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self._loss_fn, self._weight, self._of = loss_fn, weight, of
        self._before: torch.Tensor | None = None

    def forward(self, result: Any, target: Any) -> torch.Tensor:
        """The loss of one sample."""
        loss, value = self._loss_fn(result, target), result if self._of is None else self._of(result)
        before, self._before = self._before, value.detach().clone()
        return loss if before is None else loss + self._weight * (value - before).square().mean()


__all__ = ["Coherent", "Tapped"]
