"""Nested arguments and results as a flat list of tensors and a description of the nest.

Unlike ``torch.utils._pytree`` this needs no registration (any dataclass, namedtuple or plain
object works), keeps constants, and can be written as JSON and rebuilt where the original class is
absent: the result then is an :class:`AttributeDict`.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

Kind = Literal["leaf", "const", "tuple", "list", "dict", "namedtuple", "mapping", "object"]

#: Packages whose result classes may be imported when a saved pipeline is used in a process that
#: has not imported them yet. Any other class is used only where it is already loaded.
_IMPORTABLE = frozenset({"transformers", "collections"})


class AttributeDict(dict[str, Any]):
    """Stands in for a result class that is absent: fields by key and by attribute."""

    def __getattr__(self, name: str) -> Any:
        """A field by attribute access."""
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class Tree:
    """One node of the nest. ``keys`` name the children of mappings and objects."""

    kind: Kind
    children: tuple[Tree, ...] = ()
    keys: tuple[Any, ...] = ()
    cls: str = ""
    const: Any = None
    type_: type | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def leaves(self) -> int:
        """Number of tensors in this part of the nest."""
        return 1 if self.kind == "leaf" else sum(child.leaves for child in self.children)

    def to_json(self) -> dict[str, Any]:
        """As JSON data; constants JSON cannot express are kept as their ``repr``."""
        data: dict[str, Any] = {"kind": self.kind}
        if self.children:
            data["children"] = [child.to_json() for child in self.children]
        if self.keys:
            data["keys"] = [_const_to_json(key) for key in self.keys]
        if self.cls:
            data["class"] = self.cls
        if self.kind == "const":
            data["const"] = _const_to_json(self.const)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tree:
        """The inverse of :meth:`to_json`."""
        return cls(
            data["kind"],
            tuple(cls.from_json(child) for child in data.get("children", ())),
            tuple(_const_from_json(key) for key in data.get("keys", ())),
            data.get("class", ""),
            _const_from_json(data["const"]) if "const" in data else None,
        )


def flatten(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Tree]:
    """Take a nest apart: its tensors in order, and the description to rebuild it.

    ``is_leaf`` adds kinds of leaves (symbolic sizes while tracing). A tensor that occurs twice
    is listed twice. Cyclic objects raise :class:`RecursionError`.
    """
    leaves: list[Any] = []

    def visit(item: Any) -> Tree:
        if isinstance(item, torch.Tensor) or (is_leaf is not None and is_leaf(item)):
            leaves.append(item)
            return Tree("leaf")
        if _is_const(item):
            return Tree("const", const=item)
        kind = type(item)
        if kind is tuple or kind is torch.Size:
            return Tree("tuple", tuple(visit(child) for child in item))
        if kind is list:
            return Tree("list", tuple(visit(child) for child in item))
        if kind is dict:
            return Tree("dict", tuple(visit(child) for child in item.values()), tuple(item))
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return Tree("namedtuple", tuple(visit(c) for c in item), tuple(kind._fields), _name(kind), type_=kind)
        if isinstance(item, (tuple, list)):
            return Tree("tuple" if isinstance(item, tuple) else "list", tuple(visit(child) for child in item))
        if isinstance(item, Mapping):
            return Tree("mapping", tuple(visit(item[k]) for k in item), tuple(item), _name(kind), type_=kind)
        fields = _fields(item)
        return Tree("object", tuple(visit(v) for v in fields.values()), tuple(fields), _name(kind), type_=kind)

    return leaves, visit(value)


def unflatten(tree: Tree, leaves: list[Any]) -> Any:
    """Rebuild the nest described by ``tree`` around ``leaves``.

    Raises:
        ValueError: if the number of leaves is not ``tree.leaves``.
    """
    if len(leaves) != tree.leaves:
        raise ValueError(f"expected {tree.leaves} leaves, got {len(leaves)}")
    rest = iter(leaves)

    def build(node: Tree) -> Any:
        match node.kind:
            case "leaf":
                return next(rest)
            case "const":
                return node.const
            case "tuple":
                return tuple(build(child) for child in node.children)
            case "list":
                return [build(child) for child in node.children]
            case "dict":
                return {key: build(child) for key, child in zip(node.keys, node.children, strict=True)}
            case "namedtuple" | "mapping" | "object":
                pass
        fields = {key: build(child) for key, child in zip(node.keys, node.children, strict=True)}
        return _construct(node, fields)

    return build(tree)


def _construct(node: Tree, fields: dict[Any, Any]) -> Any:
    kind = node.type_ or _find(node.cls)
    if kind is None:
        return AttributeDict({str(key): value for key, value in fields.items()})
    if node.kind == "namedtuple":
        return kind(*fields.values())
    if node.kind == "mapping":
        if dataclasses.is_dataclass(kind):
            return kind(**fields)
        return kind(fields)
    made = object.__new__(kind)
    for key, value in fields.items():
        object.__setattr__(made, key, value)
    return made


def _fields(item: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(item):
        return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    if hasattr(item, "__dict__"):
        return dict(vars(item))
    slots = [s for k in type(item).__mro__ for s in getattr(k, "__slots__", ()) if hasattr(item, s)]
    return {slot: getattr(item, slot) for slot in slots}


_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, slice, range)


def _is_const(item: Any) -> bool:
    return isinstance(item, (*_SCALARS, type, torch.memory_format)) or (callable(item) and not hasattr(item, "_fields"))


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _find(name: str) -> type | None:
    if not name:
        return None
    module_name, _, path = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None and module_name.partition(".")[0] in _IMPORTABLE:
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return None
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _const_to_json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)) and type(value) in (int, float):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    return {"repr": repr(value)}


def _const_from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    if "device" in value:
        return torch.device(value["device"])
    return value["repr"]


__all__ = ["AttributeDict", "Tree", "flatten", "unflatten"]
