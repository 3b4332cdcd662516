from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from pipecompile.errors import ProgramError
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, Instruction, Op, Program
from pipecompile.passes.lower import RING, SMALL, Lower
from pipecompile.passes.schedule import Schedule
from pipecompile.passes.verify import Verify
from pipecompile.simulate import simulate


def lower(graph: ModelGraph, plan: Plan, ahead: int | None = None) -> Program:
    return Lower(ahead).apply(graph, plan, Schedule().apply(plan))


def carried(program: Program) -> dict[str, tuple[str, ...]]:
    return {edge.name: edge.values for edge in program.edges}


def test_chain_in_full() -> None:
    program = lower(hand_made.chain(2), hand_made.plan([[0], [1]]), ahead=1)
    assert carried(program) == {"host>0": ("x",), "0>1": ("v0",), "1>host": ("v1",)}
    assert [(edge.ahead, edge.slots) for edge in program.edges] == [(1, 2)] * 3
    assert program.edge("0>1").specs == (hand_made.spec(),)
    first, second = program.devices
    assert [str(step) for step in first.warm_up] == ["0RECV0@host>0"]
    assert [str(step) for step in first.body] == ["0RECV1@host>0", "0F0", "0SEND0@0>1"]
    assert [str(step) for step in second.body] == ["1RECV1@0>1", "1F0", "1SEND0@1>host"]
    assert first.drain == second.drain == ()


def test_ahead_0_posts_a_receive_only_right_before_its_forward() -> None:
    program = lower(hand_made.chain(3), hand_made.plan([[0], [1], [2]]), ahead=0)
    for device in program.devices:
        assert device.warm_up == ()
        assert [step.op for step in device.body] == [Op.RECV, Op.FORWARD, Op.SEND]
        assert {step.sample for step in device.body} == {0}
    assert {edge.slots for edge in program.edges} == {1}


def test_skip_goes_straight_and_is_as_far_ahead_as_the_chain_lets_its_sender_be() -> None:
    graph = hand_made.graph([["x"], ["v0"], ["v1"], ["v2", "v0", "x"]], ["v3", "v1"])
    program = lower(graph, hand_made.plan([[0], [1], [2], [3]]), ahead=2)
    assert carried(program) == {
        "host>0": ("x",),
        "host>3": ("x",),
        "0>1": ("v0",),
        "0>3": ("v0",),
        "1>2": ("v1",),
        "1>host": ("v1",),
        "2>3": ("v2",),
        "3>host": ("v3",),
    }
    # hops times (ahead + 1), less one
    assert {edge.name: edge.ahead for edge in program.edges} == {
        "host>0": 2, "host>3": 11, "0>1": 2, "0>3": 8, "1>2": 2, "1>host": 8, "2>3": 2, "3>host": 2,
    }  # fmt: skip
    assert [step.edge for step in program.devices[0].body if step.op is Op.SEND] == ["0>1", "0>3"]


def test_leads_of_unlike_hops_add_up() -> None:
    large = RING // 4  # elements of 4 bytes: only one such message fits
    graph = hand_made.graph([["x"], ["v0"], ["v1", "v0"]], elements={"v1": large})
    # v0 is small, so 0>1 is deep; 1>2 is shallow; the skip 0>2 follows from both
    edges = {edge.name: edge.ahead for edge in lower(graph, hand_made.plan([[0], [1], [2]])).edges}
    assert edges["0>1"] == 4
    assert edges["1>2"] == 1
    assert edges["0>2"] == (4 + 1) + (1 + 1) - 1


