"""What passes hand on survives JSON: text and back, nothing lost, nothing changed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Cluster, Device, Link
from pipecompile.ir.graph import ModelGraph, TensorSpec
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.profile import Profile
from pipecompile.ir.program import HOST, DeviceProgram, Edge, Instruction, Op, Program, spec_from_json
from pipecompile.ir.timeline import Event, Timeline
from pipecompile.passes.lower import Lower
from pipecompile.passes.schedule import Schedule

seconds = st.floats(0, 1e6)
counts = st.integers(0, 100)
names = st.text(max_size=8)
links = st.builds(Link, seconds, st.floats(1, 1e12), st.floats(0, 1))
kinds = st.sampled_from(["cpu", "cuda"])
devices = st.builds(
    Device, names, kinds, st.none() | counts, counts, st.floats(0.1, 10), st.none() | st.floats(1, 1e12)
)
clusters = st.builds(
    Cluster, st.lists(devices, max_size=3).map(tuple), links, st.dictionaries(names, links, max_size=2)
)
some = st.lists(counts, max_size=4).map(tuple)
stages = st.builds(Stage, counts, counts, some, seconds, seconds, st.none() | seconds, some)
texts = st.lists(names, max_size=3).map(tuple)
plans = st.builds(
    Plan,
    st.lists(stages, max_size=3).map(tuple),
    clusters,
    seconds,
    seconds,
    names,
    seconds,
    seconds,
    texts,
    texts,
    st.sampled_from(["throughput", "latency"]),
    st.lists(seconds, max_size=3).map(tuple),
)
shapes = st.lists(counts, max_size=4).map(tuple)
specs = st.builds(
    TensorSpec,
    shapes,
    st.sampled_from(["float32", "bfloat16", "int64", "bool"]),
    shapes,
    counts,
    st.sampled_from(["tensor", "int", "float", "bool"]),
    st.booleans(),
    names,
)
ends = st.integers(HOST, 5)
edges = st.lists(st.tuples(names, specs), max_size=3).flatmap(
    lambda pairs: st.builds(
        Edge, ends, ends, st.just(tuple(n for n, _ in pairs)), st.just(tuple(s for _, s in pairs)), counts, counts
    )
)
edge_names = st.builds(lambda s, t: Edge(s, t, (), (), 0, 1).name, ends, ends)
instructions = st.builds(Instruction, st.sampled_from(Op), counts, st.integers(-50, 50), st.just("") | edge_names)
steps = st.lists(instructions, max_size=4).map(tuple)
device_programs = st.builds(DeviceProgram, counts, shapes, steps, steps, steps)
programs = st.builds(
    Program, st.lists(device_programs, max_size=3).map(tuple), st.lists(edges, max_size=3).map(tuple), names
)
events = st.builds(
    Event, counts, counts, st.sampled_from(["wait", "F", "SEND", "TRANSFER"]), counts, seconds, seconds, names
)
timelines = st.builds(
    Timeline,
    st.lists(events, max_size=4).map(tuple),
    st.sampled_from(["measured", "simulated"]),
    st.lists(seconds, max_size=4).map(tuple),
    st.lists(seconds, max_size=4).map(tuple),
)
profiles = st.builds(
    Profile, st.lists(seconds, max_size=4).map(tuple), st.dictionaries(names, counts), links, seconds, counts, names
)


@hand_made.RELAXED
@given(st.one_of(clusters, plans, programs, timelines, profiles))
def test_round_trip(value: Any) -> None:
    text = json.dumps(value.to_json(), allow_nan=False)
    assert type(value).from_json(json.loads(text)) == value


@hand_made.RELAXED
@given(specs)
def test_round_trip_of_a_spec(spec: TensorSpec) -> None:
    assert spec_from_json(json.loads(json.dumps(vars(spec)))) == spec


@hand_made.RELAXED
@given(instructions)
def test_text_form_of_an_instruction(step: Instruction) -> None:
    assert Instruction.parse(str(step)) == step


@pytest.mark.parametrize("text", ["", "F3", "0G3", "0F", "0F3 ", "0F3@", "-1F3", "0F3@a b", "0SEND@0>1"])
def test_text_that_is_no_instruction(text: str) -> None:
    with pytest.raises(ProgramError, match="not an instruction"):
        Instruction.parse(text)


@hand_made.RELAXED
@given(hand_made.random_models())
def test_round_trip_of_a_lowered_program(case: tuple[ModelGraph, Plan]) -> None:
    graph, plan = case
    program = Lower().apply(graph, plan, Schedule().apply(plan))
    read = Program.from_json(json.loads(json.dumps(program.to_json())))
    assert read == program
    assert read.unroll(3) == program.unroll(3)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_unroll_numbers_samples_absolutely_and_leaves_out_what_lies_beyond_the_end() -> None:
    program = hand_made.chain_program(1, ahead=2)
    assert [str(step) for step in program.unroll(3)[0]] == [
        "0RECV0@host>0", "0RECV1@host>0",
        "0RECV2@host>0", "0F0", "0SEND0@0>host",
        "0F1", "0SEND1@0>host",
        "0F2", "0SEND2@0>host",
    ]  # fmt: skip
    assert [str(step) for step in program.unroll(1)[0]] == ["0RECV0@host>0", "0F0", "0SEND0@0>host"]


def test_edge_by_name() -> None:
    program = hand_made.chain_program(2)
    assert [program.edge(edge.name) for edge in program.edges] == list(program.edges)
    with pytest.raises(ProgramError, match="no edge '1>0'"):
        program.edge("1>0")


@pytest.mark.parametrize(
    ("shape", "stride", "skew", "nbytes"),
    [
        ((2, 3), (3, 1), 0, 24),
        ((2, 3), (8, 2), 0, 52),
        ((2, 3), (0, 1), 16, 28),
        ((), (), 0, 4),
        ((4, 0), (1, 1), 0, 0),
    ],
)
def test_bytes_of_a_layout(shape: tuple[int, ...], stride: tuple[int, ...], skew: int, nbytes: int) -> None:
    assert TensorSpec(shape, "float32", stride, skew).nbytes == nbytes


def test_period_is_that_of_the_steady_state() -> None:
    # a slow start and a slow end lie outside the middle half
    finishes = (0.0, 50.0, 60.0, 61.0, 62.0, 63.0, 64.0, 65.0, 66.0, 90.0, 140.0, 200.0)
    assert Timeline((), "measured", (), finishes).period == 1.0
    assert Timeline((), "measured", (), (1.0,)).throughput == 0.0
    assert Timeline((), "measured", (), (1.0, 3.0)).throughput == 0.5
