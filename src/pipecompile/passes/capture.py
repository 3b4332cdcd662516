"""Capture a model as one flat fx graph with ``torch.export``: the only file that talks to it.

The model is wrapped so that export sees a function from a list of tensors to a list of tensors:
nests of arguments and results are taken apart by :mod:`pipecompile.ir.tree`, which needs no
registered classes.
"""

from __future__ import annotations

import copy
import inspect
import keyword
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn

from pipecompile.errors import InputError, PipecompileError, TraceError
from pipecompile.ir.graph import StateSpec, Symbol
from pipecompile.ir.tree import Tree, flatten, unflatten
from pipecompile.passes.explain import explain, is_torch
from pipecompile.passes.keep import state_kept
from pipecompile.passes.operators import buffers_of, not_exporting, quiet_export


@dataclass(frozen=True)
class Capture:
    """What export gave, under names fit for generated code.

    ``module.graph`` has the state as its first placeholders, then the user inputs.
    ``tensors`` are the model's own parameters and buffers (not copies), by placeholder name.
    """

    module: fx.GraphModule
    state: tuple[StateSpec, ...]
    tensors: dict[str, torch.Tensor]
    inputs: tuple[str, ...]
    in_tree: Tree
    out_tree: Tree
    symbols: dict[str, Symbol]
    parameters: tuple[str, ...]
    refuses: Callable[[Sequence[torch.Tensor]], str]
    """Why the graph is not what the model does for inputs of such shapes, which may be on ``meta``; empty if it is."""


class _Flat(nn.Module):
    """The model as a function of flat tensors. ``found`` receives the nest of the result."""

    def __init__(self, model: nn.Module, tree: Tree, found: list[Tree], as_eager: bool) -> None:
        super().__init__()
        self.model = model
        self._call = (tree, found, as_eager)

    def forward(self, *leaves: torch.Tensor) -> list[Any]:
        tree, found, as_eager = self._call
        args, kwargs = unflatten(tree, list(leaves))
        before = [(m, name, buffer) for m in self.model.modules() for name, buffer in buffers_of(m).items()]
        with not_exporting() if as_eager else nullcontext():
            result = self.model(*args, **kwargs)
        result, out_tree = flatten(result, lambda item: isinstance(item, (torch.SymInt, torch.SymFloat, torch.SymBool)))
        found[:] = [out_tree]
        for module, name, buffer in before:
            _keep_assignment(module, name, buffer)
        return result


def _keep_assignment(module: nn.Module, name: str, old: torch.Tensor | None) -> None:
    """Record ``self.buffer = value`` as a write: export loses it in any but the outermost module."""
    new = buffers_of(module).get(name)
    if new is old or new is None or old is None:
        return
    if new.shape != old.shape or new.dtype != old.dtype:
        raise TraceError(
            f"buffer {name!r} of {type(module).__name__} changes from {tuple(old.shape)} {old.dtype} to "
            f"{tuple(new.shape)} {new.dtype} in forward; state between samples must keep its shape and dtype"
        )
    old.copy_(new)
    buffers_of(module)[name] = old


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic_shapes: Any | None = None,
    *,
    as_eager: bool = True,
    gradients: bool = False,
) -> Capture:
    """Export ``model`` in its present mode, called as ``model(*args, **kwargs)``.

    ``as_eager`` makes code that behaves otherwise while exporting take its eager path. What it
    then caches in the model is fake, so a twin that shares only parameters and buffers is traced.
    With ``gradients``, regions under ``torch.no_grad()`` stay visible.

    Raises:
        TraceError: with the reason, the model's source line and what to try.
        InputError: if ``dynamic_shapes`` does not fit the arguments.
    """
    leaves, in_tree = flatten((tuple(args), dict(kwargs)))
    found: list[Tree] = []
    shapes = None
    if dynamic_shapes is not None:
        shapes = {"leaves": tuple(_shapes_of_leaves(model, in_tree, args, kwargs, dynamic_shapes))}
    traced = model
    try:
        with warnings.catch_warnings(), torch.set_grad_enabled(gradients), quiet_export():
            warnings.simplefilter("ignore")
            traced = _twin(model) if as_eager else model
            # one tensor given twice would be captured as one input for good
            apart = tuple(_alone(leaf) for leaf in leaves)
            with state_kept(traced):  # export writes to tensors that are plain attributes
                exported = torch.export.export(
                    _Flat(traced, in_tree, found, as_eager), apart, strict=False, dynamic_shapes=shapes
                )
    except PipecompileError:
        raise
    except Exception as error:  # export raises dozens of classes, user code any
        raise explain(error, traced) from error
    return _rename(exported, model, found[0], in_tree, _input_names(model, in_tree, len(args)))


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout in storage of its own."""
    fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return fresh.copy_(tensor).requires_grad_(tensor.requires_grad) if 0 not in tensor.stride() else tensor.detach()


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the module tree around the same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def is_state(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter, buffer or constant rather than a user input."""
    return node.meta.get("pipecompile_state", False)