@pytest.mark.parametrize(
    ("nbytes", "ahead"), [(SMALL, 4), (SMALL + 4, 2), (RING // 3 - 4, 2), (RING // 3 + 4, 1), (2 * RING, 1)]
)
def test_default_depth_by_message_size(nbytes: int, ahead: int) -> None:
    graph = hand_made.chain(2, elements={"v0": nbytes // 4})
    assert lower(graph, hand_made.plan([[0], [1]])).edge("0>1").ahead == ahead


@pytest.mark.parametrize(
    ("seconds", "nbytes", "ahead"),
    [(1e-4, 1024, 16), (3.1e-4, 1024, 10), (1e-3, 1024, 4), (1e-4, RING // 17, 16), (1e-4, RING // 17 + 4, 2)],
)
def test_short_stages_get_rings_for_some_milliseconds_of_work(seconds: float, nbytes: int, ahead: int) -> None:
    graph = hand_made.chain(2, elements={"v0": nbytes // 4})
    assert lower(graph, hand_made.plan([[0], [1]], [seconds, seconds])).edge("0>1").ahead == ahead


def test_ring_of_a_huge_skip_is_shallow_but_overlaps() -> None:
    graph = hand_made.graph([["x"], ["v0"], ["v1"], ["v2", "v0"]], elements={"v0": 2 * RING})
    program = lower(graph, hand_made.plan([[0], [1], [2], [3]]))
    assert program.edge("0>1").ahead == 1
    assert program.edge("0>3").ahead == 3 * 2 - 1


def test_value_that_is_a_result_and_read_later_goes_both_ways_once() -> None:
    graph = hand_made.graph([["x"], ["v0"]], ["v0", "v1", "v0", "x"])
    program = lower(graph, hand_made.plan([[0], [1]]))
    assert carried(program) == {"host>0": ("x",), "0>1": ("v0",), "0>host": ("v0",), "1>host": ("v1",)}


def test_values_of_one_message_are_in_the_order_they_are_made() -> None:
    graph = hand_made.graph([["b"], ["b"], ["v1", "b", "v0", "a"]], inputs=("a", "b"))
    assert carried(lower(graph, hand_made.plan([[0, 1], [2]]))) == {
        "host>0": ("b",), "host>1": ("a", "b"), "0>1": ("v0", "v1"), "1>host": ("v2",),
    }  # fmt: skip


def test_free_values_are_made_where_needed_and_the_last_stage_returns_them() -> None:
    graph = hand_made.graph([["x", "mask"], ["v0", "mask"]], ["v0", "mask"], free=["mask"])
    program = lower(graph, hand_made.plan([[0], [1]]))
    assert carried(program) == {"host>0": ("x",), "0>1": ("v0",), "0>host": ("v0",), "1>host": ("mask",)}


def test_stage_without_inputs_is_clocked_and_stage_without_outputs_confirms() -> None:
    graph = hand_made.graph([[], [], ["v1"]], ["v1"], inputs=())
    program = lower(graph, hand_made.plan([[0], [1], [2]]))
    assert carried(program) == {
        "host>0": (), "host>1": (), "0>host": (), "1>2": ("v1",), "1>host": ("v1",), "2>host": (),
    }  # fmt: skip
    assert Verify().apply(program, graph, hand_made.plan([[0], [1], [2]])) is program


def test_model_without_layers() -> None:
    graph = hand_made.graph([], ["x"])
    assert carried(lower(graph, hand_made.plan([[]]))) == {"host>0": (), "0>host": ()}


def test_one_device_with_two_stages_receives_before_it_sends_to_itself() -> None:
    graph = hand_made.chain(2)
    plan = hand_made.plan([[0], [1]])
    plan = replace(plan, stages=tuple(replace(stage, device=0) for stage in plan.stages))
    program = lower(graph, plan, ahead=0)
    assert [str(step) for step in program.devices[0].body] == [
        "0RECV0@host>0", "1RECV0@0>1", "0F0", "0SEND0@0>1", "1F0", "1SEND0@1>host",
    ]  # fmt: skip
    Verify().apply(program, graph, plan)


def test_refuses_what_cannot_be_lowered() -> None:
    graph, plan = hand_made.chain(2), hand_made.plan([[0], [1]])
    with pytest.raises(ProgramError, match="layer1 in stage 0 reads 'v0' of the later stage 1"):
        lower(graph, hand_made.plan([[1], [0]]))
    with pytest.raises(ProgramError, match=r"puts layer 1 \(layer1\) in no stage"):
        lower(graph, hand_made.plan([[0]]))
    with pytest.raises(ProgramError, match="gives stage 1 layer 0"):
        lower(graph, hand_made.plan([[0], [0, 1]]))
    with pytest.raises(ProgramError, match="no spec of 'v0'"):
        lower(replace(graph, values={"x": hand_made.spec(), "v1": hand_made.spec()}), plan)
    with pytest.raises(ProgramError, match="reads 'ghost', which no layer makes"):
        lower(hand_made.graph([["ghost"]]), hand_made.plan([[0]]))
    with pytest.raises(ProgramError, match="returns 'ghost', which no layer makes"):
        lower(hand_made.graph([["x"]], ["ghost"]), hand_made.plan([[0]]))
    with pytest.raises(ProgramError, match="ahead=-1"):
        Lower(-1)
    program = Schedule().apply(plan)
    late = replace(program.devices[1], body=(Instruction(Op.FORWARD, 1, -1),))
    with pytest.raises(ProgramError, match="device 1: only a body"):
        Lower().apply(graph, plan, replace(program, devices=(program.devices[0], late)))


AHEAD = st.sampled_from([None, 0, 1, 3])


@hand_made.RELAXED
@given(hand_made.random_models(), AHEAD)
def test_any_plan_lowers_to_a_program_that_verifies(case: tuple[ModelGraph, Plan], ahead: int | None) -> None:
    graph, plan = case
    program = lower(graph, plan, ahead)
    assert Verify().apply(program, graph, plan) is program


@hand_made.RELAXED
@given(hand_made.random_models(), AHEAD)
def test_every_value_crosses_exactly_where_it_must(case: tuple[ModelGraph, Plan], ahead: int | None) -> None:
    graph, plan = case
    home = {f"v{layer}": stage.index for stage in plan.stages for layer in stage.layers}
    wanted = {
        (home.get(value, HOST), stage.index, value)
        for stage in plan.stages
        for layer in stage.layers
        for value in graph.layers[layer].reads
        if home.get(value, HOST) != stage.index
    }
    last = len(plan.stages) - 1
    wanted |= {(home.get(ref.name, last), HOST, ref.name) for ref in graph.outputs if ref.kind == "value"}
    edges = lower(graph, plan, ahead).edges
    assert sorted((e.source, e.target, v) for e in edges for v in e.values) == sorted(wanted)
    for edge in edges:
        assert edge.values or HOST in (edge.source, edge.target)
        assert edge.specs == tuple(graph.values[value] for value in edge.values)


@hand_made.RELAXED
@given(st.data(), st.integers(2, 4), st.integers(0, 2))
def test_jumping_edges_never_throttle_the_chain(data: st.DataObject, stages: int, ahead: int) -> None:
    """Ten times the room on every edge that jumps stages changes no time, whatever stages and sends cost."""
    reads = [
        ["x" if i == 0 else f"v{i - 1}", *data.draw(st.sets(st.sampled_from(["x", *(f"v{j}" for j in range(i))])))]
        for i in range(stages)
    ]
    graph = hand_made.graph(
        [list(dict.fromkeys(r)) for r in reads],
        [f"v{i}" for i in range(stages) if i == stages - 1 or data.draw(st.booleans())],
    )
    cost = [float(data.draw(st.integers(0, 5))) for _ in range(stages)]
    plan = hand_made.plan([[i] for i in range(stages)], cost)
    program = lower(graph, plan, ahead)
    roomy: dict[str, int] = {}
    for edge in program.edges:
        first, last = edge.source, stages if edge.target == HOST else edge.target
        roomy[edge.name] = edge.ahead if last - first == 1 else edge.ahead + 10 * stages
    wide = hand_made.program([(e.source, e.target, roomy[e.name]) for e in program.edges], stages)
    usual = hand_made.program([(e.source, e.target, e.ahead) for e in program.edges], stages)
    samples = 12
    assert (
        simulate(usual, plan, hand_made.FREE_LINK, samples).finishes
        == simulate(wide, plan, hand_made.FREE_LINK, samples).finishes
    )
