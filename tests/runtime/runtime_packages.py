"""Hand-written packages for the runtime's tests: no pass takes part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.graph import OutputRef, StateSpec, TensorSpec
from pipecompile.ir.package import DeviceModule, Package
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.program import HOST, Edge, Program
from pipecompile.ir.tree import Tree

HEAD = "import os, signal, time\nimport torch\nfrom itertools import count\naten = torch.ops.aten\n"


def module(device: int, source: str, state: Sequence[str] = ()) -> DeviceModule:
    return DeviceModule(device, (device,), HEAD + source, f"device_{device}.py", tuple(state))


def chain_module(
    device: int, body: str, *, source: str, target: str, state: Sequence[str] = (), post: str = "sample + 1"
) -> DeviceModule:
    """One stage between two edges; ``body`` computes ``y`` from ``x`` and the weights, one line each."""
    weights = "".join(f"{name}, " for name in state)
    lines = "\n".join("    " + line for line in body.splitlines())
    first = "    if start == 0: x_in.post(0)\n" if post == "sample + 1" else ""
    return module(
        device,
        f"def stage_{device}({weights}x, sample):\n{lines}\n    return (y,)\n"
        f"def run(link, start):\n    ({weights}) = link.state()\n"
        f"    x_in = link.receiver({source!r}); y_out = link.sender({target!r})\n{first}"
        f"    for sample in count(start):\n        x_in.post({post})\n        message = yield x_in\n"
        f"        if message is None: break\n        (x,) = message\n"
        f"        (y,) = stage_{device}({weights}x, sample)\n"
        "        yield y_out\n        y_out.put(sample, y)\n    yield y_out\n    y_out.end()\n",
        state,
    )


def package(
    modules: Sequence[DeviceModule],
    edges: Sequence[Edge],
    inputs: Sequence[tuple[str, Any]],
    outputs: Sequence[OutputRef],
    state: Sequence[str] = (),
    **more: Any,
) -> Package:
    devices = tuple(Device(f"cpu:{i}", core=i % (os.cpu_count() or 1)) for i in range(len(modules)))
    stages = tuple(Stage(i, i, (), 1e-4) for i in range(len(modules)))
    plan = Plan(stages, Cluster(devices), 1e-4, 1e-4, "none", 0.0, 1e-4 * len(modules))
    specs = tuple(value if isinstance(value, TensorSpec) else TensorSpec.of(value) for _, value in inputs)
    return Package(
        "test",
        tuple(modules),
        plan,
        Program((), tuple(edges)),
        tuple(StateSpec(name, name, "parameter") for name in state),
        specs,
        tuple(name for name, _ in inputs),
        tuple(outputs),
        Tree("leaf"),
        Tree("leaf"),
        **more,
    )


def edge(source: int, target: int, values: dict[str, Any], ahead: int = 1) -> Edge:
    specs = tuple(value if isinstance(value, TensorSpec) else TensorSpec.of(value) for value in values.values())
    return Edge(source, target, tuple(values), specs, ahead, ahead + 1)


def two_stages(
    first: str = "y = aten.mm.default(x, a)", second: str = "y = aten.relu.default(aten.mm.default(x, b))", **more: Any
) -> Package:
    """``relu(x @ a @ b)`` on 4x8 inputs, cut in two; the bodies can be replaced."""
    x, h, y = torch.zeros(4, 8), torch.zeros(4, 6), torch.zeros(4, 5)
    return package(
        [
            chain_module(0, first, source="host>0", target="0>1", state=["a"]),
            chain_module(1, second, source="0>1", target="1>host", state=["b"]),
        ],
        [edge(HOST, 0, {"x": x}), edge(0, 1, {"h": h}), edge(1, HOST, {"y": y})],
        [("x", x)],
        [OutputRef("value", "y")],
        ["a", "b"],
        **more,
    )


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "a": torch.nn.Parameter(torch.randn(8, 6, generator=generator)),
        "b": torch.nn.Parameter(torch.randn(6, 5, generator=generator)),
    }


def expected(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.relu(x @ state["a"] @ state["b"])


def samples(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(4, 8, generator=generator) for _ in range(count)]


def skip_package() -> Package:
    """Three stages; the last also reads what the first made, and the host reads from two of them.

    ``h = x * 2; (m, n) = h + 1, 3; z = m * h * n``; outputs z, h, the input and the weight.
    """
    t = torch.zeros(3, 4)
    first = module(
        0,
        """def stage_0(x):
    # double  (model.py:1)
    return (x * 2,)
def run(link, start):
    x_in = link.receiver("host>0"); to_1 = link.sender("0>1"); to_2 = link.sender("0>2"); out = link.sender("0>host")
    if start == 0: x_in.post(0)
    for sample in count(start):
        x_in.post(sample + 1)
        message = yield x_in
        if message is None: break
        (x,) = message
        (h,) = stage_0(x)
        yield to_1
        to_1.put(sample, h)
        yield to_2
        to_2.put(sample, h)
        yield out
        out.put(sample, h)
    yield to_1
    to_1.end()
    yield to_2
    to_2.end()
    yield out
    out.end()
""",
    )
    second = module(
        1,
        """def stage_1(h):
    m = h.add_(1)   # in the slot, which is this stage's own
    return m, 3
def run(link, start):
    h_in = link.receiver("0>1"); out = link.sender("1>2")
    if start == 0: h_in.post(0)
    for sample in count(start):
        h_in.post(sample + 1)
        message = yield h_in
        if message is None: break
        (h,) = message
        m, n = stage_1(h)
        yield out
        out.put(sample, m, n)
    yield out
    out.end()
""",
    )
    third = module(
        2,
        """def stage_2(w, h, m, n):
    assert type(n) is int
    return (m * h * n * w,)
def run(link, start):
    (w,) = link.state()
    h_in = link.receiver("0>2"); m_in = link.receiver("1>2"); out = link.sender("2>host")
    if start == 0:
        for k in range(3): h_in.post(k)
        m_in.post(0)
    for sample in count(start):
        h_in.post(sample + 3)
        m_in.post(sample + 1)
        message = yield h_in
        if message is None: break
        (h,) = message
        m, n = yield m_in
        (z,) = stage_2(w, h, m, n)
        yield out
        out.put(sample, z)
    yield out
    out.end()
""",
        ["w"],
    )
    return package(
        [first, second, third],
        [
            edge(HOST, 0, {"x": t}),
            edge(0, 1, {"h": t}),
            edge(0, 2, {"h": t}, ahead=3),
            edge(0, HOST, {"h": t}),
            edge(1, 2, {"m": t, "n": 3}),
            edge(2, HOST, {"z": t}),
        ],
        [("x", t)],
        [OutputRef("value", "z"), OutputRef("value", "h"), OutputRef("input", "x"), OutputRef("state", "w")],
        ["w"],
    )


def run_all(executor: Any, inputs: Sequence[Any]) -> list[tuple[int, list[Any]]]:
    """Stream samples through an executor as a caller with one thread does."""
    results: list[tuple[int, list[Any]]] = []
    for x in inputs:
        while executor.submit([x]) is None:
            if not executor.wait(timeout=30):
                results.append(executor.result(timeout=30))
    while executor.in_flight:
        results.append(executor.result(timeout=30))
    return results
