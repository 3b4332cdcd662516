"""Model graphs and plans made by hand, for tests of what comes after tracing: the fx graph stays empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import fx

from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Layer, ModelGraph, OutputRef, TensorSpec
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program
from pipecompile.ir.tree import Tree


def spec(elements: int = 4) -> TensorSpec:
    return TensorSpec((elements,), "float32", (1,))


def graph(
    reads: Sequence[Sequence[str]],
    outputs: Sequence[str] | None = None,
    *,
    inputs: Sequence[str] = ("x",),
    free: Sequence[str] = (),
    elements: Mapping[str, int] | None = None,
) -> ModelGraph:
    """Layer ``i`` reads ``reads[i]`` and makes ``v{i}``; the last value is the result by default."""
    layers = tuple(Layer(f"layer{i}", "", "", (f"v{i}",), tuple(r), (f"v{i}",), ()) for i, r in enumerate(reads))
    made = [f"v{i}" for i in range(len(reads))]
    names = [made[-1]] if outputs is None else outputs
    sizes = elements or {}
    return ModelGraph(
        "hand",
        "eval",
        fx.Graph(),
        layers,
        frozenset(free),
        {name: spec(sizes.get(name, 4)) for name in (*inputs, *made, *free)},
        (),
        tuple(inputs),
        tuple(OutputRef("input" if name in inputs else "value", name) for name in names),
        Tree("leaf"),
        Tree("leaf"),
    )


def chain(layers: int, **more: object) -> ModelGraph:
    return graph([["x" if i == 0 else f"v{i - 1}"] for i in range(layers)], **more)  # type: ignore[arg-type]


def plan(
    stages: Sequence[Sequence[int]], seconds: Sequence[float] | None = None, cores: Sequence[int | None] | None = None
) -> Plan:
    """One stage a device; ``stages`` lists the layers of each."""
    cost = seconds or [1.0] * len(stages)
    made = tuple(Stage(i, i, tuple(layers), cost[i]) for i, layers in enumerate(stages))
    where = cores or [None] * len(stages)
    devices = tuple(Device(f"cpu:{i}", core=core) for i, core in enumerate(where))
    return Plan(made, Cluster(devices), max(cost), max(cost), "none", 0.0, sum(cost))


def program(
    edges: Sequence[tuple[int, int, int]], stages: int, elements: Mapping[tuple[int, int], int] | None = None
) -> Program:
    """A stream program from ``(source, target, ahead)``, one stage a device, sends in the order of ``edges``."""
    sizes = elements or {}
    made = [Edge(s, t, (f"e{s}_{t}",), (spec(sizes.get((s, t), 0)),), ahead, ahead + 1) for s, t, ahead in edges]
    devices: list[DeviceProgram] = []
    for stage in range(stages):
        reads = [e for e in made if e.target == stage]
        sends = [e for e in made if e.source == stage]
        warm = [Instruction(Op.RECV, stage, k, e.name) for e in reads for k in range(e.ahead)]
        body = [Instruction(Op.RECV, stage, e.ahead, e.name) for e in reads]
        body.append(Instruction(Op.FORWARD, stage, 0))
        body += [Instruction(Op.SEND, stage, 0, e.name) for e in sends]
        devices.append(DeviceProgram(stage, (stage,), tuple(warm), tuple(body)))
    return Program(tuple(devices), tuple(made))


def chain_program(stages: int, ahead: int = 2) -> Program:
    ends = [HOST, *range(stages), HOST]
    return program([(ends[i], ends[i + 1], ahead) for i in range(stages + 1)], stages)


#: How long a busy machine takes says nothing about the code.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FREE_LINK = Link(0.0, float("inf"))


@st.composite
def random_models(draw: st.DrawFn) -> tuple[ModelGraph, Plan]:
    """A random DAG of layers, with inputs, outputs and free values, cut into random stages in order."""
    layers = draw(st.integers(1, 9))
    inputs = [f"x{i}" for i in range(draw(st.integers(1, 2)))]
    free = ["mask"] if draw(st.booleans()) else []
    reads: list[list[str]] = []
    for i in range(layers):
        names = [*inputs, *(f"v{j}" for j in range(i))]
        reads.append(draw(st.lists(st.sampled_from(names), max_size=3, unique=True)))
    names = [*inputs, *free, *(f"v{i}" for i in range(layers))]
    outputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4))
    sizes = draw(st.dictionaries(st.sampled_from(names), st.sampled_from([1, 10**5, 10**7]), max_size=4))
    cuts = sorted(draw(st.sets(st.integers(1, layers - 1), max_size=4))) if layers > 1 else []
    bounds = [0, *cuts, layers]
    stages = [list(range(a, b)) for a, b in pairwise(bounds)]
    seconds = draw(st.lists(st.integers(0, 8), min_size=len(stages), max_size=len(stages)))
    return (
        graph(reads, outputs, inputs=inputs, free=free, elements=sizes),
        plan(stages, [float(s) for s in seconds]),
    )