def source_of(node: fx.Node) -> str:
    """``file.py:line`` of the model's own code that made a node; outside torch if possible."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [frame for frame in frames if not is_torch(frame[0])] or frames
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def module_of(node: fx.Node) -> tuple[str, ...]:
    """Paths of the modules a node was called in, outermost first, without the wrapper's prefix."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    paths = [re.sub(r"@\d+", "", path) for path, _ in stack.values()]
    return tuple(path.removeprefix("model").removeprefix(".") for path in paths if path)


def _rename(
    exported: torch.export.ExportedProgram, model: nn.Module, out_tree: Tree, in_tree: Tree, input_names: list[str]
) -> Capture:
    kinds = torch.export.graph_signature.InputKind
    own: dict[str, torch.Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    letters: dict[Any, tuple[str, Literal["parameter", "buffer", "constant"]]] = {
        kinds.PARAMETER: ("p", "parameter"),
        kinds.BUFFER: ("b", "buffer"),
        kinds.CONSTANT_TENSOR: ("c", "constant"),
    }
    graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
    state: list[StateSpec] = []
    tensors: dict[str, torch.Tensor] = {}
    names: list[str] = []
    sizes: list[tuple[int, int, str]] = []
    ranges = {str(symbol): bounds for symbol, bounds in exported.range_constraints.items()}
    old_nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    for spec in exported.graph_signature.input_specs:
        argument: Any = spec.arg
        node = old_nodes.get(argument.name)
        if spec.kind is kinds.USER_INPUT and node is not None:
            new = graph.placeholder(input_names[len(names)])
            sizes += [(len(names), dim, str(size)) for dim, size in enumerate(node.meta["val"].shape)
                      if isinstance(size, torch.SymInt)]  # fmt: skip
            names.append(new.name)
        elif spec.kind in letters and node is not None and spec.target is not None:
            letter, kind = letters[spec.kind]
            fqn = spec.target.removeprefix("model.")
            tensor = own.get(fqn)
            if tensor is None:
                tensor = exported.constants[spec.target]
                assert isinstance(tensor, torch.Tensor)
            new = graph.placeholder(f"{letter}_{re.sub(r'[^0-9a-zA-Z]+', '_', fqn)}")
            state.append(StateSpec(
                    new.name, fqn, kind, False, tensor.nbytes, tensor.requires_grad, spec.persistent is not False
                ))
            tensors[new.name] = tensor
        else:
            raise TraceError(
                f"the model uses {spec.kind.name.lower().replace('_', ' ')} {spec.target or ''}, which cannot be "
                "pipelined; keep only tensors as parameters, buffers or attributes"
            )
        new.meta = {**node.meta, "pipecompile_state": spec.kind is not kinds.USER_INPUT}
        env[node] = new
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda old: env[old])
    module = fx.GraphModule(exported.graph_module, graph)
    parameters = [p.name for p in _parameters(model) if p.kind not in _VARIADIC]
    symbols = _symbols(sizes, ranges)
    refuses = _guards(exported)
    return Capture(module, tuple(state), tensors, tuple(names), in_tree, out_tree, symbols, tuple(parameters), refuses)


