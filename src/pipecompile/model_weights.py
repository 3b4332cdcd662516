"""A model's own tensors as a package names them, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError
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

    def state_dict(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A copy of the model's ``state_dict`` with other values for some of the placeholders."""
        values = {id(self._tensors[name]): value for name, value in tensors.items()}
        found: dict[str, Any] = self._model.state_dict(keep_vars=True)
        return {name: copy.deepcopy(_detached(values.get(id(value), value))) for name, value in found.items()}

    def packed(self, state: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
        """State and settings by placeholder as the ``state_dict`` of a plain optimizer over ``model.parameters()``."""
        names = self.positions()
        settings = next(iter(groups.values()), {})
        return {
            "state": {names[name]: value for name, value in sorted(state.items(), key=lambda kv: names[kv[0]])},
            "param_groups": [{**settings, "params": list(range(len(list(self._model.parameters()))))}],
        }

    def unpacked(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The inverse of :meth:`packed`, with the settings of the one group.

        Raises:
            InputError: if it has several parameter groups, or another number of parameters.
        """
        groups = state_dict["param_groups"]
        count = len(list(self._model.parameters()))
        if len(groups) != 1 or len(groups[0]["params"]) != count:
            raise InputError(
                f"the optimizer state has {len(groups)} groups with {[len(g['params']) for g in groups]} parameters; "
                f"expected one group over all {count} of model.parameters()"
            )
        settings = {key: value for key, value in groups[0].items() if key != "params"}
        names = {position: name for name, position in self.positions().items()}
        return {names[i]: value for i, value in state_dict["state"].items() if i in names}, settings

    def remember(self) -> None:
        """Note what the model holds, to see later whether something was replaced."""
        self._pointers = self._homes()

    def moved(self) -> bool:
        """Whether the model holds other parameters or storage than noted."""
        return self._pointers != self._homes()

    def _homes(self) -> list[tuple[int, int]]:
        return [(id(t), t.data_ptr()) for t in (*self._model.parameters(), *self._model.buffers())]


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


__all__ = ["ModelWeights"]
