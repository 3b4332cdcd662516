"""Lowered training steps: every schedule on random models, the verifier's rules, the simulator's sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, Instruction, Op, Program
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.passes.lower_step import LowerStep
from pipecompile.passes.verify_step import VerifyStep
from pipecompile.schedules.training import STEP_SCHEDULES
from pipecompile.simulate.step import simulate_step, step_ticks

SPEC = hand_made.spec()


def placed(name: str, devices: int, layers: int = 0) -> Plan:
    place = STEP_SCHEDULES[name].place(devices)
    count = len(place)
    layers = layers or count
    cut = [[i for i in range(layers) if i * count // layers == s] for s in range(count)]
    flat = hand_made.plan(cut)
    return replace(flat, stages=tuple(replace(s, device=place[s.index]) for s in flat.stages))


def with_weights(graph: ModelGraph, uses: dict[int, tuple[str, ...]]) -> ModelGraph:
    from pipecompile.ir.graph import StateSpec

    layers = tuple(replace(layer, state=uses.get(i, ())) for i, layer in enumerate(graph.layers))
    names = dict.fromkeys(name for own in uses.values() for name in own)
    state = tuple(StateSpec(name, name, "parameter", requires_grad=True) for name in names)
    return replace(graph, layers=layers, state=state)


def lowered(
    name: str, devices: int, m: int, graph: ModelGraph, weights: tuple[str, ...], values: set[str], ahead: int = 1,
    early: bool = False,
) -> Program:
    plan = placed(name, devices, len(graph.layers))
    order = STEP_SCHEDULES[name].order(plan, m)
    gradients = Gradients(frozenset(values), {w: SPEC for w in weights})
    return LowerStep(ahead, early=early).apply(graph, plan, order, gradients)


def chain(layers: int, uses: dict[int, tuple[str, ...]] | None = None) -> ModelGraph:
    own = {i: (f"w{i}",) for i in range(layers)}
    return with_weights(hand_made.chain(layers), own if uses is None else uses)


def plain(name: str = "1f1b", devices: int = 2, m: int = 3) -> Program:
    stages = devices * STEP_SCHEDULES[name].chunks
    graph = chain(stages)
    weights = tuple(f"w{i}" for i in range(stages))
    return lowered(name, devices, m, graph, weights, {f"v{i}" for i in range(stages)})


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("name", STEP_SCHEDULES)
def test_a_step_without_its_last_micro_batches_is_a_step(name: str, early: bool) -> None:
    """Which is what generated code makes of a smaller batch."""
    layers = 2 * len(STEP_SCHEDULES[name].place(3))
    graph = chain(layers, {i: (f"w{i % (layers - 1)}",) for i in range(layers)})  # the first and the last are tied
    weights = tuple(f"w{i}" for i in range(layers - 1))
    whole = lowered(name, 3, 6, graph, weights, set(graph.values), early=early)
    tied = {edge.name for edge in whole.edges if edge.tied}
    assert tied
    for parts in range(1, 6):
        devices = tuple(
            replace(d, warm_up=tuple(s for s in d.warm_up if s.op is Op.STEP or s.edge in tied or s.sample < parts))
            for d in whole.devices
        )
        fewer = VerifyStep().apply(replace(whole, devices=devices))
        assert fewer.micro_batches == parts



def texts(program: Program, device: int) -> list[str]:
    return [str(step) for step in program.devices[device].warm_up]


def test_a_lowered_step_reads_as_expected() -> None:
    program = plain("1f1b", 2, 2)
    assert [edge.name for edge in program.edges] == ["host>0", "0>1", "1>0"]
    assert texts(program, 0) == [
        "0RECV0@host>0", "0RECV1@host>0", "0RECV0@1>0", "0RECV1@1>0",
        "0F0", "0SEND0@0>1", "0F1", "0SEND1@0>1", "0BW0", "0BW1", "0STEP0",
    ]  # fmt: skip
    assert texts(program, 1) == [
        "1RECV0@0>1", "1RECV1@0>1", "1F0", "1BW0", "1SEND0@1>0", "1F1", "1BW1", "1SEND1@1>0", "1STEP0",
    ]  # fmt: skip


@pytest.mark.parametrize("name", list(STEP_SCHEDULES))
@hand_made.RELAXED
@given(devices=st.integers(2, 8), m=st.integers(1, 32), ahead=st.integers(0, 2))
def test_every_schedule_lowers_to_a_step_that_can_be_carried_out(name: str, devices: int, m: int, ahead: int) -> None:
    stages = devices * STEP_SCHEDULES[name].chunks
    graph = chain(stages)
    weights, values = tuple(f"w{i}" for i in range(stages)), {f"v{i}" for i in range(stages)}
    program = lowered(name, devices, m, graph, weights, values, ahead)
    VerifyStep().apply(program)
    order = STEP_SCHEDULES[name].order(placed(name, devices), m)
    if ahead:  # rings that let one more message in never make a schedule longer than it is on paper
        assert step_ticks(program).finishes == step_ticks(order).finishes


@st.composite
def models(draw: st.DrawFn, layers: int) -> tuple[ModelGraph, tuple[str, ...], set[str]]:
    """A chain with skips, several inputs and outputs, weights used anywhere, some values without gradients."""
    reads: list[list[str]] = []
    for i in range(layers):
        names = ["x", "y", *(f"v{j}" for j in range(i))]
        more = draw(st.lists(st.sampled_from(names), max_size=2))
        reads.append(list(dict.fromkeys(["x" if i == 0 else f"v{i - 1}", *more])))
    outputs = draw(st.lists(st.sampled_from([f"v{i}" for i in range(layers)] + ["y"]), max_size=2))
    graph = hand_made.graph(reads, list(dict.fromkeys([*outputs, f"v{layers - 1}"])), inputs=("x", "y"))
    weights = ("a", "b", "c")
    uses = {i: tuple(draw(st.sets(st.sampled_from(weights), max_size=2))) for i in range(layers)}
    used = {w for own in uses.values() for w in own}
    values = {f"v{i}" for i in range(layers) if draw(st.booleans()) or i == layers - 1}
    return with_weights(graph, uses), tuple(sorted(used)), values


@pytest.mark.parametrize("name", list(STEP_SCHEDULES))
@hand_made.RELAXED
@given(data=st.data(), devices=st.integers(1, 4), m=st.integers(1, 9))
def test_any_dag_with_tied_weights_lowers_and_runs_on_paper(
    name: str, data: st.DataObject, devices: int, m: int
) -> None:
    stages = devices * STEP_SCHEDULES[name].chunks
    graph, weights, values = data.draw(models(stages + data.draw(st.integers(0, 3))))
    program = VerifyStep().apply(lowered(name, devices, m, graph, weights, values, early=data.draw(st.booleans())))
    assert Program.from_json(program.to_json()) == program
    timeline = step_ticks(program)
    computed = [e for e in timeline.events if e.activity in ("F", "B", "W", "BW")]
    assert len(computed) == sum(s.op in ("F", "B", "W", "BW") for d in program.devices for s in d.warm_up)
    steps = [s.stage for d in program.devices for s in d.warm_up if s.op is Op.STEP]
    reduced = [s.edge for d in program.devices for s in d.warm_up if s.op is Op.REDUCE]
    assert len(steps) == len(set(steps)) <= stages
    assert sorted(reduced) == sorted(e.name for e in program.edges if e.tied and e.slots)
    for edge in program.edges:
        if edge.backward:
            assert set(edge.values) <= values


def test_a_tied_weight_is_reduced_into_the_first_stage_that_uses_it() -> None:
    graph = chain(3, {0: ("w",), 1: (), 2: ("w",)})
    program = lowered("1f1b", 3, 2, graph, ("w",), {"v0", "v1", "v2"})
    assert program.edge("2>0:tied").values == ("w",)
    assert texts(program, 0)[-2:] == ["0REDUCE0@2>0:tied", "0STEP0"]
    assert texts(program, 2)[-1] == "2SEND0@2>0:tied"
    assert not any("STEP" in word for word in texts(program, 1))
    folded = lowered("zb_v", 2, 2, chain(4, {0: ("w",), 3: ("w",)}), ("w",), {"v0", "v1", "v2", "v3"})
    tied = folded.edge("3>0:tied")  # both ends on device 0: nothing to send, but something to wait for
    assert tied.slots == 0
    assert not any("tied" in word for word in texts(folded, 0))


def test_a_stage_updates_right_after_its_last_backward_where_nothing_forbids_it() -> None:
    graph = chain(4)
    weights, values = tuple(f"w{i}" for i in range(4)), {f"v{i}" for i in range(4)}
    late = lowered("interleaved", 2, 2, graph, weights, values)
    assert texts(late, 1)[-2:] == ["1STEP0", "3STEP0"]
    early = VerifyStep().apply(lowered("interleaved", 2, 2, graph, weights, values, early=True))
    words = texts(early, 1)
    assert words.index("3BW1") < words.index("3SEND1@3>2") < words.index("3STEP0") < words.index("1BW0")
    assert words[-1] == "1STEP0"
    costs = [StageCost(1.0, 1.0, 1.0, 2.0, update=0.5)] * 4
    assert simulate_step(early, costs).finishes[0] <= simulate_step(late, costs).finishes[0]


def test_an_update_waits_for_tied_gradients_of_its_device_and_of_others() -> None:
    uses = {0: ("a", "w"), 1: ("b", "w"), 2: ("c",), 3: ("d", "w")}
    values = {f"v{i}" for i in range(4)}
    program = VerifyStep().apply(lowered("zb_v", 2, 4, chain(4, uses), ("a", "b", "c", "d", "w"), values, early=True))
    assert {e.name: e.slots for e in program.edges if e.tied} == {"1>0:tied": 1, "3>0:tied": 0}
    words = texts(program, 0)
    assert words[-2:] == ["0REDUCE0@1>0:tied", "0STEP0"]
    assert "3STEP0" in words[:-2]
    own = {0: ("a", "w"), 1: ("b",), 2: ("c",), 3: ("d", "w")}
    within = lowered("zb_v", 2, 4, chain(4, own), ("a", "b", "c", "d", "w"), values, early=True)
    VerifyStep().apply(within)
    last = max(texts(within, 0).index(word) for word in ("0W3", "3W3"))
    too_early = change(within, 0, move("0STEP0", texts(within, 0)[last]))
    with pytest.raises(ProgramError, match=r"0STEP0 comes before the weight gradients of stage \d are complete"):
        VerifyStep().apply(too_early)


def test_a_frozen_front_has_no_backward() -> None:
    program = lowered("1f1b", 3, 2, chain(3, {1: ("w",), 2: ("u",)}), ("w", "u"), {"v1", "v2"})
    assert not any("BW" in word for word in texts(program, 0))
    assert [edge.name for edge in program.edges if edge.backward] == ["2>1"]
    VerifyStep().apply(program)


def change(program: Program, device: int, edit: Callable[[list[str]], list[str]]) -> Program:
    made = tuple(Instruction.parse(word) for word in edit(texts(program, device)))
    devices = list(program.devices)
    devices[device] = replace(devices[device], warm_up=made)
    return replace(program, devices=tuple(devices))


def move(word: str, before: str) -> Callable[[list[str]], list[str]]:
    def edit(words: list[str]) -> list[str]:
        assert word in words
        rest = [w for w in words if w != word]
        at = rest.index(before)
        return [*rest[:at], word, *rest[at:]]

    return edit


def drop(word: str) -> Callable[[list[str]], list[str]]:
    def edit(words: list[str]) -> list[str]:
        assert word in words
        return [w for w in words if w != word]

    return edit


@pytest.mark.parametrize(
    ("device", "edit", "reason"),
    [
        (0, drop("0BW2"), "0STEP0 comes before the weight gradients of stage 0 are complete"),
        (0, move("0STEP0", "0BW2"), "0STEP0 comes before the weight gradients of stage 0 are complete"),
        (0, move("0BW1", "0BW0"), "0BW1 comes when the backward of micro-batch 0 is due"),
        (0, move("0BW0", "0F0"), "0BW0 comes before the forward"),
        (0, drop("0F2"), "comes before what it sends is computed"),
        (0, drop("0RECV0@1>0"), "posts a message when 0 is due"),
        (0, drop("0SEND1@0>1"), "sends a message when 1 is due"),
        (0, move("0SEND0@0>1", "0F0"), "0SEND0@0>1 comes before what it sends is computed"),
        (1, drop("1SEND2@1>0"), "deadlock: device 0: 0BW2 waits for message 2 on edge 1>0"),
        (1, drop("1F0"), "1BW0 comes before the forward of micro-batch 0"),
        (1, move("1STEP0", "1BW2"), "1STEP0 comes before the weight gradients"),
        (1, lambda words: [*words, "1STEP0"], "updates the weights twice"),
        (1, lambda words: [*words, "1F2"], "1F2 comes after the weights of stage 1 were updated"),
        (1, lambda words: ["0F0", *words], "on the wrong device"),
        (1, lambda words: ["1REDUCE0@0>1", *words], "carries no gradients of tied weights"),
        (1, lambda words: ["1RECV0@7>1", *words], "there is no edge '7>1'"),
        (1, lambda words: ["1RECV0@1>0", *words], "at the other end of edge 1>0"),
    ],
)  # fmt: skip
def test_each_rule_refuses_by_name(device: int, edit: Callable[[list[str]], list[str]], reason: str) -> None:
    program = plain("1f1b", 2, 3)
    VerifyStep().apply(program)
    with pytest.raises(ProgramError, match=reason):
        VerifyStep().apply(change(program, device, edit))


def test_a_slot_is_not_posted_again_before_its_weight_gradients() -> None:
    program = plain("zb_h1", 2, 8)
    slots = program.edge("0>1").slots
    assert slots < 8
    early = change(program, 1, move(f"1RECV{slots}@0>1", "1W0"))
    with pytest.raises(ProgramError, match=f"1RECV{slots}@0>1 overruns the ring: message 0 is still needed"):
        VerifyStep().apply(early)


def test_split_backward_rules() -> None:
    program = plain("zb_h1", 2, 3)
    with pytest.raises(ProgramError, match="0W0 comes before the input gradients of micro-batch 0"):
        VerifyStep().apply(change(program, 0, move("0W0", "0B0")))
    with pytest.raises(ProgramError, match="0W1 comes when the weight gradients of micro-batch 0 is due"):
        VerifyStep().apply(change(program, 0, drop("0W0")))


def test_tied_rules() -> None:
    program = lowered("1f1b", 2, 2, chain(2, {0: ("w",), 1: ("w",)}), ("w",), {"v0", "v1"})
    with pytest.raises(ProgramError, match="before the gradients on edge 1>0:tied are added"):
        VerifyStep().apply(change(program, 0, drop("0REDUCE0@1>0:tied")))
    with pytest.raises(ProgramError, match="1SEND0@1>0:tied comes before what it sends is computed"):
        VerifyStep().apply(change(program, 1, move("1SEND0@1>0:tied", "1BW1")))
    with pytest.raises(ProgramError, match="adds the same gradients twice"):
        VerifyStep().apply(change(program, 0, lambda words: [*words[:-1], "0REDUCE0@1>0:tied", words[-1]]))


def test_messages_cost_what_the_link_says_in_both_directions() -> None:
    """Two stages, one micro-batch: F, send, wake, F, BW, send, wake, BW, by hand."""
    program = plain("1f1b", 2, 1)
    costs = [StageCost(2.0, 1.0, 1.0, 3.0, update=0.5), StageCost(4.0, 1.0, 1.0, 5.0, update=0.25)]
    link = Link(0.125, 64.0)  # 16 bytes a message: a quarter of a second
    begun = 0.125  # the input wakes device 0
    first = begun + 2.0 + 0.375
    second = first + 0.125 + 4.0 + 5.0 + 0.375
    assert simulate_step(program, costs, link).finishes == (second + 0.125 + 3.0 + 0.5,)


def test_a_throttled_gradient_edge_delays_the_step_and_a_throttled_activation_edge_too() -> None:
    program = plain("1f1b", 2, 4)
    costs = [StageCost(1.0, 1.0, 1.0, 2.0)] * 2
    free = simulate_step(program, costs).finishes[0]
    for name in ("0>1", "1>0"):
        slow = simulate_step(program, costs, throttle={name: Link(0.5, float("inf"))})
        assert free < slow.finishes[0] <= free + 4 * 0.5
        assert {e.edge for e in slow.events if e.activity == "TRANSFER"} == {name}


def test_inputs_go_straight_to_every_stage_that_reads_them() -> None:
    graph = with_weights(hand_made.graph([["x"], ["v0", "mask"]], inputs=("x", "mask")), {0: ("w0",), 1: ("w1",)})
    program = lowered("gpipe", 2, 2, graph, ("w0", "w1"), {"v0", "v1"})
    assert [(e.source, e.target, e.values) for e in program.edges if e.source == HOST] == [
        (HOST, 0, ("x",)),
        (HOST, 1, ("mask",)),
    ]
