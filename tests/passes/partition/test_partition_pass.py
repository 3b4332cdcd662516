"""The pass: graph, profile and cluster in, plan out."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from torch import fx

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import Layer, ModelGraph, OutputRef, StateSpec, TensorSpec
from pipecompile.ir.plan import Plan
from pipecompile.ir.profile import Profile
from pipecompile.ir.tree import Tree
from pipecompile.passes.lower import Lower
from pipecompile.passes.partition import HOST, Partition, Training, Value, Weight, problem_of, with_memory
from pipecompile.passes.partition.requests import find_layers
from pipecompile.passes.schedule import Schedule

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


def test_device_speeds_count_and_unlike_devices_are_put_in_the_best_order() -> None:
    graph = skip_graph()
    cluster = Cluster((Device("slow", speed=0.25), Device("fast")), Link(0.0, 1e9))
    profile = profile_of(graph, 1.0, 1.0, 1.0, 1.0)
    plan = Partition(2).apply(graph, profile, cluster)
    assert [(stage.device, stage.layers) for stage in plan.stages] == [(0, (0,)), (1, (1, 2, 3))]
    assert [stage.seconds for stage in plan.stages] == [4.0, 3.0]
    # The first layer is too much for the slow device, so that comes last.
    plan = Partition(2).apply(graph, profile_of(graph, 2.0, 1.0, 1.0, 1.0), cluster)
    assert [(stage.device, stage.layers) for stage in plan.stages] == [(1, (0, 1, 2)), (0, (3,))]


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


def named_graph() -> ModelGraph:
    state = (
        StateSpec("w", "embed.weight", "parameter", nbytes=400),
        StateSpec("n", "count", "buffer", mutated=True, nbytes=8),
    )

    def stateful(name: str, reads: str, *used: str) -> Layer:
        return dataclasses.replace(layer(name, (reads,), (name,)), module=name.partition(":")[0], state=used)

    layers = (
        stateful("embed", "x", "w"),
        stateful("encoder.0:linear", "embed", "n"),
        stateful("encoder.0:add", "encoder.0:linear", "n"),
        stateful("encoder.1:linear", "encoder.0:add"),
        stateful("head", "encoder.1:linear", "w"),
    )
    return dataclasses.replace(graph_of(*layers, outputs=(OutputRef("value", "head"),)), state=state)


def plan_of(graph: ModelGraph, cluster: Cluster, **options: Any) -> Plan:
    times = profile_of(graph, *[1.0] * len(graph.layers))
    return Partition(len(cluster.devices), **options).apply(graph, times, cluster)


def test_tied_and_written_state() -> None:
    graph = named_graph()
    problem = problem_of(graph, profile_of(graph, 1.0, 1.0, 1.0, 1.0, 1.0), cluster_of(2), 2)
    assert problem.weights == (Weight(400.0, (0, 4)), Weight(8.0, (1, 2)))
    assert problem.together == ((1, 2),)
    assert problem.single == {1, 2}
    plan = plan_of(graph, cluster_of(2))
    assert [stage.layers for stage in plan.stages] == [(0, 1, 2), (3, 4)]
    # Weights, values made, and three slots of each value received.
    assert plan.memory == (400 + 8 + 3000 + 3000, 400 + 2000 + 3000)


def test_training_adds_the_backward_pass() -> None:
    graph = named_graph()
    training = Training((2.0,) * 5, "gpipe", micro_batches=4, copies=3.0)
    problem = problem_of(graph, profile_of(graph, 1.0, 1.0, 1.0, 1.0, 1.0), cluster_of(2), 2, training)
    assert problem.cost == (3.0,) * 5
    assert [value.gradient for value in problem.values] == [0.0, 1000.0, 1000.0, 1000.0, 1000.0, 1000.0]
    assert problem.memory.in_flight(0, 2) == 4
    plan = plan_of(graph, cluster_of(2), training=training)
    both = 400 * 3 + 3 * 1000
    # The activation in, its gradient back, and three slots for each; the weight's sum every four samples.
    assert plan.memory == (both + 8 * 3 + 4 * 3000 + 3000, both + 4 * 2000)
    assert [stage.seconds for stage in plan.stages] == [9.0, 6.0]
    assert plan.stages[1].transfer == pytest.approx(4 * 0.001 - 0.001 + 2 * 0.001 + 2 * 400 / 1e6 / 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pin": {"encodr.*": "cpu:0"}}, r"no layer matches 'encodr\.\*'; the nearest is 'encoder"),
        ({"pin": {"embed": "gpu:0"}}, "there is no device 'gpu:0': the nearest is 'cpu:"),
        ({"pin": {"encoder": "cpu:0", "encoder.1*": "cpu:1"}}, "contradictory pins: layer 'encoder.1:linear'"),
        ({"pin": {"encoder.0:linear": "cpu:0", "encoder.0:add": "cpu:1"}}, "must share a stage"),
        ({"pin": {"embed": "cpu:0", "encoder.0*": "cpu:1", "head": "cpu:0"}}, "the pins contradict each other"),
        ({"pin": {"embed": "cpu:0", "head": "cpu:1"}, "colocate": [["embed", "head"]]}, "must share a stage"),
        ({"pin": {"*": "cpu:0"}}, "every layer is pinned to other devices than cpu:1, which would be left without"),
        ({"pin": {"head": []}}, r"pin 'head': a device's name or several are needed, not \[\]"),
        ({"pin": {"head": 3}}, "pin 'head': a device's name or several are needed, not 3"),
        ({"colocate": ["heads"]}, "no layer matches 'heads'; the nearest is 'head'"),
        ({"objective": "speed"}, "objective 'speed'"),
        ({"objective": ("throughput", 0.0)}, "objective"),
        ({"objective": ("throughput", "fast")}, "objective"),
        ({"objective": ("throughput", 1.0)}, r"no plan has a latency of at most 1 s: the least is 5\.00\d+ s"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(named_graph(), cluster_of(2), **options)


def test_pins_and_colocation_by_pattern() -> None:
    graph = named_graph()
    plan = plan_of(graph, cluster_of(2), pin={"encoder.*": "cpu:1"})
    assert [(stage.device, stage.layers) for stage in plan.stages] == [(0, (0,)), (1, (1, 2, 3, 4))]
    plan = plan_of(graph, cluster_of(2), colocate=[["encoder.0", "encoder.1*"]])
    assert any({1, 2, 3} <= set(stage.layers) for stage in plan.stages)
    plan = plan_of(graph, cluster_of(2), colocate=["*"])
    assert len(plan.stages) == 1
    assert any("1 part that" in note for note in plan.notes)


def test_the_exact_name_of_a_layer_means_no_layer_below_it() -> None:
    graph = graph_of(
        dataclasses.replace(layer("net", ("x",), ("a",)), module="net"),
        dataclasses.replace(layer("net.inner:add", ("a",), ("b",)), module="net.inner"),
        dataclasses.replace(layer("net.inner:add.2", ("b",), ("c",)), module="net.inner"),
        dataclasses.replace(layer("net.inner[1]", ("c",), ("d",)), module="net.inner"),
        outputs=(OutputRef("value", "d"),),
    )
    meant = {
        "net": [0],
        "net.inner:add": [1],
        "net.inner[1]": [3],
        "net.*": [0, 1, 2, 3],
        "net.inner": [1, 2, 3],
        "net.inner.*": [1, 2, 3],
        "net.inner:*": [1, 2],
        "*add.2": [2],
        "*.inner": [1, 2, 3],
    }
    assert {pattern: find_layers(graph, pattern) for pattern in meant} == meant
    every = {"net": "cpu:0", "net.inner:add": "cpu:0", "net.inner:add.2": "cpu:1", "net.inner[1]": "cpu:1"}
    assert [stage.layers for stage in plan_of(graph, cluster_of(2), pin=every).stages] == [(0, 1), (2, 3)]
    every["net.inner:add"] = "cpu:1"
    assert [stage.layers for stage in plan_of(graph, cluster_of(2), pin=every).stages] == [(0,), (1, 2, 3)]


def test_memory_limits_of_devices() -> None:
    graph = named_graph()
    cluster = with_memory(cluster_of(2), {"cpu:0": "5 kB", "cpu:1": 1e6})
    plan = plan_of(graph, cluster)
    assert plan.memory[0] <= 5000
    with pytest.raises(PlanError, match="bytes"):
        plan_of(graph, with_memory(cluster, 1000))
    with pytest.raises(PlanError, match="'lots' is not a size"):
        with_memory(cluster, "lots")
    with pytest.raises(PlanError, match="no device 'cpu:7'"):
        with_memory(cluster, {"cpu:7": 1})


def test_replicas_and_chunks_are_planned_only_on_request() -> None:
    graph = graph_of(layer("a", ("x",), ("a",)), layer("b", ("a",), ("b",)), outputs=(OutputRef("value", "b"),))
    cluster, profile = cluster_of(2), profile_of(graph, 1.0, 9.0)
    assert all(stage.devices == (stage.index,) for stage in Partition(2).apply(graph, profile, cluster).stages)
    plan = Partition(2, replicas=True).apply(graph, profile, cluster)
    assert [stage.devices for stage in plan.stages] == [(0, 1)]
    assert plan.slowest == pytest.approx(plan.objective) == pytest.approx(5.0015)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    program = Lower().apply(graph, plan, Schedule("stream").apply(plan))
    assert [(device.device, device.replica, device.replicas) for device in program.devices] == [(0, 0, 2), (1, 1, 2)]
    four = graph_of(*(layer(f"l{i}", (f"l{i - 1}" if i else "x",), (f"l{i}",)) for i in range(4)))
    looped = Partition(2, chunks=2).apply(four, profile_of(four, 3.0, 3.0, 1.0, 1.0), cluster)
    assert [stage.device for stage in looped.stages] == [0, 1, 0, 1]
    assert looped.slowest == pytest.approx(looped.objective)


def test_links_between_pairs_of_devices() -> None:
    graph = graph_of(*(layer(f"l{i}", (f"l{i - 1}" if i else "x",), (f"l{i}",)) for i in range(3)))
    cluster = dataclasses.replace(cluster_of(3), links={"cpu:0<>cpu:1": Link(5.0, 1e6)})
    plan = Partition(3).apply(graph, profile_of(graph, 1.0, 1.0, 1.0), cluster)
    assert [stage.device for stage in plan.stages] == [0, 2, 1]
