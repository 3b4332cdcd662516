"""Trace: nn.Module and example inputs -> ModelGraph."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from pipecompile.errors import InputError, TraceError
from pipecompile.ir.graph import ModelGraph, OutputRef
from pipecompile.ir.tree import Tree, flatten
from pipecompile.passes import clean
from pipecompile.passes.capture import Capture, capture, source_of
from pipecompile.passes.check import compare_with_eager, exact, run_once
from pipecompile.passes.keep import attributes_kept
from pipecompile.passes.layers import depends_on_data, find_layers, free_nodes
from pipecompile.passes.observe import Observation, copies, observe


@dataclass(frozen=True)
class Traced:
    """A model's graph, and its own tensors by placeholder name (not copies)."""

    graph: ModelGraph
    tensors: dict[str, torch.Tensor]
    module: fx.GraphModule
    parameters: tuple[str, ...]


@dataclass(frozen=True)
class Trace:
    """Capture a model in eval mode as a graph of layers.

    ``leaf`` names modules never cut inside: path patterns (``"encoder.*"``) or module classes.
    ``dynamic_shapes`` is as for ``torch.export.export``. Model and examples must be on ``device``.
    """

    leaf: tuple[str | type[nn.Module], ...] = ()
    dynamic_shapes: Any | None = None
    device: str = "cpu"

    def apply(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Traced:
        """Trace ``model(*args, **kwargs)``; the model's mode, buffers and random state stay as they are.

        Raises:
            TraceError: if the model cannot be captured, or the graph differs from eager.
        """
        with attributes_kept(model):  # training modes among them
            with suppress(NotImplementedError):  # the mode of an exported module is fixed
                model.eval()
            # Caches of the libraries a model uses must be filled by a real call, not by capture.
            run_once(model, args, kwargs, self.device)
            try:
                return self._attempt(model, args, kwargs, as_eager=True)
            except TraceError as error:
                try:
                    return self._attempt(model, args, kwargs, as_eager=False)
                except TraceError:
                    raise error from error.__cause__

    def _attempt(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, as_eager: bool) -> Traced:
        with exact(model):
            found = capture(model, args, kwargs, self.dynamic_shapes, as_eager=as_eager)
            leaves, _ = flatten((tuple(args), dict(kwargs)))
            seen = _prepare(found, leaves)
        compare_with_eager(model, found.module, found.tensors, found.out_tree, args, kwargs)
        return Traced(self._graph(model, found, seen), found.tensors, found.module, found.parameters)

    def _graph(self, model: nn.Module, found: Capture, seen: Observation) -> ModelGraph:
        graph = found.module.graph
        free = free_nodes(graph, seen)
        layers = find_layers(graph, seen, free, self._leaf_patterns(model))
        outputs, out_tree = _outputs(found)
        _refuse_unknown_sizes(model, graph, outputs, seen)
        written = {root.name for roots in seen.writes.values() for root in roots}
        state = tuple(replace(entry, mutated=entry.name in written) for entry in found.state)
        crossing = {value for layer in layers for value in layer.makes} | {ref.name for ref in outputs}
        values = {name: spec for name, spec in seen.specs.items() if name in crossing or name in found.inputs}
        return ModelGraph(
            type(model).__name__,
            "eval",
            graph,
            layers,
            free,
            values,
            state,
            found.inputs,
            outputs,
            found.in_tree,
            out_tree,
            found.symbols,
        )

    def _leaf_patterns(self, model: nn.Module) -> list[str]:
        modules = dict(model.named_modules(remove_duplicate=False))
        patterns = [entry for entry in self.leaf if isinstance(entry, str)]
        for pattern in patterns:
            if not fnmatch.filter(modules, pattern):
                near = difflib.get_close_matches(pattern, modules, 1, 0.3)
                raise InputError(f"leaf: no module matches {pattern!r}" + (f"; the nearest is {near[0]!r}" if near else ""))
        classes = tuple(entry for entry in self.leaf if isinstance(entry, type))
        return patterns + [name for name, module in modules.items() if classes and isinstance(module, classes)]


def _refuse_unknown_sizes(
    model: nn.Module, graph: fx.Graph, outputs: tuple[OutputRef, ...], seen: Observation
) -> None:
    """A result travels through memory set aside for it, so its size must follow from those of the inputs."""
    made = {node.name: node for node in graph.nodes}
    for index, ref in enumerate(outputs):
        spec = seen.specs.get(ref.name)
        if spec is not None and spec.dynamic and depends_on_data(spec.limit):
            raise TraceError(
                f"result {index} of {type(model).__name__} has a size that depends on the values of tensors.\n"
                f"  where:  {source_of(made[ref.name])}\n"
                "  try:    return it at a fixed size (a mask in place of the chosen items, topk in place of nonzero)"
            )


def _prepare(found: Capture, leaves: list[Any]) -> Observation:
    """Clean the graph until nothing changes, and observe the result."""
    inputs = copies(leaves)
    clean.remove_no_ops(found.module)
    seen = observe(found.module, found.tensors, inputs)
    for rewrite in (clean.copy_mutated_inputs, clean.copy_mutated_outputs, clean.functionalise):
        if rewrite(found.module.graph, seen):
            found.module.recompile()
            seen = observe(found.module, found.tensors, inputs)
    return seen


def _outputs(found: Capture) -> tuple[tuple[OutputRef, ...], Tree]:
    """Where each leaf of the result comes from; a size that export made constant leaves the tree."""
    (output,) = found.module.graph.find_nodes(op="output")
    leaves: Any = output.args[0]
    refs: list[OutputRef] = []
    rest = iter(leaves)

    def visit(tree: Tree) -> Tree:
        if tree.kind != "leaf":
            return replace(tree, children=tuple(visit(child) for child in tree.children))
        leaf = next(rest)
        if not isinstance(leaf, fx.Node):
            return Tree("const", const=leaf)
        kind = "value" if leaf.op == "call_function" else "input" if leaf.name in found.inputs else "state"
        refs.append(OutputRef(kind, leaf.name))
        return tree

    out_tree = visit(found.out_tree)
    return tuple(refs), out_tree
