"""A model's own tensors as a package names them, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError
from pipecompile.ir.graph import StateSpec
from pipecompile.pipelines.param_groups import ModelGroups
from pipecompile.runtime.groups import ParameterGroups


class ModelWeights:
    """The tensors of a package, which of them are trained, and what the model calls them."""

    def __init__(
        self,
        state: Sequence[StateSpec],
        owned: Mapping[int, Sequence[str]],
        tensors: Mapping[str, torch.Tensor],
        model: nn.Module,
        groups: ModelGroups | None = None,
    ) -> None:
        self._tensors, self._model, self._given = dict(tensors), model, groups
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
        """Placeholder name of a trained weight -> its place in a plain optimizer: group by group."""
        places = {id(p): i for i, p in enumerate(p for group in self._groups.members for p in group)}
        return {name: places[id(self._tensors[name])] for name in self._names}

    @property
    def _groups(self) -> ModelGroups:
        return self._given or ModelGroups.of(self._model)

    def groups(self) -> ParameterGroups:
        """The parameter groups by placeholder name."""
        if self._given is None:
            return ParameterGroups()
        of = {id(p): i for i, group in enumerate(self._given.members) for p in group}
        return ParameterGroups({name: of[id(self._tensors[name])] for name in self._names}, self._given.settings)

    def state_dict(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A copy of the model's ``state_dict`` with other values for some of the placeholders."""
        values = {id(self._tensors[name]): value for name, value in tensors.items()}
        found: dict[str, Any] = self._model.state_dict(keep_vars=True)
        return {name: copy.deepcopy(_detached(values.get(id(value), value))) for name, value in found.items()}

    def groups_by_name(self) -> list[dict[str, Any]] | None:
        """The parameter groups given, with names for parameters; None where there is one of all."""
        if self._given is None:
            return None
        names = {p: name for name, p in self._model.named_parameters()}
        pairs = zip(self._given.members, self._given.settings, strict=True)
        return [{**settings, "params": [names[p] for p in members]} for members, settings in pairs]

    def packed(self, state: Mapping[str, Any], groups: Mapping[str, Any]) -> dict[str, Any]:
        """State and settings by placeholder as the ``state_dict`` of a plain optimizer with the same groups."""
        names = self.positions()
        any_settings = next(iter(groups.values()), {})  # where nothing in a group is trained
        of = self.groups()
        found = {of.members.get(name, 0): settings for name, settings in groups.items()}
        packed, start = list[dict[str, Any]](), 0
        for i, (members, given) in enumerate(zip(self._groups.members, self._groups.settings, strict=True)):
            settings = found.get(i, {**any_settings, **given})
            packed.append({**settings, "params": list(range(start, start + len(members)))})
            start += len(members)
        values = {names[name]: value for name, value in sorted(state.items(), key=lambda kv: names[kv[0]])}
        return {"state": values, "param_groups": packed}

    def unpacked(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The inverse of :meth:`packed`, with the settings of each group.

        Raises:
            InputError: if it has other parameter groups, or another number of parameters.
        """
        groups = state_dict["param_groups"]
        found, wanted = [len(group["params"]) for group in groups], [len(group) for group in self._groups.members]
        if found != wanted:
            raise InputError(
                f"the optimizer state has parameter groups of {found} parameters; expected {wanted}: "
                f"{'those of param_groups=' if self._given else 'one group over all of model.parameters()'}"
            )
        settings = [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]
        order = [i for group in groups for i in group["params"]]
        names = {order[position]: name for name, position in self.positions().items()}
        return {names[i]: value for i, value in state_dict["state"].items() if i in names}, settings

    def with_names(self, state: Mapping[str, Any]) -> list[tuple[str, torch.Tensor, Any]]:
        """State by placeholder with the model's name and the weight it is of."""
        return [(self.fqn(name), self._tensors[name], value) for name, value in state.items()]

    def of_optimizer(
        self, optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]
    ) -> list[tuple[str, torch.Tensor, Any]]:
        """The same of a ``state_dict`` that an optimizer of the caller's is to take over."""
        names = {p: name for name, p in self._model.named_parameters()}
        weights = [p for group in optimizer.param_groups for p in group["params"]]
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        pairs = zip(places, weights, strict=False)  # torch says so if there are more of one
        return [(names.get(p, f"number {i}"), p, state_dict["state"].get(i, {})) for i, p in pairs]

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