def _guards(exported: torch.export.ExportedProgram) -> Callable[[Sequence[torch.Tensor]], str]:
    """What export took for granted of sizes while it traced: its module asserts that before it computes."""

    @cache
    def check() -> Any:
        with quiet_export():
            return exported.module()._guards_fn  # private: the public call would compute as well

    def refuses(leaves: Sequence[torch.Tensor]) -> str:
        try:
            check()(*leaves)
        except AssertionError as error:
            return str(error).removeprefix("Guard failed: ")
        return ""

    return refuses


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except ValueError:  # compiled code has no signature
        return []


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _symbols(sizes: list[tuple[int, int, str]], ranges: Mapping[str, Any]) -> dict[str, Symbol]:
    """Each symbol with the first dimension that is it alone, and the dimensions it decides besides."""
    found: dict[str, Symbol] = {}
    rest: list[tuple[int, int, str]] = []
    for place in sizes:
        if place[2].isidentifier() and place[2] not in found:
            found[place[2]] = Symbol(*place[:2], *_bounds(ranges.get(place[2])))
        else:
            rest.append(place)
    for name, symbol in found.items():
        also = tuple(place for place in rest if re.search(rf"\b{name}\b", place[2]))
        found[name] = replace(symbol, also=also)
    return found


def _bounds(given: Any) -> tuple[int, int]:
    """Lowest and highest value of a symbol; infinity becomes the largest integer."""

    def number(value: Any, default: int) -> int:
        try:
            return int(value)
        except (AttributeError, TypeError, ValueError, OverflowError):
            return default

    return number(getattr(given, "lower", None), 0), number(getattr(given, "upper", None), sys.maxsize)


def _input_names(model: nn.Module, tree: Tree, positional: int) -> list[str]:
    """A readable name for every tensor argument: its parameter, then the path inside it."""
    parameters = _parameters(model)
    names: list[str] = []

    def visit(node: Tree, path: str) -> None:
        if node.kind == "leaf":
            name = re.sub(r"\W+", "_", path).strip("_") or "input"
            names.append(f"{name}_" if keyword.iskeyword(name) or name in ("torch", "aten", "link") else name)
        for i, child in enumerate(node.children):
            visit(child, f"{path}_{node.keys[i] if node.keys else i}")

    args, kwargs = tree.children
    for i in range(positional):
        given = parameters[i] if i < len(parameters) else None
        variadic = given is None or given.kind in _VARIADIC
        visit(args.children[i], f"input_{i}" if variadic or given is None else given.name)
    for key, child in zip(kwargs.keys, kwargs.children, strict=True):
        visit(child, str(key))
    return [name if names.index(name) == i else f"{name}_{i}" for i, name in enumerate(names)]


def _shapes_of_leaves(
    model: nn.Module, tree: Tree, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any
) -> list[Any]:
    """Spread ``dynamic_shapes`` (as ``torch.export`` takes it) over the flat tensors."""
    names = [parameter.name for parameter in _parameters(model)]
    if isinstance(dynamic_shapes, Mapping):
        unknown = set(dynamic_shapes) - set(names) - set(kwargs)
        if unknown:
            raise InputError(f"dynamic_shapes names {sorted(unknown)}, but forward takes {names}")
        of_args = [dynamic_shapes.get(name) for name in names[: len(args)]]
        of_kwargs = {key: dynamic_shapes.get(key) for key in kwargs}
    else:
        given = [*dynamic_shapes, *[None] * (len(args) + len(kwargs) - len(dynamic_shapes))]
        of_args, of_kwargs = given[: len(args)], dict(zip(kwargs, given[len(args) :], strict=False))
    found: list[Any] = []

    def visit(node: Tree, spec: Any) -> None:
        if node.kind == "leaf":
            found.append(spec)
        for i, child in enumerate(node.children):
            key = node.keys[i] if node.keys else i
            visit(child, None if spec is None else spec.get(key) if isinstance(spec, Mapping) else spec[i])

    visit(tree.children[0], of_args)
    visit(tree.children[1], of_kwargs)
    return found
