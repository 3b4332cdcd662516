from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from hand_made import FREE_LINK
from oracles.max_plus import finishes
from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Link
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, Edge, Instruction, Op, Program
from pipecompile.passes.lower import Lower
from pipecompile.passes.schedule import Schedule
from pipecompile.simulate import simulate


def chain(cost: Sequence[float], ahead: int = 2) -> tuple[Program, Plan]:
    plan = hand_made.plan([[i] for i in range(len(cost))], cost)
    return hand_made.chain_program(len(cost), ahead), plan


@pytest.mark.parametrize("cost", [[2.0, 2.0], [1.0, 3.0], [3.0, 1.0], [2.0, 5.0, 1.0], [1.0], [4.0, 1.0, 1.0, 4.0]])
@pytest.mark.parametrize("ahead", [0, 1, 4])
def test_a_chain_runs_at_the_pace_of_its_slowest_stage(cost: list[float], ahead: int) -> None:
    timeline = simulate(*chain(cost, ahead), FREE_LINK, 40)
    assert timeline.origin == "simulated"
    assert timeline.period == max(cost)
    assert timeline.throughput == 1 / max(cost)
    assert timeline.finishes[0] == sum(cost)
    assert len(timeline.finishes) == len(timeline.latencies) == 40


def test_closed_form_of_every_finish() -> None:
    cost = [1.0, 3.0, 2.0]
    timeline = simulate(*chain(cost), FREE_LINK, 10)
    assert timeline.finishes == tuple(sum(cost) + n * max(cost) for n in range(10))


def test_messages_cost_both_ends_and_the_period_is_the_planned_load() -> None:
    """Latency for each message in, latency + bytes / bandwidth for each out: as the partitioner counts."""
    link, cost = Link(0.25, 8.0), [2.0, 1.0, 2.0]
    elements = {(-1, 0): 8, (0, 1): 4, (1, 2): 16, (2, -1): 2}  # of 4 bytes
    plan = hand_made.plan([[0], [1], [2]], cost)
    program = hand_made.program([(-1, 0, 2), (0, 1, 2), (1, 2, 2), (2, -1, 2)], 3, elements)
    loads = [
        0.25 + cost[0] + 0.25 + 4 * 4 / 8.0,
        0.25 + cost[1] + 0.25 + 16 * 4 / 8.0,
        0.25 + cost[2] + 0.25 + 2 * 4 / 8.0,
    ]
    timeline = simulate(program, plan, link, 60)
    assert timeline.period == pytest.approx(max(loads))
    assert timeline.latencies[0] == pytest.approx(sum(loads))
    assert sum(e.end - e.start for e in timeline.events if e.activity == "SEND" and e.stage == 1) == pytest.approx(
        60 * (0.25 + 8.0)
    )


def test_measured_seconds_count_before_predicted_ones() -> None:
    program, plan = chain([1.0, 1.0])
    plan = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], measured=4.0)))
    assert simulate(program, plan, FREE_LINK, 20).period == 4.0


