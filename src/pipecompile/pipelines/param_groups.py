"""``param_groups=`` of a training pipeline: which parameters have settings of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError

#: As torch's optimizers take them: dicts with ``params`` and settings, or a function of the model that gives
#: such. ``params`` are parameters, names, or patterns of names such as ``"*.bias"``.
Groups = Sequence[Mapping[str, Any]] | Callable[[nn.Module], Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class ModelGroups:
    """The groups of one plain optimizer of the model: the parameters of each, in its order, and its settings."""

    members: tuple[tuple[nn.Parameter, ...], ...]
    settings: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, model: nn.Module, given: Groups | None = None) -> ModelGroups:
        """Every parameter of the model in one group of those given; all in one where there are none.

        Names and patterns are tried in the order of the groups, and the first that fits a parameter not yet
        in a group counts; those of a tied parameter are all tried.

        Raises:
            InputError: for a parameter in two groups, one of another model, a name that fits nothing, and
                parameters to train that are in no group.
        """
        if given is None:
            return cls((tuple(model.parameters()),), ({},))
        groups = given(model) if callable(given) else given
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        taken: dict[nn.Parameter, int] = {}
        for i, group in enumerate(groups):
            if not isinstance(group, Mapping) or "params" not in group:  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InputError(f"param_groups[{i}] has no 'params': give dicts as torch's optimizers take them")
            params = group["params"]
            for entry in [params] if isinstance(params, (str, torch.Tensor)) else params:
                found = _matching(entry, names, taken, i)
                taken.update(dict.fromkeys(found, i))
        left = [own[0] for parameter, own in names.items() if parameter not in taken and parameter.requires_grad]
        if left:
            raise InputError(
                f"param_groups has no group for {', '.join(left[:5])}{' and others' if len(left) > 5 else ''}: add a "
                "last group with params='*', or freeze them with requires_grad_(False)"
            )
        members = tuple(tuple(p for p, at in taken.items() if at == i) for i in range(len(groups)))
        empty = [i for i, own in enumerate(members) if not own]
        if empty:
            raise InputError(
                f"param_groups[{empty[0]}] gets no parameter: what fits it is in an earlier group already; put the "
                "narrower pattern first"
            )
        return cls(members, tuple({k: v for k, v in group.items() if k != "params"} for group in groups))


def _matching(
    entry: Any, names: Mapping[nn.Parameter, list[str]], taken: Mapping[nn.Parameter, int], group: int
) -> list[nn.Parameter]:
    """The parameters an entry of ``params`` means."""
    parameter = entry[1] if isinstance(entry, tuple) else entry  # torch takes named_parameters() as well
    if isinstance(parameter, str):
        fitting = [p for p, own in names.items() if any(fnmatchcase(name, parameter) for name in own)]
        if not fitting:
            raise InputError(f"param_groups[{group}]: no parameter is called {parameter!r}; there are {_some(names)}")
        return [p for p in fitting if p not in taken]
    if not any(parameter is known for known in names):
        raise InputError(f"param_groups[{group}]: {type(parameter).__name__} of another model, or no parameter")
    if taken.get(parameter, group) != group:
        raise InputError(f"{names[parameter][0]} is in param_groups[{taken[parameter]}] and param_groups[{group}]")
    return [parameter]


def _some(names: Mapping[nn.Parameter, list[str]]) -> str:
    every = [own[0] for own in names.values()]
    return ", ".join(every[:5]) + (", ..." if len(every) > 5 else "")


__all__ = ["Groups", "ModelGroups"]
