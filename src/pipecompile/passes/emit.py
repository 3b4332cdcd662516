"""Print fx nodes as Python statements: one assignment a node, grouped and commented by layer."""

from __future__ import annotations

import builtins
import keyword
import math
import operator
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from pipecompile.errors import TraceError
from pipecompile.ir.graph import Layer, ModelGraph
from pipecompile.passes.layers import AFTER, free_closure, free_results
from pipecompile.passes.operators import is_higher_order, is_operator, qualified_name

HEADER = "import math\nimport operator\nfrom itertools import count\n\nimport torch\n\naten = torch.ops.aten\n"

_RESERVED = re.compile(
    r"aten|count|link|math|operator|torch|sample|start|clock|message|model|run|state"
    r"|(stage|forward|record|again|backward|backward_input|backward_weight)_\d+|(from|to)_(host|stage_\d+)|" + "|".join((*dir(builtins), *keyword.kwlist))
)

#: What generated training steps use besides.
_RESERVED_IN_STEPS = frozenset(
    "backward base draw edge_of edges filled forward grad gradients graph held kept learns link loss loss_of made message "
    "number parts passed pending slip state sums target trained verdict weights".split()
)


class Emitter:
    """Writes functions over tensors for parts of one graph. Sub-graphs become functions too."""

    def __init__(self, graph: ModelGraph, module: fx.GraphModule) -> None:
        self.model = graph
        self.module = module
        self.nodes: dict[str, fx.Node] = {node.name: node for node in graph.graph.nodes}
        self.order = {node: i for i, node in enumerate(graph.graph.nodes)}
        self.functions: dict[str, str] = {}
        self.names: dict[Any, str] = {}

    def body(self, layers: Sequence[Layer], results: Sequence[str], *, clock: bool = False) -> list[str]:
        """Statements that compute ``layers`` in order, forgetting values after their last use.

        ``results`` are kept to the end. With ``clock``, ``clock(i)`` follows layer ``i``.
        """
        blocks = self._blocks(layers, results)
        last: dict[fx.Node, int] = {}
        for i, (_, nodes) in enumerate(blocks):
            for node in nodes:
                last[node] = i
                for arg in (*node.all_input_nodes, *node.meta.get(AFTER, ())):
                    last[arg] = i
        lines: list[str] = []
        computed = {node for _, nodes in blocks for node in nodes}
        for i, (layer, nodes) in enumerate(blocks):
            lines.append(self._comment(layer, nodes))
            lines += [line for node in nodes for line in self.statement(node)]
            dead = [n for n, end in last.items() if end == i and n in computed and n.users and n.name not in results]
            if dead:
                names = ", ".join(local(n) for n in sorted(dead, key=lambda n: self.order[n]))
                lines += [f"del {part.rstrip(',')}" for part in textwrap.wrap(names, 104, break_long_words=False)]
            if clock and layer is not None:
                lines.append(f"clock({i - sum(other is None for other, _ in blocks[:i])})")
        return lines

    def _blocks(self, layers: Sequence[Layer], results: Sequence[str]) -> list[tuple[Layer | None, list[fx.Node]]]:
        """Per layer its nodes, preceded by the free nodes it is the first to need."""
        blocks: list[tuple[Layer | None, list[fx.Node]]] = []
        done: set[fx.Node] = set()
        for layer in layers:
            nodes = [self.nodes[name] for name in layer.nodes]
            needed = free_closure(nodes, self.model.free) - done
            done |= needed
            blocks.append((layer, [*sorted(needed, key=lambda n: self.order[n]), *nodes]))
        wanted = [self.nodes[name] for name in results if name in self.model.free]
        rest = free_results(self.model.graph, wanted, self.model.free) - done
        if rest:
            blocks.append((None, sorted(rest, key=lambda n: self.order[n])))
        return blocks

    def _comment(self, layer: Layer | None, nodes: list[fx.Node]) -> str:
        if layer is None:
            return "# the same for every sample"
        return f"# {layer.name}" + (f"  ({layer.source})" if layer.source else "")

    def statement(self, node: fx.Node) -> list[str]:
        """One node as source lines."""
        if node.op == "get_attr":
            return []
        name = local(node)
        target = node.target
        operation = getattr(target, "__name__", "")
        if operation == "wrap_with_autocast":
            device, dtype, enabled, cache, body, *operands = node.args
            call = f"{self.expression(body)}({self._list(operands)})"
            options = f"dtype={literal(dtype)}, enabled={enabled}, cache_enabled={cache}"
            return [f"with torch.autocast({device!r}, {options}):", f"    {name} = {call}"]
        if operation == "cond" and _namespace(target) == "higher_order":
            predicate, yes, no, operands = node.args
            choice = f"{self.expression(yes)} if {self.expression(predicate)} else {self.expression(no)}"
            assert isinstance(operands, (list, tuple))
            return [f"{name} = ({choice})({self._list(operands)})"]
        if target is operator.getitem:
            return [f"{name} = {self.expression(node.args[0])}[{self.expression(node.args[1])}]"]
        arguments = [self.expression(arg) for arg in node.args]
        arguments += [f"{key}={self.expression(value)}" for key, value in node.kwargs.items()]
        call = f"{callee(target)}({', '.join(arguments)})"
        return [f"{name} = {call}" if node.users else call]

    def _list(self, values: Iterable[Any]) -> str:
        return ", ".join(self.expression(value) for value in values)

    def expression(self, value: Any) -> str:
        """An argument as source: a variable, a sub-graph's function or a literal."""
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                return self._function(str(value.target))
            return local(value)
        if isinstance(value, tuple):
            items: tuple[Any, ...] = value
            return f"({self._list(items)}{',' if len(items) == 1 else ''})"
        if isinstance(value, list):
            return f"[{self._list(value)}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.expression(v)}" for k, v in value.items()) + "}"
        if isinstance(value, slice):
            return (
                f"slice({self.expression(value.start)}, {self.expression(value.stop)}, {self.expression(value.step)})"
            )
        return literal(value)

    def _function(self, target: str) -> str:
        """The name of the function a sub-graph is printed as; prints it on first use."""
        found: Any = self.module
        for part in target.split("."):
            found = getattr(found, part)
        if not isinstance(found, fx.GraphModule):
            raise TraceError(f"the graph refers to {target!r}, a {type(found).__name__}: only sub-graphs can be emitted")
        if found not in self.names:
            name = target.replace(".", "_")
            while name in self.functions:  # a sub-graph may hold others of the same name
                name += "_inner"
            self.names[found] = name
            self.functions[name] = ""
            inner = Emitter(self.model, found)
            inner.functions, inner.names = self.functions, self.names
            nodes = list(found.graph.nodes)
            parameters = [local(n) for n in nodes if n.op == "placeholder"]
            lines = [line for n in nodes if n.op == "call_function" for line in inner.statement(n)]
            (output,) = found.graph.find_nodes(op="output")
            lines.append(f"return {inner.expression(output.args[0])}")
            self.functions[name] = f"def {name}({', '.join(parameters)}):\n" + "".join(f"    {x}\n" for x in lines)
        return self.names[found]


