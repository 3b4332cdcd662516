"""The traced model: an fx graph, its layers, and what crosses between them."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from pipecompile.ir.tree import Tree

#: Slots, weights and stage inputs start at multiples of this many bytes, as torch's own CPU
#: allocations do: some BLAS kernels give other last bits on other alignments.
ALIGNMENT = 64


@dataclass(frozen=True)
class TensorSpec:
    """Layout of one value that crosses a stage border.

    ``shape`` and ``stride`` are in elements, as observed on the example inputs. ``skew`` is the
    offset in bytes of the first element from an aligned address. ``dynamic`` marks a value whose
    shape may differ from sample to sample; its ``limit`` then is an arithmetic expression in the
    symbols of the dynamic sizes giving the number of bytes it needs. A Python number
    (``kind`` other than ``"tensor"``) travels as an eight-byte scalar.
    """

    shape: tuple[int, ...]
    dtype: str
    stride: tuple[int, ...]
    skew: int = 0
    kind: Literal["tensor", "int", "float", "bool"] = "tensor"
    dynamic: bool = False
    limit: str = ""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as a torch object."""
        found = getattr(torch, self.dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def extent(self) -> int:
        """Elements between the first and the last addressed one, both included."""
        if any(size == 0 for size in self.shape):
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        """Bytes the value takes in a ring slot, strides kept, without alignment."""
        return self.skew + self.extent * self.torch_dtype.itemsize

    @classmethod
    def of(cls, value: Any) -> TensorSpec:
        """The spec of a tensor or a Python number as it lies in memory now.

        Raises:
            TypeError: for any other kind of value.
        """
        if isinstance(value, torch.Tensor):
            skew = value.data_ptr() % ALIGNMENT
            return cls(tuple(value.shape), str(value.dtype).removeprefix("torch."), tuple(value.stride()), skew)
        if isinstance(value, bool):
            return cls((), "int64", (), kind="bool")
        if isinstance(value, int):
            return cls((), "int64", (), kind="int")
        if isinstance(value, float):
            return cls((), "float64", (), kind="float")
        raise TypeError(f"a value of type {type(value).__name__} cannot cross stages")


@dataclass(frozen=True)
class Symbol:
    """A dynamic size: read from dimension ``dim`` of user input ``input``, within ``low .. high``.

    ``also`` are the other places that it decides: (input, dimension, size as an expression).
    """

    input: int
    dim: int
    low: int
    high: int
    also: tuple[tuple[int, int, str], ...] = ()


@dataclass(frozen=True)
class StateSpec:
    """A parameter, buffer or constant tensor the graph reads; ``name`` is its placeholder.

    ``requires_grad`` must hold wherever the graph runs: even without gradients, ``matmul`` takes
    another path for a weight that requires them, and rounds differently.
    """

    name: str
    fqn: str
    kind: Literal["parameter", "buffer", "constant"]
    mutated: bool = False
    nbytes: int = 0
    requires_grad: bool = False
    persistent: bool = True


@dataclass(frozen=True)
class OutputRef:
    """Where one leaf of the model's result comes from."""

    kind: Literal["value", "input", "state"]
    name: str


@dataclass(frozen=True)
class Layer:
    """The smallest piece a plan may place: ops that must not be cut apart.

    ``reads`` are values made by other layers (or user inputs), ``makes`` the values other layers
    or the caller need, ``state`` the weights used, all by node name.
    """

    name: str
    module: str
    source: str
    nodes: tuple[str, ...]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    state: tuple[str, ...]


@dataclass(frozen=True)
class ModelGraph:
    """A captured model in one mode.

    ``graph`` is an fx graph whose placeholders are first the state, then the user inputs.
    ``layers`` cover every call node except ``free`` ones: nodes that depend on no input and are
    recomputed in each stage that needs them. ``values`` holds the spec of every value some layer
    makes, and of the user inputs.
    """

    name: str
    mode: Literal["eval", "train"]
    graph: fx.Graph
    layers: tuple[Layer, ...]
    free: frozenset[str]
    values: Mapping[str, TensorSpec]
    state: tuple[StateSpec, ...]
    inputs: tuple[str, ...]
    outputs: tuple[OutputRef, ...]
    in_tree: Tree
    out_tree: Tree
    symbols: Mapping[str, Symbol] = field(default_factory=dict[str, "Symbol"])
    """Dynamic sizes by symbol."""

    @property
    def producer(self) -> dict[str, int]:
        """Value name -> index of the layer that makes it (user inputs are absent)."""
        return {value: i for i, layer in enumerate(self.layers) for value in layer.makes}

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """Pairs (producer layer, consumer layer), without repeats, in order."""
        made_by = self.producer
        return tuple(
            dict.fromkeys((made_by[v], i) for i, layer in enumerate(self.layers) for v in layer.reads if v in made_by)
        )


def evaluate(expression: str, sizes: Mapping[str, int]) -> int:
    """Value of a size expression of :attr:`TensorSpec.limit` for the given symbol values.

    Raises:
        ValueError: if the expression uses anything but ``+ - * // %``, Max, Min and symbols.
    """

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in sizes:
                return sizes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return _ARITHMETIC[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.Call(func=ast.Name(id="Max" | "Min" as name), args=args):
                return (max if name == "Max" else min)(value(arg) for arg in args)
            case ast.Call(func=ast.Name(id="FloorDiv" | "Mod" as name), args=[left, right]):
                return value(left) // value(right) if name == "FloorDiv" else value(left) % value(right)
            case _:
                raise ValueError(f"cannot evaluate the size {expression!r} for {dict(sizes)}")

    return value(ast.parse(expression, mode="eval").body)


_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
