"""Nests of arguments: taken apart and rebuilt, also from JSON and where a class is absent."""

from __future__ import annotations

import enum
import json
import subprocess  # noqa: F401 loaded, so that their classes could be found
import tempfile  # noqa: F401
from collections import OrderedDict, defaultdict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from pipecompile.errors import InputError
from pipecompile.ir.tree import AttributeDict, Tree, flatten, unflatten

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Record:
    """A class no one registered."""

    values: Any
    label: str = ""


class Colour(enum.Enum):
    RED = 1


class Plain:
    def __init__(self, size: Any) -> None:
        self.size = size


def tensors() -> st.SearchStrategy[torch.Tensor]:
    return st.integers(0, 3).map(lambda n: torch.arange(float(n)))


constants = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3) | st.sampled_from([torch.float32])
nests = st.recursive(
    tensors() | constants,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(0, 5), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Record, inner, st.text(max_size=3)),
        st.dictionaries(st.text(max_size=3), inner, max_size=2).map(OrderedDict),
    ),
    max_leaves=8,
)


def same(one: Any, two: Any) -> bool:
    """Equal in types, structure, constants and in which tensor object is where."""
    if type(one) is not type(two):
        return False
    if isinstance(one, torch.Tensor):
        return one is two
    if isinstance(one, dict):
        return list(one) == list(two) and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, (Record, Plain)):
        return same(vars(one), vars(two))
    return bool(one == two)


@hand_made.RELAXED
@given(nests)
def test_rebuilt_as_it_was(value: Any) -> None:
    leaves, tree = flatten(value)
    assert len(leaves) == tree.leaves
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    assert same(unflatten(tree, leaves), value)


@hand_made.RELAXED
@given(nests)
def test_rebuilt_after_json(value: Any) -> None:
    leaves, tree = flatten(value)
    read = Tree.from_json(json.loads(json.dumps(tree.to_json())))
    assert read == tree
    assert same(unflatten(read, leaves), value)


def test_leaves_in_order_and_repeated() -> None:
    a, b = torch.zeros(1), torch.ones(2)
    leaves, tree = flatten({"x": [a, 3, (b, a)]})
    assert [id(leaf) for leaf in leaves] == [id(a), id(b), id(a)]
    assert unflatten(tree, [1, 2, 4]) == {"x": [1, 3, (2, 4)]}


def test_plain_objects_keep_their_attributes() -> None:
    a = torch.zeros(1)
    leaves, tree = flatten(Plain((a, 2)))
    assert same(unflatten(tree, leaves), Plain((a, 2)))


def test_an_absent_class_becomes_attributes() -> None:
    a = torch.zeros(1)
    leaves, tree = flatten(Pair([a], "first"))
    data = tree.to_json()
    data["class"] = "no_such_module:Pair"
    found = unflatten(Tree.from_json(data), leaves)
    assert type(found) is AttributeDict
    assert found.left[0] is a
    assert found.right == "first"
    with pytest.raises(AttributeError):
        _ = found.missing


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(2, 3).shape,
        torch.zeros(2, 3).median(1),
        defaultdict(list, {"a": torch.zeros(1)}),
        {(2, "x"): 1j, "b": b"\x01", "s": slice(1, None), "r": range(3), "l": torch.strided, "e": Colour.RED},
        [torch.channels_last, Record, torch.device("cpu")],
    ],
    ids=["Size", "return type", "defaultdict", "constants", "torch's constants"],
)
def test_classes_and_constants_survive_json(value: Any) -> None:
    leaves, tree = flatten(value)
    for known in (tree, Tree.from_json(json.loads(json.dumps(tree.to_json())))):
        assert same(unflatten(known, leaves), value)


@pytest.mark.parametrize("value", [{1, 2}, deque([1]), (t for t in ()), torch.zeros(2).numpy()], ids=lambda v: type(v))
def test_what_cannot_be_rebuilt_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match=type(value).__name__):
        flatten([value])


def test_an_object_that_holds_itself_is_refused() -> None:
    loop = Plain(None)
    loop.size = [loop]
    with pytest.raises(InputError, match="holds itself"):
        flatten(loop)


@pytest.mark.parametrize(
    ("kind", "name", "keys"),
    [
        ("namedtuple", "subprocess:Popen", ["args"]),
        ("mapping", "subprocess:Popen", ["true"]),
        ("object", "tempfile:_TemporaryFileCloser", ["name"]),
        ("list", "subprocess:Popen", []),
        ("namedtuple", f"{__name__}:Plain", ["size"]),
    ],
)
def test_a_file_cannot_choose_what_is_called(kind: str, name: str, keys: list[str]) -> None:
    data = {"kind": kind, "class": name, "keys": keys, "children": [{"kind": "const", "const": "x"}] * len(keys)}
    assert type(unflatten(Tree.from_json(data), [])) in (AttributeDict, list)


def test_wrong_number_of_leaves() -> None:
    _, tree = flatten((torch.zeros(1), torch.zeros(1)))
    with pytest.raises(ValueError, match="expected 2 leaves, got 1"):
        unflatten(tree, [torch.zeros(1)])


def test_other_kinds_of_leaves() -> None:
    leaves, tree = flatten((1, "a", torch.zeros(1)), is_leaf=lambda item: isinstance(item, int))
    assert leaves[0] == 1
    assert [child.kind for child in tree.children] == ["leaf", "const", "leaf"]
