"""Cut a captured graph into layers: the smallest pieces a plan may place on a device.

A layer is one operator with what must not be parted from it: its views and tuple items, in-place
writes with everything that touched the storage before, all uses of a buffer that is written to,
values whose shape depends on data, and modules named in ``leaf``. What ends in a cycle is merged.
"""

from __future__ import annotations

import fnmatch
import operator
import re
from collections import Counter
from collections.abc import Iterable, Sequence

import networkx as nx
import torch
from networkx.utils import UnionFind
from torch import fx

from pipecompile.ir.graph import Layer
from pipecompile.passes.capture import is_state, module_of, source_of
from pipecompile.passes.observe import Observation
from pipecompile.passes.operators import is_random, operator_name, returns_alias

#: Key of ``node.meta``: earlier in-place writes by free nodes to the storages a node reads.
AFTER = "pipecompile_after"

_DATA_DEPENDENT = re.compile(r"\bu\d+\b")


def depends_on_data(size: str) -> bool:
    """Whether a size, as text, has a symbol that no input's shape gives."""
    return _DATA_DEPENDENT.search(size) is not None


def free_nodes(graph: fx.Graph, seen: Observation) -> frozenset[str]:
    """Nodes that depend on no input, no written buffer and no random numbers.

    Each stage that needs one recomputes it. A storage written to with anything that depends on
    an input makes all its users depend on the input too.
    """
    written = {root for roots in seen.writes.values() for root in roots}
    state = {node for node in graph.nodes if node.op == "placeholder" and is_state(node)}
    bound = {n for n in graph.nodes if n.op == "placeholder" and (n not in state or n in written)}
    while True:
        before, read = len(bound), set[fx.Node]()
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            touched = {seen.root[arg] for arg in node.all_input_nodes} | {seen.root[node]}
            if touched & bound or bound & set(node.all_input_nodes) or is_random(node.target):
                bound.add(node)
            if node in bound:
                bound |= set(seen.writes.get(node, ()))
                read |= touched
            else:  # what a sample reads before the write must not be written too early
                bound |= read & set(seen.writes.get(node, ()))
        if len(bound) == before:
            break
    free = [node for node in graph.nodes if node.op == "call_function" and node not in bound]
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        touched = dict.fromkeys(seen.root[arg] for arg in node.all_input_nodes)
        node.meta[AFTER] = tuple(w for root in touched for w in writers.get(root, ()))
        for root in seen.writes.get(node, ()) if node not in bound else ():
            writers.setdefault(root, []).append(node)
    return frozenset(node.name for node in free)


def free_results(graph: fx.Graph, wanted: Iterable[fx.Node], free: frozenset[str]) -> set[fx.Node]:
    """Free nodes whose values are results of the model, with all that computes and completes them."""
    nodes = set(wanted)
    if not nodes:
        return nodes
    (output,) = graph.find_nodes(op="output")
    nodes |= set(output.meta.get(AFTER, ()))
    return nodes | free_closure(nodes, free)


def free_closure(nodes: Iterable[fx.Node], free: frozenset[str]) -> set[fx.Node]:
    """The free nodes needed to compute ``nodes``, directly or through others."""
    found: set[fx.Node] = set()
    todo = [arg for node in nodes for arg in (*node.all_input_nodes, *node.meta.get(AFTER, ()))]
    while todo:
        node = todo.pop()
        if node.name in free and node not in found:
            found.add(node)
            todo += [*node.all_input_nodes, *node.meta.get(AFTER, ())]
    return found


