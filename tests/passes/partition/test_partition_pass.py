"""The pass: graph, profile and cluster in, plan out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from torch import fx

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Layer, ModelGraph, OutputRef, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.tree import Tree
from pipecompile.passes.partition import HOST, Partition, Value, problem_of

SPEC = TensorSpec((250,), "float32", (1,))


def layer(name: str, reads: tuple[str, ...], makes: tuple[str, ...]) -> Layer:
    return Layer(name, name, "", makes, reads, makes, ())


def graph_of(*layers: Layer, inputs: tuple[str, ...] = ("x",), outputs: tuple[OutputRef, ...] = ()) -> ModelGraph:
    values = {name: SPEC for one in layers for name in one.makes} | dict.fromkeys(inputs, SPEC)
    return ModelGraph(
        "m", "eval", fx.Graph(), layers, frozenset(), values, (), inputs, outputs, Tree("leaf"), Tree("leaf")
    )


def skip_graph() -> ModelGraph:
    return graph_of(
        layer("a", ("x",), ("a", "a_unused")),
        layer("b", ("a",), ("b",)),
        layer("c", ("b", "a"), ("c",)),
        layer("d", ("c", "x"), ("d",)),
        outputs=(OutputRef("value", "d"), OutputRef("value", "b"), OutputRef("input", "x")),
    )


def profile_of(graph: ModelGraph, *seconds: float) -> Profile:
    return Profile(seconds, dict.fromkeys(graph.values, 1000), Link(), sum(seconds))


def cluster_of(count: int, **fields: Any) -> Cluster:
    devices = tuple(Device(f"cpu:{i}", **fields) for i in range(count))
    return Cluster(devices, Link(latency=0.001, bandwidth=1e6))


def test_problem_of_a_graph() -> None:
    graph = skip_graph()
    problem = problem_of(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2), 2)
    assert problem.values == (
        Value(HOST, (0, 3), 1000.0),
        Value(0, (1, 2), 1000.0),
        Value(1, (2,), 1000.0, returned=True),
        Value(2, (3,), 1000.0),
        Value(3, (), 1000.0, returned=True),
    )
    assert set(problem.edges) == {(0, 1), (0, 2), (1, 2), (2, 3)}


def test_plan_of_two_stages() -> None:
    graph = skip_graph()
    plan = Partition(2).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2))
    assert [stage.layers for stage in plan.stages] == [(0, 1, 2), (3,)]
    assert [stage.device for stage in plan.stages] == [0, 1]
    # Stage 0: c to stage 1, b to the caller, x from the caller; stage 1: c and x in, d out.
    assert [stage.seconds for stage in plan.stages] == [6.0, 4.0]
    assert [stage.transfer for stage in plan.stages] == pytest.approx([0.005, 0.004])
    assert plan.objective == plan.slowest == pytest.approx(6.005)
    assert plan.bound == pytest.approx(plan.objective, rel=2e-4)
    assert plan.total == 10.0
    assert plan.layer_names == ("a", "b", "c", "d")
    assert plan.solve_seconds > 0
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_one_device() -> None:
    graph = skip_graph()
    plan = Partition(1).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2))
    assert [stage.layers for stage in plan.stages] == [(0, 1, 2, 3)]
    assert plan.objective == plan.bound == pytest.approx(10.0 + 0.005 - 0.001)
    assert plan.gap == 0.0


def test_more_devices_than_layers() -> None:
    graph = skip_graph()
    plan = Partition(7).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(7))
    assert [stage.layers for stage in plan.stages] == [(0,), (1,), (2,), (3,)]
    assert any("7 devices" in note and "4 layers" in note for note in plan.notes)


def test_all_devices_are_used_and_a_better_count_is_named() -> None:
    graph = skip_graph()
    plan = Partition(4).apply(graph, profile_of(graph, 1e-5, 1e-5, 1e-5, 1e-5), cluster_of(4))
    assert [stage.layers for stage in plan.stages] == [(0,), (1,), (2,), (3,)]
    assert any(note.startswith("1 of 4 devices would be faster") for note in plan.notes)
    good = Partition(2).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2))
    assert good.notes == ()


def test_a_model_without_layers() -> None:
    graph = graph_of(outputs=(OutputRef("input", "x"),))
    plan = Partition(2).apply(graph, profile_of(graph), cluster_of(2))
    assert [stage.layers for stage in plan.stages] == [()]
    assert plan.objective == 0.0
    assert any("0 layers" in note for note in plan.notes)


def test_time_limit_zero_is_still_a_plan() -> None:
    graph = skip_graph()
    plan = Partition(2, time_limit=0).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2))
    assert [stage.layers for stage in plan.stages] == [(0, 1, 2), (3,)]
    assert 0 < plan.bound <= plan.objective


def test_device_speeds_count() -> None:
    graph = skip_graph()
    cluster = Cluster((Device("slow", speed=0.25), Device("fast")), Link(0.0, 1e9))
    plan = Partition(2).apply(graph, profile_of(graph, 1.0, 1.0, 1.0, 1.0), cluster)
    assert [stage.layers for stage in plan.stages] == [(0,), (1, 2, 3)]
    assert [stage.seconds for stage in plan.stages] == [4.0, 3.0]


@pytest.mark.parametrize("stages", [0, 3])
def test_a_senseless_number_of_stages(stages: int) -> None:
    graph = skip_graph()
    with pytest.raises(PlanError, match="2 devices"):
        Partition(stages).apply(graph, profile_of(graph, 1.0, 2.0, 3.0, 4.0), cluster_of(2))


def test_a_profile_of_another_graph() -> None:
    graph = skip_graph()
    with pytest.raises(PlanError, match="3 layers, the graph 4"):
        Partition(2).apply(graph, profile_of(graph, 1.0, 2.0, 3.0), cluster_of(2))
    profile = dataclasses.replace(profile_of(graph, 1.0, 2.0, 3.0, 4.0), value_bytes={"x": 8})
    with pytest.raises(PlanError, match="'a'"):
        Partition(2).apply(graph, profile, cluster_of(2))
