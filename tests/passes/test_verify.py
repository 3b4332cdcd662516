"""Every rule: start from a good program, break one thing, and it must be refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from pipecompile.errors import ProgramError
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Program
from pipecompile.passes.lower import Lower
from pipecompile.passes.schedule import Schedule
from pipecompile.passes.verify import Verify

#: Three stages; stage 0 also feeds stage 2, and the caller gets a result of stage 1 too.
GRAPH = hand_made.graph([["x"], ["v0"], ["v1", "v0"]], ["v2", "v1"])
PLAN = hand_made.plan([[0], [1], [2]])


def good(ahead: int = 1) -> Program:
    return Lower(ahead).apply(GRAPH, PLAN, Schedule().apply(PLAN))


def refuse(program: Program, reason: str, graph: ModelGraph | None = None, plan: Plan | None = None) -> None:
    with pytest.raises(ProgramError, match=reason):
        Verify().apply(program, graph, plan)


def on(program: Program, device: int, **parts: object) -> Program:
    devices = list(program.devices)
    devices[device] = replace(devices[device], **parts)  # type: ignore[arg-type]
    return replace(program, devices=tuple(devices))


def body(program: Program, device: int, change: Callable[[list[str]], list[str]]) -> Program:
    words = [str(step) for step in program.devices[device].body]
    return on(program, device, body=tuple(Instruction.parse(word) for word in change(words)))


def edge(program: Program, name: str, **parts: object) -> Program:
    changed = (replace(e, **parts) if e.name == name else e for e in program.edges)  # type: ignore[arg-type]
    return replace(program, edges=tuple(changed))


def without(word: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        assert word in words
        return [other for other in words if other != word]

    return change


def first(word: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [word, *without(word)(words)]


def last(word: str) -> Callable[[list[str]], list[str]]:
    return lambda words: [*without(word)(words), word]


def instead(old: str, new: str) -> Callable[[list[str]], list[str]]:
    def change(words: list[str]) -> list[str]:
        assert old in words
        return [new if word == old else word for word in words]

    return change


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_the_good_program_passes_unchanged(ahead: int) -> None:
    program = good(ahead)
    assert Verify().apply(program, GRAPH, PLAN) is program
    assert [str(step) for step in good().devices[1].body] == [
        "1RECV1@0>1", "1F0", "1SEND0@1>2", "1SEND0@1>host",
    ]  # fmt: skip


def test_send_before_its_forward() -> None:
    refuse(body(good(), 1, first("1SEND0@1>2")), r"device 1, stage 1, sample 0: 1SEND0@1>2 on edge 1>2 comes before")


def test_send_after_the_next_forward() -> None:
    program = on(
        good(3),
        1,
        warm_up=tuple(map(Instruction.parse, ["1RECV0@0>1", "1RECV1@0>1", "1F0"])),
        body=tuple(map(Instruction.parse, ["1RECV2@0>1", "1F1", "1SEND0@1>2", "1SEND0@1>host"])),
    )
    refuse(program, r"device 1, stage 1, sample 0: 1SEND0@1>2 on edge 1>2 comes after the next forward")


def test_forward_of_a_message_never_posted() -> None:
    refuse(
        body(good(0), 1, without("1RECV0@0>1")), r"device 1, stage 1, sample 0: .* message 0 of edge 0>1, never posted"
    )
    refuse(body(good(0), 1, last("1RECV0@0>1")), r"message 0 of edge 0>1, never posted")
    refuse(body(good(), 1, without("1RECV1@0>1")), r"sample 1: .* message 1 of edge 0>1, never posted")


def test_forward_of_a_message_never_sent() -> None:
    refuse(body(good(), 0, without("0SEND0@0>2")), "device 0: stage 0 never sends on edge 0>2")


@pytest.mark.parametrize("name", ["1>host", "2>host"])
def test_result_never_sent(name: str) -> None:
    stage = name[0]
    broken = body(good(), int(stage), without(f"{stage}SEND0@{name}"))
    refuse(broken, f"device {stage}: stage {stage} never sends on edge {name}")


def test_ring_overrun() -> None:
    refuse(
        edge(good(3), "0>1", ahead=0, slots=3),
        r"device 1, stage 1, sample 3: 1RECV3@0>1 overruns edge 0>1: message 0 is not yet consumed, .* 3 slots",
    )


def test_slot_given_away_before_a_view_of_it_is_sent() -> None:
    # posted after the forward, one further ahead: no overrun, but message 0 may still be on its way out
    program = edge(good(1), "0>1", ahead=0, slots=1)
    program = on(program, 1, warm_up=(Instruction.parse("1RECV0@0>1"),))
    program = body(program, 1, lambda words: ["1F0", "1RECV1@0>1", *words[2:]])
    refuse(program, r"device 1, stage 1, sample 1: 1RECV1@0>1 gives away the slot of message 0 .* edge 1>2")
    fine = body(program, 1, last("1RECV1@0>1"))
    assert Verify().apply(fine) is fine


def test_messages_posted_out_of_order_or_twice() -> None:
    refuse(on(good(), 1, warm_up=()), r"device 1, stage 1, sample 1: 1RECV1@0>1 posts message 1 .* when 0 is due")
    twice = good().devices[1].warm_up * 2
    refuse(on(good(), 1, warm_up=twice), r"sample 0: 1RECV0@0>1 posts message 0 on edge 0>1 when 1 is due")


def test_messages_sent_out_of_order_or_twice() -> None:
    refuse(
        body(good(), 1, instead("1SEND0@1>2", "1SEND1@1>2")), r"sample 1: 1SEND1@1>2 sends message 1 .* when 0 is due"
    )
    refuse(body(good(), 1, lambda words: [*words, "1SEND0@1>2"]), r"1SEND0@1>2 sends message 0 .* when 1 is due")


def test_sample_computed_twice() -> None:
    # a second forward of a stage that reads nothing more
    refuse(
        body(good(), 1, lambda words: [*words, "1F0"]), r"device 1, stage 1, sample 0: 1F0 computes the sample twice"
    )


def test_sample_skipped() -> None:
    refuse(body(good(), 1, instead("1F0", "1F1")), r"device 1, stage 1, sample 1: 1F1 skips sample 0")


def test_sample_never_computed() -> None:
    # with nobody to wait for it, only the count can tell
    program = hand_made.program([(HOST, 0, 1), (0, HOST, 1)], 2)
    assert [str(step) for step in program.devices[1].body] == ["1F0"]
    refuse(on(program, 1, body=()), "device 1: stage 1 never computes sample 0")


@pytest.mark.parametrize(
    ("device", "gone", "reason"),
    [
        (0, 1, "device 1, stage 1, sample 1: 1F1 waits for a message on edge 0>1, but stage 0 never sends message 1"),
        (0, 2, "device 1, stage 1, sample 1: 1F1 waits for a message on edge 0>1, but stage 0 never sends message 1"),
        (1, 1, "edge 1>host: message 1 is never sent"),
        (1, 2, "device 1: stage 1 never computes sample 1"),
        (
            1,
            3,
            "device 0, stage 0, sample 1: .* waits for a posted slot on edge 0>1, but stage 1 never posts message 1",
        ),
    ],
)
def test_closed_program_that_stops_early(device: int, gone: int, reason: str) -> None:
    """Two samples, all of it warm-up; then without the last ``gone`` instructions of one device."""
    program = hand_made.chain_program(2, ahead=0)
    for index, unrolled in enumerate(program.unroll(2)):
        program = on(program, index, warm_up=unrolled, body=())
    assert Verify().apply(program) is program
    refuse(on(program, device, warm_up=program.devices[device].warm_up[:-gone]), reason)


def test_instruction_on_the_wrong_device() -> None:
    refuse(
        body(good(), 1, lambda words: [*words, "0F0"]),
        "device 1: 0F0 is an instruction on the wrong device: .* device 0",
    )
    refuse(body(good(), 1, lambda words: [*words, "7F0"]), "device 1: 7F0 .* stage 7 is on no device")


def test_instruction_at_the_wrong_end_of_an_edge() -> None:
    refuse(
        body(good(), 1, instead("1SEND0@1>2", "1SEND0@0>2")), "device 1: 1SEND0@0>2: edge 0>2 is not sent by stage 1"
    )
    refuse(body(good(), 1, instead("1RECV1@0>1", "1RECV1@1>2")), "edge 1>2 is not received by stage 1")
    refuse(body(good(), 1, instead("1SEND0@1>2", "1SEND0@1>5")), "device 1: 1SEND0@1>5: there is no edge '1>5'")
    refuse(body(good(), 1, instead("1F0", "1F0@0>1")), "device 1: 1F0@0>1: a forward reads all edges")


def test_edges_that_make_no_sense() -> None:
    program = good()
    again = program.edge("0>1")
    refuse(replace(program, edges=(*program.edges, again)), "two edges 0>1")
    refuse(replace(program, edges=(*program.edges, replace(again, target=9))), "edge 0>9 ends at stage 9")
    refuse(replace(program, edges=(*program.edges, replace(again, target=0))), "edge 0>0 leads from a stage to itself")
    refuse(edge(program, "0>1", slots=1), "edge 0>1 is 1 ahead with 1 slots")
    refuse(edge(program, "0>1", specs=()), "edge 0>1 has 1 values, but 0 specs")
    refuse(on(program, 1, stages=(1, 2)), "stage 2 is on device 1 and on device 2")


def test_deadlock_of_two_stages_that_wait_for_each_other() -> None:
    program = hand_made.program([(HOST, 0, 1), (0, 1, 1), (1, 0, 1), (1, HOST, 1)], 2)
    refuse(
        program,
        "deadlock: device 0, stage 0, sample 0: 0F0 waits for a message on edge 1>0; "
        "device 1, stage 1, sample 0: 1F0 waits for a message on edge 0>1",
    )


def test_deadlock_of_a_device_that_sends_to_itself_before_it_receives() -> None:
    plan = replace(PLAN, stages=tuple(replace(stage, device=0) for stage in PLAN.stages))
    program = Lower(0).apply(GRAPH, plan, Schedule().apply(plan))
    assert Verify().apply(program, GRAPH, plan) is program
    words = [str(step) for step in program.devices[0].body]
    assert words.index("1RECV0@0>1") < words.index("0SEND0@0>1")
    late = [word for word in words if word != "1RECV0@0>1"]
    late.insert(late.index("1F0"), "1RECV0@0>1")
    refuse(
        on(program, 0, body=tuple(map(Instruction.parse, late))),
        "deadlock: device 0, stage 0, sample 0: 0SEND0@0>1 waits for a posted slot on edge 0>1",
    )


def test_value_its_stage_does_not_make() -> None:
    program = edge(good(), "1>2", values=("v0",))
    refuse(program, "edge 1>2 carries 'v0', which stage 1 does not make", GRAPH, PLAN)
    refuse(edge(good(), "host>0", values=("v1",)), "carries 'v1', which the caller does not make", GRAPH, PLAN)


def test_value_that_no_edge_brings() -> None:
    program = edge(good(), "0>2", values=(), specs=())
    assert Verify().apply(program) is program
    refuse(program, "device 2, stage 2: layer layer2 reads 'v0', which no edge brings", GRAPH, PLAN)


def test_result_that_no_edge_brings_or_two_do() -> None:
    none = edge(good(), "1>host", values=(), specs=())
    refuse(none, "result 'v1' 0 times", GRAPH, PLAN)
    twice = edge(good(), "1>host", values=("v1", "v1"), specs=(hand_made.spec(),) * 2)
    refuse(twice, "result 'v1' 2 times", GRAPH, PLAN)


def test_layout_or_device_other_than_planned() -> None:
    refuse(edge(good(), "0>1", specs=(hand_made.spec(5),)), "edge 0>1 has another layout of 'v0'", GRAPH, PLAN)
    moved = replace(PLAN, stages=(*PLAN.stages[:2], replace(PLAN.stages[2], device=7)))
    refuse(good(), "device 7, stage 2: the program has this stage on device 2", GRAPH, moved)


@hand_made.RELAXED
@given(hand_made.random_models(), st.sampled_from([None, 0, 2]), st.data())
def test_no_instruction_can_be_left_out(case: tuple[ModelGraph, Plan], ahead: int | None, data: st.DataObject) -> None:
    """Any lowered program with one instruction removed is refused: none is superfluous."""
    graph, plan = case
    program = Lower(ahead).apply(graph, plan, Schedule().apply(plan))
    device: DeviceProgram = data.draw(st.sampled_from(program.devices))
    part = data.draw(st.sampled_from(["warm_up", "body"] if device.warm_up else ["body"]))
    steps: list[Instruction] = list(getattr(device, part))
    del steps[data.draw(st.integers(0, len(steps) - 1))]
    with pytest.raises(ProgramError):
        Verify().apply(on(program, program.devices.index(device), **{part: tuple(steps)}))


@hand_made.RELAXED
@given(hand_made.random_models(), st.data())
def test_no_ring_can_be_smaller(case: tuple[ModelGraph, Plan], data: st.DataObject) -> None:
    graph, plan = case
    program = Lower(2).apply(graph, plan, Schedule().apply(plan))
    inner = [e for e in program.edges if e.target != HOST]
    chosen: Edge = data.draw(st.sampled_from(inner))
    refuse(edge(program, chosen.name, ahead=0, slots=chosen.slots - 1), f"overruns edge {chosen.name}")