@pytest.mark.parametrize(("compute", "transfer"), [(1.0, 0.75), (1.0, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
def test_a_throttled_edge_overlaps_with_computing_only_if_received_ahead(
    compute: float, transfer: float, ahead: int
) -> None:
    program, plan = chain([compute, compute], ahead)
    timeline = simulate(program, plan, FREE_LINK, 60, throttle={"0>1": Link(transfer, float("inf"))})
    assert timeline.period == (compute + transfer if ahead == 0 else max(compute, transfer))
    assert timeline.finishes[0] == 2 * compute + transfer
    moves = [e for e in timeline.events if e.activity == "TRANSFER"]
    assert [e.sample for e in moves] == list(range(60))
    assert all(e.edge == "0>1" and e.device == 1 and e.end - e.start == transfer for e in moves)


def test_throttle_is_latency_and_bandwidth_of_the_message() -> None:
    plan = hand_made.plan([[0], [1]], [1.0, 1.0])
    program = hand_made.program([(-1, 0, 1), (0, 1, 1), (1, -1, 1)], 2, {(0, 1): 16})
    assert simulate(program, plan, FREE_LINK, 1, throttle={"0>1": Link(2.0, 32.0)}).finishes == (1 + 2 + 64 / 32 + 1,)


@pytest.mark.parametrize("name", ["host>0", "1>host"])
def test_edges_of_the_caller_can_be_throttled(name: str) -> None:
    program, plan = chain([1.0, 1.0])
    timeline = simulate(program, plan, FREE_LINK, 40, throttle={name: Link(3.0, float("inf"))})
    assert timeline.period == 3.0
    assert timeline.finishes[0] == 5.0


def test_skip_edges_do_not_slow_the_chain_when_deep_enough_and_do_when_not() -> None:
    cost = [2.0, 2.0, 2.0, 2.0]
    plan = hand_made.plan([[0], [1], [2], [3]], cost)
    ends = [(-1, 0, 1), (0, 1, 1), (1, 2, 1), (2, 3, 1), (3, -1, 1)]
    deep = hand_made.program([*ends, (0, 3, 5)], 4)
    assert simulate(deep, plan, FREE_LINK, 40).period == 2.0
    # Message n on the skip waits until stage 3 turns to sample n; only then does stage 0 go on.
    shallow = hand_made.program([*ends, (0, 3, 0)], 4)
    assert simulate(shallow, plan, FREE_LINK, 40).period > 2.0


def test_two_devices_on_one_core_take_turns() -> None:
    program, _ = chain([1.0, 3.0])
    shared = hand_made.plan([[0], [1]], [1.0, 3.0], cores=[5, 5])
    apart = hand_made.plan([[0], [1]], [1.0, 3.0], cores=[5, 6])
    timeline = simulate(program, shared, FREE_LINK, 40)
    assert timeline.period == pytest.approx(4.0, rel=0.02)
    busy = sorted((e.start, e.end) for e in timeline.events if e.activity == "F")
    assert all(one[1] <= two[0] for one, two in pairwise(busy))
    assert simulate(program, apart, FREE_LINK, 40).period == 3.0


def test_the_caller_can_be_the_slowest() -> None:
    program, plan = chain([1.0, 1.0])
    # one message in, one result out, two seconds each, on one thread
    timeline = simulate(program, plan, FREE_LINK, 40, host=Link(2.0, float("inf")))
    assert timeline.period == pytest.approx(4.0, rel=0.05)


def test_an_unloaded_pipeline_has_the_latency_of_its_parts() -> None:
    program, plan = chain([1.0, 3.0, 2.0], ahead=4)
    light = simulate(program, plan, FREE_LINK, 20, interval=7.0)
    assert set(light.latencies) == {6.0}
    assert light.period == 7.0
    full = simulate(program, plan, FREE_LINK, 40)
    assert full.latencies[-1] > 6.0
    assert full.period == 3.0


def test_every_sample_is_computed_once_by_every_stage_and_nobody_does_two_things_at_once() -> None:
    program, plan = chain([1.0, 3.0, 2.0], ahead=1)
    timeline = simulate(program, plan, Link(0.5, 1.0), 12)
    for stage in range(3):
        own = [e for e in timeline.events if e.stage == stage]
        assert [e.sample for e in own if e.activity == "F"] == list(range(12))
        assert all(one.end <= two.start for one, two in pairwise(own))


def test_samples_of_none() -> None:
    timeline = simulate(*chain([1.0]), FREE_LINK, 0)
    assert (timeline.events, timeline.finishes, timeline.throughput) == ((), (), 0.0)


def test_a_program_that_halts_is_an_error() -> None:
    program, plan = chain([1.0, 1.0])
    silent = tuple(step for step in program.devices[0].body if step.op is not Op.SEND)
    broken = replace(program, devices=(replace(program.devices[0], body=silent), program.devices[1]))
    with pytest.raises(ProgramError, match="after 0 of 5 samples, waiting for message 0 on edge 0>1"):
        simulate(broken, plan, FREE_LINK, 5)
    with pytest.raises(ProgramError, match="no edge '0>7'"):
        simulate(program, plan, FREE_LINK, 5, throttle={"0>7": FREE_LINK})


def test_instructions_are_carried_out_in_their_order() -> None:
    """A receive posted after the forward instead of before it costs the overlap."""
    program, plan = chain([1.0, 1.0], ahead=1)
    late = replace(
        program.devices[1],
        body=tuple(map(Instruction.parse, ["1F0", "1SEND0@1>host", "1RECV1@0>1"])),
    )
    slow = {"0>1": Link(0.75, float("inf"))}
    assert simulate(program, plan, FREE_LINK, 40, throttle=slow).period == 1.0
    assert (
        simulate(replace(program, devices=(program.devices[0], late)), plan, FREE_LINK, 40, throttle=slow).period
        == 1.75
    )


def test_same_program_same_timeline() -> None:
    program, plan = chain([1.0, 1.0, 1.0])
    assert simulate(program, plan, FREE_LINK, 9) == simulate(program, plan, FREE_LINK, 9)


UNITS = st.integers(0, 12).map(lambda n: n / 4)


@hand_made.RELAXED
@given(st.data(), st.integers(1, 4), st.integers(0, 3), UNITS)
def test_chains_agree_with_the_recurrence(data: st.DataObject, stages: int, ahead: int, latency: float) -> None:
    ends = [-1, *range(stages), -1]
    edges = [(ends[i], ends[i + 1], data.draw(st.integers(0, 3))) for i in range(stages + 1)]
    compare(data, stages, edges, latency)


@hand_made.RELAXED
@given(st.data(), st.integers(2, 4), UNITS)
def test_graphs_with_jumps_agree_with_the_recurrence(data: st.DataObject, stages: int, latency: float) -> None:
    pairs = [(s, t) for s in range(-1, stages) for t in [*range(s + 1, stages), -1] if (s, t) != (-1, -1)]
    chosen = data.draw(st.sets(st.sampled_from(pairs)))
    chosen |= {(s, s + 1) for s in range(-1, stages - 1)} | {(stages - 1, -1)}
    edges = [(s, t, data.draw(st.integers(0, 3))) for s, t in sorted(chosen)]
    compare(data, stages, edges, latency)


def compare(data: st.DataObject, stages: int, edges: list[tuple[int, int, int]], latency: float) -> None:
    """The simulator against the recurrence, to the last bit: all costs are multiples of a quarter."""
    cost = [data.draw(UNITS) for _ in range(stages)]
    elements = {(s, t): data.draw(st.integers(0, 3)) for s, t, _ in edges}
    throttled = {(s, t): data.draw(UNITS) for s, t, _ in edges if data.draw(st.booleans())}
    program = hand_made.program(edges, stages, elements)
    plan = hand_made.plan([[i] for i in range(stages)], cost)
    names = {(edge.source, edge.target): edge.name for edge in program.edges}
    bandwidth = 16.0  # 4 bytes an element: a quarter of a second each
    found = simulate(
        program,
        plan,
        Link(latency, bandwidth),
        7,
        throttle={names[ends]: Link(seconds, float("inf")) for ends, seconds in throttled.items()},
    )
    wanted = finishes(
        cost,
        edges,
        7,
        receive=latency,
        send={ends: latency + count * 4 / bandwidth for ends, count in elements.items()},
        transfer=throttled,
    )
    assert list(found.finishes) == wanted


@hand_made.RELAXED
@given(hand_made.random_models(), st.sampled_from([None, 0, 1]))
def test_no_plan_is_faster_than_its_slowest_stage_and_with_overlap_none_is_slower(
    case: tuple[ModelGraph, Plan], ahead: int | None
) -> None:
    graph, plan = case
    program = Lower(ahead).apply(graph, plan, Schedule().apply(plan))
    assert simulate(program, plan, FREE_LINK, 60).period == pytest.approx(max(s.seconds for s in plan.stages))


def test_period_is_the_load_the_plan_gives() -> None:
    """What the partitioner calls load and what the simulator finds are the same number."""
    link = Link(0.125, 64.0)
    graph = hand_made.graph([["x"], ["v0"], ["v1", "v0"]], ["v2"], elements={"v0": 32, "v1": 16, "x": 64})
    plan = hand_made.plan([[0], [1], [2]], [1.0, 2.0, 3.0])
    program = Lower().apply(graph, plan, Schedule().apply(plan))

    def transfer(stage: int) -> float:
        def sending(edge: Edge) -> float:
            return link.seconds(edge.nbytes) if edge.source == stage else link.latency if edge.target == stage else 0.0

        return sum(sending(edge) for edge in program.edges)

    loaded = replace(plan, stages=tuple(replace(s, transfer=transfer(s.index)) for s in plan.stages))
    assert loaded.slowest == max(1 + 0.125 + 2.125 + 2.125, 2 + 0.125 + 1.125, 3 + 0.25 + 0.375)
    assert simulate(program, loaded, link, 60).period == pytest.approx(loaded.slowest)
    assert {edge.source for edge in program.edges} == {HOST, 0, 1, 2}
