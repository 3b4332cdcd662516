"""The code of one stage of a training step: forward, backward, and backward in two halves.

The split is by gradient edges: ``edge_of(y)`` is the place in the autograd graph where the
gradient of ``y`` arrives. ``backward_input`` asks for the gradients of the stage's inputs and of
those edges, ``backward_weight`` goes on from each edge to the weights of the one operator that
made ``y``. Nothing is computed twice.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from pipecompile.ir.graph import Layer, ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Op, Program
from pipecompile.ir.training import HELPERS, Gradients
from pipecompile.passes.codegen import define, indent, stage_state, title, tuple_of
from pipecompile.passes.emit import HEADER, Emitter, local
from pipecompile.passes.deferred import deferred_norms
from pipecompile.passes.layers import free_closure
from pipecompile.passes.operators import draws, heavy_weights

#: What generated training modules begin with.
IMPORTS = HEADER + HELPERS


class StepEmitter(Emitter):
    """Seeds every random operator, and takes the gradient edge of heavy ones while it is still theirs."""

    def __init__(
        self, graph: ModelGraph, module: fx.GraphModule, *, deferred: bool = False, autocast: str | None = None
    ) -> None:
        super().__init__(graph, module)
        self.autocast = autocast
        self.norms, self.counters = deferred_norms(graph) if deferred else ({}, {})
        random = [node for node in graph.graph.nodes if node.op == "call_function" and self._draws(node)]
        self.random = {node: i for i, node in enumerate(random)}
        self.taps: dict[fx.Node, list[str]] = {}

    def _draws(self, node: fx.Node) -> bool:
        if draws(node):
            return True
        inner = [getattr(self.module, str(a.target), None) for a in node.all_input_nodes if a.op == "get_attr"]
        return any(draws(n) for sub in inner if isinstance(sub, fx.GraphModule) for n in sub.graph.nodes)

    def needed(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """The free nodes that must be computed before ``nodes``."""
        return free_closure(nodes, self.model.free)

    def statement(self, node: fx.Node) -> list[str]:
        """As for a stream; the edge is taken at once, since an in-place operator may follow."""
        if node in self.counters:
            # Counted once a step; a module used again counts on from here.
            return [f"{local(node)} = {self.expression(node.args[0])}"] if node.users else []
        if node in self.norms:
            norm = self.norms[node]
            x, weight, bias, mean = (self.expression(arg) for arg in node.args[:4])
            rest = ", ".join(self.expression(arg) for arg in node.args[7:])
            found = f"*draw.statistics({norm.number}, {x}, {mean})"
            lines = [f"{local(node)} = aten.batch_norm.default({x}, {weight}, {bias}, {found}, True, 1.0, {rest})"]
        else:
            lines = super().statement(node)
        if node in self.random:
            lines.insert(0, f"draw({self.random[node]})")
        if node in self.taps:
            lines.append(f"{edge_name(node)} = edge_of({local(node)})")
        return lines


def model_values(edge: Edge) -> list[str]:
    """What of the model an edge carries, beside what is about its samples."""
    return [value for value in edge.values if not value.startswith(":")]


def edge_name(node: fx.Node) -> str:
    """The variable that holds the gradient edge of a node."""
    return f"at_{node.name}"


@dataclass
class StageWriter:
    """The functions of one stage, and what the schedule has to know to call them."""

    emit: StepEmitter
    plan: Plan
    program: Program
    gradients: Gradients
    device: DeviceProgram
    stage: int
    width: int
    state: list[str] = field(init=False)
    reads: list[str] = field(init=False)
    makes: list[str] = field(init=False)
    leaves: list[str] = field(init=False)
    results: list[str] = field(init=False)
    trained: list[str] = field(init=False)
    late: dict[fx.Node, list[str]] = field(init=False)
    last: bool = field(init=False)
    written: list[int] = field(init=False)
    more: str = field(init=False, default="")
    """Further arguments of a whole backward's call of autograd."""

    def __post_init__(self) -> None:
        graph, edges = self.emit.model, self.program.edges
        forward = [e for e in edges if e.forward]
        own = {v for i in self.plan.stages[self.stage].layers for v in graph.layers[i].makes}
        self.last = self.plan.ends(self.stage) and not any(e.target == HOST for e in forward)  # else the caller computes the loss
        self.reads = list(dict.fromkeys(v for e in forward if e.target == self.stage for v in model_values(e)))
        makes = [v for e in forward if e.source == self.stage for v in model_values(e)]
        if self.last:
            outputs = [ref.name for ref in graph.outputs if ref.kind == "value"]
            makes += [v for v in outputs if v in own or v in graph.free]
        self.makes = list(dict.fromkeys(makes))
        self.state = stage_state(self.emit, self._layers, self.makes)
        if self.last:
            extra = [ref.name for ref in graph.outputs if ref.kind == "state" and ref.name not in self.state]
            self.state += list(dict.fromkeys(extra))
        self.leaves = [v for v in self.reads if v in self.gradients.values]
        self.results = [v for v in self.makes if v in self.gradients.values and not self.last]
        self.trained = [name for name in self.state if name in self.gradients.weights]
        ops = {s.op for s in (*self.device.warm_up, *self.device.body) if s.stage == self.stage}
        known = self.last or bool(self.results)  # else no gradient comes in
        self.late = self._late_weights() if known and Op.BACKWARD_WEIGHT in ops else {}
        written = {entry.name for entry in graph.state if entry.mutated}
        self.written = [i for i, name in enumerate(self.state) if name in written]
        self._ops = ops

    @property
    def _layers(self) -> list[Layer]:
        return [self.emit.model.layers[i] for i in self.plan.stages[self.stage].layers]

    def _late_weights(self) -> dict[fx.Node, list[str]]:
        """Heavy operators -> the weights only they use, whose gradients come in W."""
        nodes = [self.emit.nodes[name] for layer in self._layers for name in layer.nodes]
        every = {*nodes, *self.emit.needed(nodes)}
        uses = Counter(arg.name for node in every for arg in node.all_input_nodes)
        found: dict[fx.Node, list[str]] = {}
        for node in nodes:
            weights = [w.name for w in heavy_weights(node) if w.name in self.trained and uses[w.name] == 1]
            if weights and node.name in self.gradients.values:
                found[node] = weights
        return found

    def name(self, value: str) -> str:
        """The variable of a value."""
        return local(self.emit.nodes[value])

    @property
    def deferred(self) -> str:
        """The arguments of ``link.commit``, empty where no BatchNorm of the stage is deferred."""
        nodes = [self.emit.nodes[name] for layer in self._layers for name in layer.nodes]
        norms = [self.emit.norms[node] for node in nodes if node in self.emit.norms]
        counters = [self.emit.counters[node] for node in nodes if node in self.emit.counters]
        rows = [f"({n.number}, {n.mean!r}, {n.var!r}, {n.momentum})" for n in norms]
        return f"{tuple_of('', rows)}, {tuple_of('', [repr(name) for name in counters])}" if norms or counters else ""

    def source(self) -> str:
        """All functions of the stage."""
        parts = [self._stage()]
        if Op.RECOMPUTE in self._ops:
            parts += [self._forward("record"), self._first_forward(), self._second_forward()]
        else:
            parts.append(self._forward())
        if Op.BACKWARD in self._ops:
            parts.append(self._backward())
        if Op.BACKWARD_INPUT in self._ops:
            parts += [self._backward_input(), self._backward_weight()]
        constants = [f"STATE_{self.stage} = {tuple(self.state)!r}", f"TRAINED_{self.stage} = {tuple(self.trained)!r}"]
        return "\n\n\n".join(["\n".join(constants), *(part.strip("\n") for part in parts)])

    def _stage(self) -> str:
        self.emit.taps = {node: [] for node in self.late}
        lines = self.emit.body(self._layers, self.makes)
        self.emit.taps = {}
        if self.emit.autocast:
            kind = "cpu" if self.plan.cluster.card is None else "cuda"
            header = f'with torch.autocast("{kind}", dtype=torch.{self.emit.autocast}):'
            lines = [header, *(f"    {line}" for line in lines)]
        edges = tuple_of("", [edge_name(node) for node in self.late])
        lines.append(f"return {tuple_of('', [self.name(v) for v in self.makes])}, {edges}")
        parameters = ["draw", *(self.name(n) for n in (*self.state, *self.reads))]
        doc = f'"""{title(None, self._layers)}. Returns results, and edges to the large weights."""'
        return define(f"stage_{self.stage}", parameters, self.width) + indent([doc, *lines])

    def _first_forward(self) -> str:
        """Where a stage is recomputed: no gradients are recorded."""
        reads = [self.name(v) for v in self.reads]
        before = tuple_of("", [f"state[{i}].clone()" for i in self.written])
        lines = ['"""One micro-batch: what to send on. Only what came in is kept, and buffers as they are."""']
        lines += [f"kept = draw, {before}, {tuple_of('', reads)}"]
        lines += [f"made, _ = stage_{self.stage}({', '.join(['draw', '*state', *reads])})", "return made, kept"]
        return define(f"forward_{self.stage}", ["draw", "state", *reads], self.width) + indent(lines)

    def _second_forward(self) -> str:
        lines = ['"""The forward once more, for the backward; buffers change in copies."""']
        lines += ["draw, before, reads = kept"]
        if self.written:
            copies = {index: f"before[{i}]" for i, index in enumerate(self.written)}
            lines.append(f"state = {tuple_of('', [copies.get(i, f'state[{i}]') for i in range(len(self.state))])}")
        lines.append(f"return record_{self.stage}(draw, state, *reads)[1]")
        return define(f"again_{self.stage}", ["kept", "state"], self.width) + indent(lines)

    def _forward(self, function: str = "forward") -> str:
        reads, makes = [self.name(v) for v in self.reads], [self.name(v) for v in self.makes]
        lines = ['"""One micro-batch: what to send on, and what to keep for the backward."""']
        lines += [f"{self.name(v)} = {self.name(v)}.detach().requires_grad_()" for v in self.leaves]
        inner = [f"made, edges = stage_{self.stage}({', '.join(['draw', '*state', *reads])})"]
        results = [self.name(v) for v in self.results]
        if self.last:
            state = {name: f"state[{i}]" for i, name in enumerate(self.state)}
            outputs = [state.get(ref.name) or self.name(ref.name) for ref in self.emit.model.outputs]
            inner += [f"{tuple_of('', makes)} = made"] if makes else []
            inner.append(f"loss = loss_of({', '.join(outputs)})")
            results = ["loss"]
        elif results:
            inner.append(f"{tuple_of('', makes)} = made")
        lines += ["with torch.enable_grad():", *(f"    {line}" for line in inner)]
        leaves = tuple_of("", [self.name(v) for v in self.leaves])
        lines.append(f"return {'()' if self.last else 'made'}, ({leaves}, {tuple_of('', results)}, edges)")
        parameters = ["draw", *(["loss_of"] if self.last else []), "state", *reads]
        return define(f"{function}_{self.stage}", parameters, self.width) + indent(lines)

    @property
    def arrivals(self) -> list[str]:
        """The values whose gradients a backward is given, in order."""
        return [] if self.last else self.results

    def _backward(self) -> str:
        lines = ['"""Gradients of what the stage received; those of its weights are added to `sums`."""']
        lines += self._unpack(edges=False)
        lines += self._grad([], self.trained, self.more)
        return self._define_backward("backward", [*lines, self._return()])

    def _backward_input(self) -> str:
        late = {w for weights in self.late.values() for w in weights}
        early = [w for w in self.trained if w not in late]
        what = "its small weights" if early else "no weight"
        lines = [f'"""Gradients of what the stage received, and of {what}; the rest waits in the edges."""']
        lines += self._unpack(edges=True)
        edges = [edge_name(node) for node in self.late]
        lines += self._grad(edges, early, ", retain_graph=True" if edges else "")
        pending = tuple_of("", [f"({edge}, d_{edge})" for edge in edges])
        return self._define_backward("backward_input", [*lines, f"{self._return()}, {pending}"])

    def _backward_weight(self) -> str:
        lines = ['"""Gradients of the large weights, from where backward_input left off."""']
        if self.late:
            lines.append(_wrapped([f"({e}, d_{e})" for e in map(edge_name, self.late)], "pending", self.width))
            lines.append(_wrapped([self.name(w) for w in self.trained], "trained", self.width))
        for node, weights in self.late.items():
            edge, names = edge_name(node), [self.name(w) for w in weights]
            lines.append(f"if d_{edge} is not None:")
            lines.append(f"    {', '.join(f'd_{n}' for n in names)}, = grad(({edge},), {tuple_of('', names)}, (d_{edge},))")
            lines += [f'    sums.add("{w}", d_{n})' for w, n in zip(weights, names, strict=True)]
        return define(f"backward_weight_{self.stage}", ["pending", "trained", "sums"], self.width) + indent(lines)

    def _unpack(self, *, edges: bool) -> list[str]:
        results = ["loss"] if self.last else [self.name(v) for v in self.results]
        parts = [tuple_of("", [self.name(v) for v in self.leaves]), tuple_of("", results)]
        parts.append(tuple_of("", [edge_name(n) for n in self.late]) if edges else "_")
        lines = [f"{', '.join(part if part != '()' else '_' for part in parts)} = kept"]
        if self.trained:
            lines.append(_wrapped([self.name(w) for w in self.trained], "trained", self.width))
        return lines

    def _grad(self, edges: Sequence[str], weights: Sequence[str], more: str) -> list[str]:
        """One call of autograd for everything, or nothing where there is nothing to ask for; weights go to the sums."""
        wanted = [*(self.name(v) for v in self.leaves), *edges, *(self.name(w) for w in weights)]
        results = ["loss"] if self.last else [self.name(v) for v in self.results]
        if not wanted or not results:
            return []
        given = "None" if self.last else tuple_of("", [f"d_{self.name(v)}" for v in self.results])
        call = f"grad({tuple_of('', results)}, {tuple_of('', wanted)}, {given}{more}, allow_unused=True)"
        targets = ", ".join(f"d_{w}" for w in wanted) + ("," if len(wanted) == 1 else "")
        return [f"{targets} = {call}", *(f'sums.add("{w}", d_{self.name(w)})' for w in weights)]

    def _return(self) -> str:
        known = self.last or bool(self.results)

        def given(value: str) -> str:
            name = self.name(value)
            filled = f"filled({f'd_{name}' if known else None}, {name})"
            # A slot for a value of changing size has room for a dense one only.
            return filled + (".contiguous()" if self.emit.model.values[value].dynamic else "")

        return "return " + tuple_of("", [given(value) for value in self.leaves])

    def _define_backward(self, kind: str, lines: list[str]) -> str:
        given = [f"d_{self.name(v)}" for v in self.arrivals]
        return define(f"{kind}_{self.stage}", ["kept", "trained", "sums", *given], self.width) + indent(lines)


def _wrapped(names: Sequence[str], value: str, width: int) -> str:
    line = f"{tuple_of('', list(names))} = {value}"
    if len(line) <= width:
        return line
    body = textwrap.fill(", ".join(names), width - 8, break_long_words=False)
    return "(\n" + textwrap.indent(body, "    ") + f",\n) = {value}"


__all__ = ["IMPORTS", "StageWriter", "StepEmitter", "model_values"]
