"""Parameters and buffers of a running pipeline, as the model holds them now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError
from pipecompile.ir.package import Package


class State:
    """The tensors of a package, looked up anew in the model: it may have replaced a parameter."""

    def __init__(self, package: Package, tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
        self._tensors = dict(tensors)
        self._compiled = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._names = {entry.name: entry.fqn for entry in package.state}
        self._homes: list[tuple[str, dict[str, Any], str]] = []
        modules = dict(model.named_modules(remove_duplicate=False))
        for entry in package.state:
            path, _, key = entry.fqn.rpartition(".")
            owner = modules.get(path)
            for home in (vars(owner).get(kind, {}) for kind in ("_parameters", "_buffers")) if owner else ():
                if home.get(key) is tensors[entry.name]:
                    self._homes.append((entry.name, home, key))
        self._pointers: list[int] = []

    def current(self) -> dict[str, torch.Tensor]:
        """Placeholder name -> the tensor the model holds now.

        Raises:
            InputError: if the model has none in its place any more.
        """
        for name, home, key in self._homes:
            tensor = home.get(key)
            if tensor is None:
                raise InputError(
                    f"the model has no {self._names[name]} any more (it was pruned, say): compile the model again"
                )
            self._tensors[name] = tensor
        return self._tensors

    def refreshed(self) -> dict[str, torch.Tensor]:
        """The current tensors, checked to be of the shape and dtype compiled for."""
        for name, tensor in self.current().items():
            shape, dtype = self._compiled[name]
            if tensor.shape != shape or tensor.dtype != dtype:
                raise InputError(
                    f"{self._names[name]} is now {tuple(tensor.shape)} {tensor.dtype}, compiled as {tuple(shape)} "
                    f"{dtype}: compile the model again"
                )
        return self._tensors

    def remember(self) -> None:
        """Note where every tensor lies, to see later whether one moved."""
        self._pointers = [home[key].data_ptr() for _, home, key in self._homes]

    def moved(self) -> bool:
        """Whether the model holds other storage than noted (``assign=True``, ``.double()``, ``.data =``)."""
        try:
            return self._pointers != [home[key].data_ptr() for _, home, key in self._homes]
        except (KeyError, AttributeError):  # gone, or None: `refreshed` has words for it
            return True
