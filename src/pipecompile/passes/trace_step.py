"""Trace for training: the model in train mode, with what has gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from pipecompile.errors import TraceError
from pipecompile.ir.graph import TensorSpec
from pipecompile.ir.training import Gradients
from pipecompile.ir.tree import flatten
from pipecompile.passes import clean
from pipecompile.passes.capture import Capture, capture
from pipecompile.passes.check import compare_with_eager, exact, run_once
from pipecompile.passes.check_step import compare_gradients
from pipecompile.passes.keep import cards
from pipecompile.passes.observe import Observation, copies, observe
from pipecompile.passes.smaller_batches import SmallerBatches
from pipecompile.passes.trace import Trace, Traced


@dataclass(frozen=True)
class TraceStep(Trace):
    """Capture a model in train mode.

    A model that is in train mode keeps the modes of its submodules (a frozen BatchNorm in eval
    mode stays so); one in eval mode is put into train mode as a whole. With ``smaller`` samples may be fewer.
    """

    smaller: SmallerBatches | None = None

    def trace(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Traced, Gradients]:
        """Trace one micro-batch; the model's mode, buffers, gradients and random state stay as they are.

        Raises:
            TraceError: if the model cannot be captured, the graph or its gradients differ from
                eager, or nothing in it can be trained.
        """
        modes = {module: module.training for module in model.modules()}
        if not model.training:
            model.train()
        try:
            run_once(model, args, kwargs, self.device)
            try:
                found, captured = self._attempt_step(model, args, kwargs, as_eager=True)
            except TraceError as error:
                try:
                    found, captured = self._attempt_step(model, args, kwargs, as_eager=False)
                except TraceError:
                    raise error from error.__cause__
            leaves, _ = flatten((tuple(args), dict(kwargs)))
            gradients = _gradients(found, leaves)
            compare_gradients(model, found.module, found.tensors, args, kwargs)
            if self.smaller is not None:
                symbols = self.smaller.apply(model, captured, args, kwargs)
                found = replace(found, graph=replace(found.graph, symbols=symbols))
        finally:
            for module, training in modes.items():
                module.training = training
        return replace(found, graph=replace(found.graph, mode="train")), gradients

    def _attempt_step(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, as_eager: bool
    ) -> tuple[Traced, Capture]:
        with exact(model):
            found = capture(model, args, kwargs, self.dynamic_shapes, as_eager=as_eager, gradients=True)
            leaves, _ = flatten((tuple(args), dict(kwargs)))
            seen = _prepare(found, leaves)
        compare_with_eager(model, found.module, found.tensors, found.out_tree, args, kwargs)
        return Traced(self._graph(model, found, seen), found.tensors, found.module, found.parameters), found


def _prepare(found: Capture, leaves: list[Any]) -> Observation:
    inputs = copies(leaves)
    clean.remove_no_ops(found.module, training=True)
    seen = observe(found.module, found.tensors, inputs)
    for rewrite in (clean.copy_mutated_inputs, clean.copy_mutated_outputs, clean.functionalise):
        if rewrite(found.module.graph, seen):
            found.module.recompile()
            seen = observe(found.module, found.tensors, inputs)
    return seen


def _gradients(found: Traced, leaves: list[Any]) -> Gradients:
    """Run the graph once with gradients, and note which values have them: those that require them and lead to a result.

    A branch that ends in a ``detach()`` has none, as in plain PyTorch: no zeros, which an optimizer would act upon.
    """
    with torch.enable_grad(), torch.random.fork_rng(devices=cards()):
        watcher = _Watcher(found.module)
        watcher.run(*copies(found.tensors.values()), *(_plain(leaf) for leaf in copies(leaves)))
    weights = {
        entry.name: TensorSpec.of(found.tensors[entry.name])
        for entry in found.graph.state
        if entry.kind == "parameter" and entry.requires_grad
    }
    outputs = {ref.name for ref in found.graph.outputs}
    if not weights or not outputs & (watcher.values | set(weights)):
        raise TraceError(
            f"{found.graph.name} has nothing to train: no result depends on a parameter that requires gradients"
        )
    return Gradients(_leading(found.module.graph, watcher), weights)


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


class _Watcher(fx.Interpreter):
    """Notes the nodes whose value requires gradients."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: set[str] = set()
        self.through: set[str] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            if not isinstance(result, torch.Tensor):  # several, taken apart by further nodes
                self.through.add(n.name)
            elif result.requires_grad:
                self.values.add(n.name)
        return result


def _leading(graph: fx.Graph, watcher: _Watcher) -> frozenset[str]:
    """The values that lead to a result. What goes into an in-place operator does: others see it there."""
    lead: set[str] = set()
    for node in reversed(graph.nodes):
        users = {user.name for user in node.users}
        if users & lead or any(user.op == "output" for user in node.users) or _in_place(node):
            lead |= {node.name} & (watcher.values | watcher.through)
    return frozenset(lead & watcher.values)


def _in_place(node: fx.Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


__all__ = ["TraceStep"]
