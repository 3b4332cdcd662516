"""What a compiled model relied on besides its inputs, and whether it still holds."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

#: Attributes of these types are fixed in the captured graph, so a change of one is looked for.
_CONSTANTS = (int, float, bool, str, type(None), torch.dtype)


class Guards:
    """Remembers a module tree; :meth:`changed` says in words what is different now.

    Looked at: submodules, parameters and buffers (which object, dtype, shape, ``requires_grad``),
    and attributes that are numbers, strings, booleans, dtypes or None. Values of parameters may
    change freely, as may where they lie in memory. It holds no reference to the outermost module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[tuple[str, dict[str, Any], int, tuple[Any, ...]]] = []
        self._constants: list[tuple[str, dict[str, Any], str, Any]] = []
        self._tensors: list[tuple[str, dict[str, Any], str, Any]] = []
        self._modal: list[tuple[str, dict[str, Any]]] = []
        self._hooks: list[tuple[str, Any]] = []
        #: A parameter or buffer that is not on the CPU, or an empty text.
        self.elsewhere = ""
        for path, module in model.named_modules():
            attributes = vars(module)
            where = path or type(module).__name__
            self._modules.append((where, attributes, len(attributes), _children(attributes)))
            for key, value in attributes.items():
                if isinstance(value, _CONSTANTS) and key != "training":
                    self._constants.append((where, attributes, key, value))
            for kind in ("_parameters", "_buffers"):
                for key, tensor in attributes[kind].items():
                    self._tensors.append((where, attributes[kind], key, tensor if tensor is None else _Seen(tensor)))
                    if tensor is not None and tensor.device.type != "cpu":
                        self.elsewhere = f"{where}.{key} is on {tensor.device}"
            if depends_on_mode(type(module)):
                self._modal.append((where, attributes))
            self._hooks += [(where, attributes[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks")]

    def changed(self) -> str:
        """What is no longer as it was, or an empty text."""
        for where, attributes, count, children in self._modules:
            if len(attributes) != count or _children(attributes) != children:
                return f"{where} has other attributes or submodules"
        for where, attributes, key, value in self._constants:
            now = attributes.get(key, _GONE)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"{where}.{key} is {now!r}, no longer {value!r}"
        for where, home, key, seen in self._tensors:
            now = home.get(key, _GONE)
            if (now is None) != (seen is None) or now is _GONE or (seen is not None and not seen.same(now)):
                return f"{where}.{key} was replaced or is of another dtype, shape or requires_grad"
        return ""

    def in_training(self) -> str:
        """A module in training mode that behaves otherwise then, or an empty text."""
        return next((where for where, attributes in self._modal if attributes["training"]), "")

    def hooked(self) -> str:
        """A module with a forward hook, or an empty text."""
        return next((where for where, hooks in self._hooks if hooks), "")

    def substituted(self) -> str:
        """A parameter that is no Parameter for now, as within ``torch.func.functional_call``."""
        for where, home, key, seen in self._tensors:
            now = home.get(key)
            if seen is not None and seen.parameter and now is not None and not isinstance(now, nn.Parameter):
                return f"{where}.{key}"
        return ""

    def differentiable(self) -> bool:
        """Whether a gradient could be asked for of any parameter."""
        return any(home[key] is not None and home[key].requires_grad for _, home, key, _ in self._tensors)


class _Seen:
    """A tensor as it was."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.parameter = isinstance(tensor, nn.Parameter)
        self._id, self._pointer = id(tensor), tensor.data_ptr()
        self._rest = _layout(tensor)

    def same(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` could take its place; cheap where nothing happened."""
        if id(tensor) == self._id and tensor.data_ptr() == self._pointer and _quick(tensor, self._rest):
            return True
        if _layout(tensor) != self._rest:
            return False
        self._id, self._pointer = id(tensor), tensor.data_ptr()
        return True


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.requires_grad, tuple(tensor.shape), tuple(tensor.stride()), tensor.device


def _quick(tensor: torch.Tensor, layout: tuple[Any, ...]) -> bool:
    return tensor.dtype is layout[0] and tensor.requires_grad is layout[1] and tensor.shape == layout[2]


def _children(attributes: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(map(id, attributes["_modules"].values()))


class _Gone:
    def __repr__(self) -> str:
        return "absent"


_GONE = _Gone()

_modal_classes: dict[type, bool] = {}


def depends_on_mode(cls: type[nn.Module]) -> bool:
    """Whether a module class may behave otherwise in training mode.

    Nobody can say so of code in general. So this is careful: it is True if ``training`` is
    mentioned in any method of the class or, for classes outside torch, in any function of the file
    the class comes from.
    """
    if cls not in _modal_classes:
        _modal_classes[cls] = any(_mentions_training(base) for base in cls.__mro__ if base not in nn.Module.__mro__)
    return _modal_classes[cls]


def _mentions_training(cls: type) -> bool:
    members: Iterable[Any] = vars(cls).values()
    if not cls.__module__.startswith("torch."):
        home = sys.modules.get(cls.__module__)
        members = [*members, *(vars(home).values() if home is not None else ())]
    functions = [member for member in map(_plain, members) if isinstance(member, FunctionType)]
    return any(_names_it(inspect.unwrap(function).__code__) for function in functions)


def _plain(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def _names_it(code: CodeType) -> bool:
    return "training" in code.co_names or any(_names_it(c) for c in code.co_consts if isinstance(c, CodeType))


def plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is ordinary memory: not fake, wrapped by ``vmap`` or ``grad``, or of a class of its own."""
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:  # how torch says that there is no memory behind it
        return False
    return True
