"""Rewrites that leave every result bit for bit the same and give the planner more freedom."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pipecompile.passes.capture import is_state
from pipecompile.passes.observe import Observation
from pipecompile.passes.operators import aten, operator_name, out_of_place, written_args

_DROPOUTS = frozenset({"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout", "aten::feature_alpha_dropout"})
_ASSERTS = frozenset(
    {"aten::_assert_tensor_metadata", "aten::_assert_scalar", "aten::_assert_async", "aten::sym_constrain_range"}
    | {"aten::sym_constrain_range_for_size"}
)


def remove_no_ops(module: fx.GraphModule, *, training: bool = False) -> None:
    """Drop what does nothing in inference: dropout outside training, detach, export's own checks.

    Regions that only switch gradients are inlined: inference runs without them anyway. In
    ``training`` detach stays, and what a region without gradients reads is detached.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if getattr(node.target, "__name__", "") == "wrap_with_set_grad_enabled":
            _inline(module, node, node.args[1], node.args[2:], detach=training and node.args[0] is False)
            continue
        name = operator_name(node)
        idle = name in _DROPOUTS and node.args[2:] and node.args[2] is False
        nothing = ("aten::alias", "aten::lift_fresh") if training else ("aten::alias", "aten::lift_fresh", "aten::detach")
        if idle or name in nothing:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name in _ASSERTS and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=_is_impure)
    graph.lint()


def copy_mutated_inputs(graph: fx.Graph, seen: Observation) -> bool:
    """Let the model write to a copy of a user input: stages each get their own, the caller keeps his."""
    written = {root for roots in seen.writes.values() for root in roots}
    changed = False
    for node in list(graph.nodes):
        if node.op == "placeholder" and not is_state(node) and node in written:
            first = next(n for n in graph.nodes if n.op != "placeholder")
            with graph.inserting_before(first):
                copy = graph.call_function(aten.clone.default, (node,))
            copy.meta = {key: node.meta[key] for key in ("val",) if key in node.meta}
            for user in [user for user in node.users if user is not copy]:
                user.replace_input_with(node, copy)
            changed = True
    return changed


def copy_mutated_outputs(graph: fx.Graph, seen: Observation) -> bool:
    """Return a copy where the model returns a buffer it writes to: the next sample overwrites it."""
    written = {root for roots in seen.writes.values() for root in roots if root.op == "placeholder"}
    (output,) = graph.find_nodes(op="output")
    copied: dict[fx.Node, fx.Node] = {}
    for value in output.all_input_nodes:
        if seen.root[value] in written:
            with graph.inserting_before(output):
                copied[value] = graph.call_function(aten.clone.default, (value,))
                copied[value].meta = dict(value.meta)
    if copied:
        output.args = fx.map_arg(output.args, lambda n: copied.get(n, n))  # type: ignore[assignment]
    return bool(copied)


def functionalise(graph: fx.Graph, seen: Observation) -> bool:
    """Replace ``x += f(x)`` by ``y = x + f(x)`` where nothing can tell the difference.

    An in-place write ties everything that touched its storage before into one layer; in
    ``x += block(x)`` that is the whole block. The write may go out of place when the storage was
    made in the graph, something else read it before, and afterwards it is read only through the
    result of the write.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    changed = False
    for node, roots in seen.writes.items():
        twin = out_of_place(node)
        target = node.args[0]
        if twin is None or len(roots) != 1 or roots[0].op == "placeholder" or not isinstance(target, fx.Node):
            continue
        aliases = [n for n, root in seen.root.items() if root is roots[0] and order[n] < order[node]]
        users = {user for alias in aliases for user in alias.users if user is not node and user not in aliases}
        if not users or any(order[user] > order[node] for user in users):
            continue  # nothing gained, or a later reader expects to see the write
        if not _same_result(node, target, seen):
            continue
        node.target = twin
        changed = True
    return changed


def _same_result(node: fx.Node, target: fx.Node, seen: Observation) -> bool:
    """In place, the target decides dtype, shape and strides; out of place, all arguments do."""
    mine = seen.specs.get(target.name)
    others = [seen.specs.get(arg.name) for arg in node.all_input_nodes if arg is not target]
    if mine is None or mine.dynamic:
        return False
    dense = mine.extent == torch.Size(mine.shape).numel()
    return dense and all(o is not None and o.dtype == mine.dtype and len(o.shape) <= len(mine.shape) for o in others)


def _is_impure(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return bool(written_args(node)) or operator_name(node) in _ASSERTS


def _inline(module: fx.GraphModule, node: fx.Node, body: Any, operands: Any, *, detach: bool = False) -> None:
    """Replace a call of a sub-graph by the sub-graph's nodes."""
    sub = module.get_submodule(body.target)
    assert isinstance(sub, fx.GraphModule)
    env = dict(zip(sub.graph.find_nodes(op="placeholder"), operands, strict=True))
    with module.graph.inserting_before(node):
        for inner, operand in list(env.items()) if detach else []:
            if isinstance(operand, fx.Node) and isinstance(operand.meta.get("val"), torch.Tensor):
                env[inner] = module.graph.call_function(aten.detach.default, (operand,))
                env[inner].meta = dict(operand.meta)
        for inner in sub.graph.nodes:
            if inner.op == "get_attr":
                target = f"{body.target}.{inner.target}"
                env[inner] = module.graph.get_attr(target)
            elif inner.op == "output":
                results = fx.map_arg(inner.args[0], lambda n: env[n])
            elif inner.op != "placeholder":
                env[inner] = module.graph.node_copy(inner, lambda n: env[n])
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        module.graph.erase_node(user)
    module.graph.erase_node(node)
