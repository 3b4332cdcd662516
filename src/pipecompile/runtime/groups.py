"""Parameter groups: weights of one optimizer that have settings of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class ParameterGroups:
    """Which group a weight is in, by placeholder name, and what each group sets. Without any there is one, of all."""

    members: Mapping[str, int] = field(default_factory=dict[str, int])
    settings: tuple[Mapping[str, Any], ...] = ({},)

    def of(self, names: Iterable[str]) -> list[tuple[int, list[str]]]:
        """The groups that some of ``names`` are in, each with these, in order."""
        found: dict[int, list[str]] = {}
        for name in names:
            found.setdefault(self.members.get(name, 0), []).append(name)
        return sorted(found.items())

    def given(self, parts: Sequence[tuple[int, list[str]]], tensors: Mapping[str, torch.Tensor]) -> list[Any]:
        """What an optimizer is made of: a list of weights where there is one group, else of groups."""
        if not self.members:
            return [tensors[name] for _, names in parts for name in names]
        return [{**self.settings[group], "params": [tensors[name] for name in names]} for group, names in parts]


__all__ = ["ParameterGroups"]