def _namespace(target: Any) -> str:
    return str(getattr(target, "namespace", ""))


def local(node: fx.Node) -> str:
    """The variable a node's value is held in: never one of the module's own, never private, one a node."""
    name = node.name
    if _RESERVED.fullmatch(name) or name in _RESERVED_IN_STEPS:
        return f"{name}_"
    return f"v{name}" if re.match("v*_", name) else name


def callee(target: Any) -> str:
    """The callable of a node as an expression over torch, operator and math.

    Raises:
        TraceError: for a target that generated code has no name for.
    """
    if is_operator(target):
        namespace, name, overload = qualified_name(target)
        prefix = "aten" if namespace == "aten" else f"torch.ops.{namespace}"
        return f"{prefix}.{name}.{overload}"
    if is_higher_order(target):
        return f"torch.ops.higher_order.{target.__name__}"
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", "")
    if module == "_operator":
        return f"operator.{name}"
    if module == "math":
        return f"math.{name}"
    if module.split(".")[0] == "torch" and getattr(torch, name, None) is target:
        return f"torch.{name}"
    raise TraceError(f"the graph calls {target!r}, which generated code cannot name; replace that operation")


def literal(value: Any) -> str:
    """A constant as source."""
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f"math.{value}" if value > 0 or value != value else "-math.inf"
    if isinstance(value, complex):
        return f"complex({literal(value.real)}, {literal(value.imag)})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    raise TraceError(f"the graph holds a constant of type {type(value).__name__}, which generated code cannot express")
