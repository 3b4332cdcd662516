"""Nested arguments and results as a flat list of tensors and a description of the nest.

Unlike ``torch.utils._pytree`` this needs no registration (any dataclass, namedtuple or plain
object works), keeps constants, and can be written as JSON and rebuilt where the original class is
absent: the result then is an :class:`AttributeDict`.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from pipecompile.errors import InputError
from pipecompile.ir.constants import class_name, find_class, from_json, is_constant, to_json

Kind = Literal["leaf", "const", "tuple", "list", "dict", "namedtuple", "mapping", "object"]


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
            data["keys"] = [to_json(key) for key in self.keys]
        if self.cls:
            data["class"] = self.cls
        if self.kind == "const":
            data["const"] = to_json(self.const)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tree:
        """The inverse of :meth:`to_json`."""
        return cls(
            data["kind"],
            tuple(cls.from_json(child) for child in data.get("children", ())),
            tuple(from_json(key) for key in data.get("keys", ())),
            data.get("class", ""),
            from_json(data["const"]) if "const" in data else None,
        )


def flatten(value: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Tree]:
    """Take a nest apart: its tensors in order, and the description to rebuild it.

    ``is_leaf`` adds kinds of leaves (symbolic sizes while tracing). A tensor that occurs twice
    is listed twice.

    Raises:
        InputError: for an object that holds itself, or keeps its contents where they cannot be read
            (a set, a generator, a NumPy array).
    """
    leaves: list[Any] = []

    def visit(item: Any) -> Tree:
        if isinstance(item, torch.Tensor) or (is_leaf is not None and is_leaf(item)):
            leaves.append(item)
            return Tree("leaf")
        if is_constant(item):
            return Tree("const", const=item)
        kind = type(item)
        name = "" if kind in (tuple, list, dict) else class_name(kind)
        own = None if kind in (tuple, list, dict) else kind
        if isinstance(item, (tuple, list)):
            known: Kind = "list" if isinstance(item, list) else "namedtuple" if hasattr(item, "_fields") else "tuple"
            keys = tuple(item._fields) if known == "namedtuple" else ()  # type: ignore[union-attr]
            return Tree(known, tuple(visit(child) for child in item), keys, name, type_=own)
        if isinstance(item, Mapping):
            known = "dict" if kind is dict else "mapping"
            return Tree(known, tuple(visit(item[k]) for k in item), tuple(item), name, type_=own)
        fields = _fields(item)
        return Tree("object", tuple(visit(v) for v in fields.values()), tuple(fields), name, type_=kind)

    try:
        return leaves, visit(value)
    except RecursionError:
        raise InputError(f"a {type(value).__name__} that holds itself cannot be an argument or a result") from None


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
            case "tuple" | "list":
                items = [build(child) for child in node.children]
                kind = _class(node, (tuple, list)) or (tuple if node.kind == "tuple" else list)
                return items if kind is list else kind(items)
            case "dict":
                return {key: build(child) for key, child in zip(node.keys, node.children, strict=True)}
            case "namedtuple" | "mapping" | "object":
                pass
        fields = {key: build(child) for key, child in zip(node.keys, node.children, strict=True)}
        return _construct(node, fields)

    return build(tree)


def _class(node: Tree, base: type | tuple[type, ...]) -> type | None:
    """The class to rebuild, if it is here and of the family that the kind of node says."""
    kind = node.type_ or find_class(node.cls)
    return kind if kind is not None and issubclass(kind, base) else None


def _construct(node: Tree, fields: dict[Any, Any]) -> Any:
    kind: Any = _class(node, {"namedtuple": tuple, "mapping": Mapping}.get(node.kind, object))
    if kind is None or (node.kind == "object" and not _plain(kind)):
        return AttributeDict({str(key): value for key, value in fields.items()})
    if node.kind == "namedtuple":
        return kind._make(fields.values())
    if node.kind == "mapping":
        if issubclass(kind, defaultdict):
            return _default(fields)
        made: Any = kind(**fields) if hasattr(kind, "__dataclass_fields__") else kind(fields)
        return made
    made = object.__new__(kind)
    for key, value in fields.items():
        object.__setattr__(made, key, value)
    return made


def _default(fields: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(None, fields)


def _plain(kind: type) -> bool:
    """Whether an object of that class is its attributes: nothing is kept out of Python's sight."""
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _fields(item: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(item):
        return {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    if hasattr(item, "__dict__"):
        return dict(vars(item))
    if not _plain(type(item)):
        raise InputError(
            f"a {type(item).__module__}.{type(item).__name__} cannot be an argument or a result; use tensors"
            f"{' (torch.from_numpy makes one of an array)' if type(item).__module__ == 'numpy' else ''}, numbers, "
            "strings, None, and tuples, lists, dicts, dataclasses or plain objects of these"
        )
    slots = [s for k in type(item).__mro__ for s in getattr(k, "__slots__", ()) if hasattr(item, s)]
    return {slot: getattr(item, slot) for slot in slots}


__all__ = ["AttributeDict", "Tree", "flatten", "unflatten"]
