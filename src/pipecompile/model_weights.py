"""A model's own tensors as a package names them, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from pipecompile.ir.graph import StateSpec


class ModelWeights:
    """The tensors of a package, which of them are trained, and what the model calls them."""

    def __init__(
        self,
        state: Sequence[StateSpec],
        owned: Mapping[int, Sequence[str]],
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
    ) -> None:
        self._tensors, self._model = dict(tensors), model
        self._names = [name for names in owned.values() for name in names]
        self._fqn = {entry.name: entry.fqn for entry in state}
        self._pointers: list[tuple[int, int]] = []

    def current(self) -> dict[str, torch.Tensor]:
        """Placeholder name -> tensor."""
        return self._tensors

    def fqn(self, name: str) -> str:
        """The first of the model's names for a weight."""
        return next((n for n, p in self._model.named_parameters() if p is self._tensors[name]), self._fqn[name])

    def positions(self) -> dict[str, int]:
        """Placeholder name of a trained weight -> its place in ``model.parameters()``."""
        places = {id(p): i for i, p in enumerate(self._model.parameters())}
        return {name: places[id(self._tensors[name])] for name in self._names}

    def remember(self) -> None:
        """Note what the model holds, to see later whether something was replaced."""
        self._pointers = self._homes()

    def moved(self) -> bool:
        """Whether the model holds other parameters or storage than noted."""
        return self._pointers != self._homes()

    def _homes(self) -> list[tuple[int, int]]:
        return [(id(t), t.data_ptr()) for t in (*self._model.parameters(), *self._model.buffers())]


__all__ = ["ModelWeights"]
