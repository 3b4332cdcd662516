"""Replicated stages on paper: rings, lowering, what Verify refuses, what the simulator predicts."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
import replicated
from hand_made import FREE_LINK, RELAXED, random_models
from pipecompile.errors import PlanError, ProgramError
from pipecompile.ir.graph import ModelGraph
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import HOST, Edge, Instruction, Op, Program
from pipecompile.passes.lower import Lower
from pipecompile.passes.schedule import Schedule
from pipecompile.passes.verify import Verify
from pipecompile.simulate import simulate
from pipecompile.simulate.clock import clock_table, ticks


def lower(graph: ModelGraph, plan: Plan, ahead: int | None = None) -> Program:
    return Lower(ahead).apply(graph, plan, Schedule("stream").apply(plan))


@pytest.mark.parametrize("source", range(1, 5))
@pytest.mark.parametrize("target", range(1, 5))
def test_each_sample_has_one_ring(source: int, target: int) -> None:
    program = lower(hand_made.chain(2), replicated.plan([source, target], [[0], [1]]))
    rings = program.rings("0>1")
    assert len(rings) == math.lcm(source, target)
    assert len({ring.name for ring in rings}) == len(rings)
    for sample in range(3 * source * target):
        (ring,) = [ring for ring in rings if ring.carries(sample)]
        assert (ring.source_replica, ring.target_replica) == (sample % source, sample % target)
        assert (sample - ring.first) % ring.stride == 0


def test_names_and_json() -> None:
    program = lower(hand_made.chain(2), replicated.plan([2, 1], [[0], [1]]))
    assert [edge.name for edge in program.edges] == ["host>0.0", "host>0.1", "0.0>1", "0.1>1", "1>host"]
    assert Program.from_json(json.loads(json.dumps(program.to_json()))) == program
    lone = lower(hand_made.chain(2), hand_made.plan([[0], [1]]))
    assert [edge.name for edge in lone.edges] == [edge.between for edge in lone.edges]
    with pytest.raises(ProgramError, match="share no sample"):
        Edge(0, 1, (), (), 0, 1, source_replica=0, source_replicas=2, target_replica=1, target_replicas=2).first  # noqa: B018


def test_a_turn_of_a_replica_unrolls_to_its_samples() -> None:
    program = lower(hand_made.chain(2), replicated.plan([1, 2], [[0], [1]]), 1)
    where = {(d.stages[0], d.replica): steps for d, steps in zip(program.devices, program.unroll(5), strict=True)}
    assert [str(step) for step in where[1, 1]] == [
        "1RECV1@0>1.1", "1RECV3@0>1.1", "1F1", "1SEND1@1.1>host", "1F3", "1SEND3@1.1>host",
    ]  # fmt: skip
    assert [s.sample for s in where[0, 0] if s.op is Op.SEND] == list(range(5))


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelGraph, Plan]:
    """A random model with a random number of copies of each stage."""
    graph, plan = draw(random_models())
    copies = draw(st.lists(st.integers(1, 3), min_size=len(plan.stages), max_size=len(plan.stages)))
    seconds = [stage.seconds for stage in plan.stages]
    return graph, replicated.plan(copies, [stage.layers for stage in plan.stages], seconds)


@RELAXED
@given(models(), st.sampled_from([None, 0, 1, 2, 4]), st.integers(0, 40))
def test_random_plans_are_right_and_run_on_paper(made: tuple[ModelGraph, Plan], ahead: int | None, count: int) -> None:
    graph, plan = made
    program = lower(graph, plan, ahead)
    Verify().apply(program, graph, plan)
    assert Program.from_json(program.to_json()) == program
    timeline = simulate(program, plan, FREE_LINK, count)
    assert len(timeline.finishes) == count
    assert list(timeline.finishes) == sorted(timeline.finishes)
    computed = sorted((e.stage, e.sample) for e in timeline.events if e.activity == "F")
    assert computed == [(stage.index, sample) for stage in plan.stages for sample in range(count)]
    for event in timeline.events:
        if event.activity == "F":
            devices = plan.stages[event.stage].devices
            assert event.device == devices[event.sample % len(devices)]


@RELAXED
@given(models())
def test_rings_never_hold_up_what_the_slowest_device_lets_through(made: tuple[ModelGraph, Plan]) -> None:
    graph, plan = made
    cluster = replace(plan.cluster, devices=tuple(replace(d, core=None) for d in plan.cluster.devices))
    plan = replace(plan, cluster=cluster)
    count = 120
    timeline = simulate(lower(graph, plan), plan, FREE_LINK, count)
    longest = sum(stage.seconds for stage in plan.stages)
    assert timeline.finishes[-1] <= plan.slowest * count + longest + 1e-6


def test_two_copies_are_twice_as_fast_on_paper() -> None:
    graph, one, two = hand_made.chain(1), replicated.plan([1], [[0]], [1.0]), replicated.plan([2], [[0]], [1.0])
    assert simulate(lower(graph, one), one, FREE_LINK, 40).finishes[-1] == pytest.approx(40.0)
    assert simulate(lower(graph, two), two, FREE_LINK, 40).finishes[-1] == pytest.approx(20.0)


def test_the_clock_table_has_a_row_for_each_replica() -> None:
    program = lower(hand_made.chain(2), replicated.plan([1, 2], [[0], [1]]), 1)
    rows = clock_table(ticks(program, 4)).splitlines()
    assert [row.split()[:4] for row in rows[1:]] == [
        ["stage", "0,", "device", "0"], ["stage", "1,", "device", "1"], ["stage", "1,", "device", "2"]
    ]  # fmt: skip


def broken(program: Program, match: str) -> None:
    with pytest.raises(ProgramError, match=match):
        Verify().apply(program)


def test_verify_refuses_what_cannot_run() -> None:
    graph, plan = hand_made.chain(2), replicated.plan([2, 1], [[0], [1]])
    program = lower(graph, plan)
    devices, edges = program.devices, program.edges
    Verify().apply(program, graph, plan)
    broken(replace(program, edges=tuple(e for e in edges if e.name != "0.1>1")), "no edge 0>1 carries sample 1")
    broken(replace(program, edges=tuple(replace(e, ahead=1) if e.name == "0.1>1" else e for e in edges)), "differ in")
    broken(replace(program, edges=tuple(replace(e, slots=1) if e.name == "0.1>1" else e for e in edges)), "needs one")
    one = next(d for d in devices if d.stages == (0,) and d.replica == 1)
    rest = tuple(d for d in devices if d is not one)
    broken(replace(program, devices=rest), "stage 0 is on 1 devices that count")
    broken(replace(program, devices=(*rest, replace(one, replica=0))), "is on device")
    broken(replace(program, devices=(*rest, replace(one, warm_up=()))), "posts message 9 .* when 1 is due")
    skipping = tuple(replace(s, sample=1) if s.op is Op.FORWARD else s for s in one.body)
    broken(replace(program, devices=(*rest, replace(one, body=skipping))), "skips sample 1")
    other = tuple(replace(s, edge="0.1>1") if s.op is Op.SEND else s for s in one.body)
    broken(replace(program, devices=(*rest, replace(one, body=other))), "no edge '0.1>1'")
    swapped = replace(plan, stages=(replace(plan.stages[0], device=plan.stages[0].replicas[0]), plan.stages[1]))
    with pytest.raises(ProgramError, match="has this stage on device"):
        Verify().apply(program, graph, swapped)


def test_a_replica_has_its_device_to_itself() -> None:
    plan = replicated.plan([2, 1], [[0], [1]])
    shared = replace(plan, stages=(plan.stages[0], replace(plan.stages[1], device=plan.stages[0].device)))
    with pytest.raises(PlanError, match="give replicas own devices"):
        Schedule("stream").apply(shared)


def test_the_caller_is_one_replica() -> None:
    program = lower(hand_made.chain(1), replicated.plan([3], [[0]]))
    assert {(e.source_replicas, e.target_replicas) for e in program.edges if e.source == HOST} == {(1, 3)}
    assert Instruction(Op.SEND, 0, 0, "0>host") in program.devices[2].body