def find_layers(
    graph: fx.Graph, seen: Observation, free: frozenset[str], leaf: Sequence[str] = ()
) -> tuple[Layer, ...]:
    """The layers of a graph in an order that respects every dependency, close to program order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    bound = [node for node in graph.nodes if node.op == "call_function" and node.name not in free]
    groups = UnionFind(bound)
    for node in bound:
        if node.target is operator.getitem and node.args[0] in order:
            _union(groups, free, node, node.args[0])
        _union(groups, free, node, seen.root[node])
        if depends_on_data(_shape_text(node)):
            for user in node.users:
                _union(groups, free, node, user)
    _tie_writes(groups, bound, seen, order)
    _tie_modules(groups, bound, leaf)
    return _number(graph, _components(groups, bound, free), order, free)


def _union(groups: UnionFind[fx.Node], free: frozenset[str], one: fx.Node, other: object) -> None:
    if isinstance(other, fx.Node) and other.op == "call_function" and other.name not in free:
        groups.union(one, other)


def _tie_writes(groups: UnionFind[fx.Node], bound: list[fx.Node], seen: Observation, order: dict[fx.Node, int]) -> None:
    """Tie what touches a written storage: up to the last write, or for ever if it outlives the sample."""
    last: dict[fx.Node, int] = {}
    for node, roots in seen.writes.items():
        for root in roots:
            last[root] = len(order) if root.op == "placeholder" else max(last.get(root, 0), order[node])
    for root, end in last.items():
        touching = [
            node
            for node in bound
            if order[node] <= end
            and (seen.root[node] is root or any(seen.root[a] is root for a in node.all_input_nodes))
        ]
        if touching:
            groups.union(*touching)


def _tie_modules(groups: UnionFind[fx.Node], bound: list[fx.Node], leaf: Sequence[str]) -> None:
    """Keep each call of a module matched by a ``leaf`` pattern whole."""
    previous: tuple[str, fx.Node] | None = None
    for node in bound:
        path = next((p for p in module_of(node) for pattern in leaf if fnmatch.fnmatchcase(p, pattern)), None)
        if path is not None and previous is not None and previous[0] == path:
            groups.union(previous[1], node)
        previous = None if path is None else (path, node)


def _components(groups: UnionFind[fx.Node], bound: list[fx.Node], free: frozenset[str]) -> list[set[fx.Node]]:
    graph: nx.DiGraph[fx.Node] = nx.DiGraph()
    graph.add_nodes_from(groups[node] for node in bound)
    for node in bound:
        for arg in node.all_input_nodes:
            if arg.op == "call_function" and arg.name not in free and groups[arg] is not groups[node]:
                graph.add_edge(groups[arg], groups[node])
    members: dict[fx.Node, set[fx.Node]] = {}
    for node in bound:
        members.setdefault(groups[node], set()).add(node)
    merged = nx.condensation(graph)
    found = [set[fx.Node]().union(*(members[rep] for rep in merged.nodes[c]["members"])) for c in merged.nodes]
    position = {node: i for i, node in enumerate(bound)}
    first = [min(position[node] for node in component) for component in found]
    return [found[c] for c in nx.lexicographical_topological_sort(merged, key=first.__getitem__)]


def _number(
    graph: fx.Graph, components: list[set[fx.Node]], order: dict[fx.Node, int], free: frozenset[str]
) -> tuple[Layer, ...]:
    (output,) = graph.find_nodes(op="output")
    state = {n.name for n in graph.nodes if n.op == "placeholder" and is_state(n)}
    sorted_components = [sorted(component, key=lambda n: order[n]) for component in components]
    names = _names([_main(nodes) for nodes in sorted_components])
    layers: list[Layer] = []
    for name, nodes, component in zip(names, sorted_components, components, strict=True):
        needed = [*nodes, *free_closure(nodes, free)]
        read = (a for n in sorted(needed, key=lambda n: order[n]) for a in n.all_input_nodes)
        arguments = dict.fromkeys(a.name for a in read if a.op != "get_attr")  # sub-graphs are code, not values
        own = {node.name for node in needed}
        main = _main(nodes)
        layers.append(
            Layer(
                name,
                (module_of(main) or ("",))[-1],
                source_of(main),
                tuple(node.name for node in nodes),
                tuple(a for a in arguments if a not in state and a not in own and a not in free),
                tuple(n.name for n in nodes if any(u is output or (u not in component) for u in n.users)),
                tuple(a for a in arguments if a in state),
            )
        )
    return tuple(layers)


def _main(nodes: list[fx.Node]) -> fx.Node:
    """The node a layer is named after: its first that is neither a view nor a tuple item."""
    for node in nodes:
        if node.target is not operator.getitem and not returns_alias(node):
            return node
    return nodes[0]


def _names(mains: list[fx.Node]) -> list[str]:
    """``module.path`` where a module makes one layer, else ``module.path:operator``, numbered."""
    paths = [(module_of(node) or ("",))[-1] for node in mains]
    count = Counter(paths)
    wanted = [
        path if path and count[path] == 1 else ":".join(filter(None, (path, _operator(node))))
        for path, node in zip(paths, mains, strict=True)
    ]
    used: Counter[str] = Counter()
    names: list[str] = []
    for name in wanted:
        used[name] += 1
        names.append(name if used[name] == 1 else f"{name}.{used[name]}")
    return names


def _operator(node: fx.Node) -> str:
    name = operator_name(node) or getattr(node.target, "__name__", str(node.target))
    return name.rpartition("::")[2].strip("_")


def _shape_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return " ".join(str(tuple(v.shape)) if isinstance(v, torch.Tensor) else str(v) for v in values)
