"""Constants and class names of a nest as JSON data, and back.

Whoever wrote a file chooses the names in it, so what a name may stand for is limited here:
rebuilding a result must never run code that someone else picked.
"""

from __future__ import annotations

import enum
import importlib
import sys
from typing import Any

import torch

#: Packages whose result classes may be imported when a saved pipeline is used in a process that
#: has not imported them yet. Any other class is used only where it is already loaded.
_IMPORTABLE = frozenset({"transformers", "collections"})

#: Of the standard library only these modules hold classes that are results; others act when made.
_STANDARD = frozenset({"collections", "types"})

_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, slice, range)


def is_constant(item: Any) -> bool:
    """Whether a value is kept as it is: numbers, strings, types, functions and the like."""
    known = isinstance(item, (*_SCALARS, type, enum.Enum, torch.memory_format))
    return known or (callable(item) and not hasattr(item, "_fields"))


def class_name(kind: type) -> str:
    """``module:qualified.name``."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find_class(name: str) -> type | None:
    """The class of that name if it is loaded (or may be imported) and harmless to rebuild, else None."""
    if not name:
        return None
    module_name, _, path = name.partition(":")
    package = module_name.partition(".")[0]
    if package in sys.stdlib_module_names and package not in _STANDARD:
        return None
    module = sys.modules.get(module_name)
    if module is None and package in _IMPORTABLE:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    # a class may be reached as an attribute of a module that only uses it: its own name counts
    own = isinstance(found, type) and class_name(found) == name
    return found if own and not hasattr(found, "__del__") else None


def to_json(value: Any) -> Any:
    """A constant as JSON data. What JSON cannot express at all is kept as its ``repr``."""
    if isinstance(value, enum.Enum):
        return {"enum": class_name(type(value)), "name": value.name, "repr": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (tuple, slice, range)):
        parts = value if isinstance(value, tuple) else (value.start, value.stop, value.step)
        return {type(value).__name__ if not isinstance(value, tuple) else "tuple": [to_json(part) for part in parts]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, type):
        return {"type": class_name(value), "repr": repr(value)}
    return {"repr": repr(value)}


def from_json(data: Any) -> Any:
    """The inverse of :func:`to_json`; the ``repr`` of a class or enum that is not loaded here."""
    if not isinstance(data, dict):
        return data
    match data:
        case {"enum": name, "name": member}:
            kind = find_class(name)
            return kind[member] if kind is not None and issubclass(kind, enum.Enum) else data["repr"]
        case {"type": name}:
            kind = find_class(name)
            return data["repr"] if kind is None else kind
        case {"complex": [real, imaginary]}:
            return complex(real, imaginary)
        case {"tuple": parts}:
            return tuple(from_json(part) for part in parts)
        case {"slice": parts}:
            return slice(*(from_json(part) for part in parts))
        case {"range": parts}:
            return range(*parts)
        case {"bytes": text}:
            return bytes.fromhex(text)
        case {"torch": name}:
            found = getattr(torch, name, None)
            return found if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) else name
        case {"device": name}:
            return torch.device(name)
        case _:
            return data["repr"]
