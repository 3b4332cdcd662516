"""Every schedule of a training step: valid in its order, and as long and as hungry as published."""

from __future__ import annotations

import importlib
import textwrap
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hand_made
from oracles.step_order import finish_times
from pipecompile.errors import PlanError
from pipecompile.ir.plan import Plan
from pipecompile.ir.program import Instruction, Op, Program
from pipecompile.ir.training import kept_at_once
from pipecompile.passes.verify_step import VerifyStep
from pipecompile.schedules.training import STEP_SCHEDULES, StepSchedule
from pipecompile.simulate.step import bubble, step_table, step_ticks

NAMES = list(STEP_SCHEDULES)
MODULES = {"1f1b": "one_f_one_b"}


def plan_for(schedule: StepSchedule, devices: int) -> Plan:
    place = schedule.place(devices)
    flat = hand_made.plan([[i] for i in range(len(place))])
    return replace(flat, stages=tuple(replace(s, device=place[s.index]) for s in flat.stages))


def program_of(name: str, devices: int, micro_batches: int, chunks: int | None = None) -> Program:
    schedule = STEP_SCHEDULES[name]
    if chunks is not None:
        schedule = replace(schedule, chunks=chunks)
    return schedule.order(plan_for(schedule, devices), micro_batches)


def words(program: Program) -> list[list[str]]:
    return [[str(step) for step in device.warm_up] for device in program.devices]


@pytest.mark.parametrize("name", NAMES)
@hand_made.RELAXED
@given(devices=st.integers(2, 8), micro_batches=st.integers(1, 32))
def test_order_is_valid_complete_and_timed_as_simulated(name: str, devices: int, micro_batches: int) -> None:
    program = program_of(name, devices, micro_batches)
    ends = finish_times(words(program))
    stages = devices * STEP_SCHEDULES[name].chunks
    backward = ("B", "W") if STEP_SCHEDULES[name].splits else ("BW",)
    assert set(ends) == {f"{s}{op}{i}" for s in range(stages) for op in ("F", *backward) for i in range(micro_batches)}
    timeline = step_ticks(program)
    assert {f"{e.stage}{e.activity}{e.sample}": e.end for e in timeline.events if e.activity != "wait"} == ends
    VerifyStep().apply(program)
    for device in program.devices:  # summed in the order of plain PyTorch
        for op in Op:
            for stage in device.stages:
                samples = [s.sample for s in device.warm_up if s.op is op and s.stage == stage]
                assert samples == sorted(samples)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@hand_made.RELAXED
@given(p=st.integers(2, 8), m=st.integers(1, 32))
def test_bubble_of_gpipe_and_1f1b(name: str, p: int, m: int) -> None:
    """(p - 1) / (m + p - 1): GPipe, section 2.3; Megatron-LM 2021, section 2.2."""
    timeline = step_ticks(program_of(name, p, m))
    assert timeline.finishes == (3.0 * (m + p - 1),)
    assert bubble(timeline) == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize("name", ["interleaved", "breadth_first"])
@hand_made.RELAXED
@given(p=st.integers(2, 8), k=st.integers(1, 4), v=st.integers(2, 4))
def test_bubble_of_looped_schedules(name: str, p: int, k: int, v: int) -> None:
    """(p - 1) / (v m) of the time worked: Megatron-LM 2021, section 2.2.2; Lamy-Poirier 2022, section 4."""
    m = k * p
    timeline = step_ticks(program_of(name, p, m, v))
    assert timeline.finishes[0] == 3 * v * m + 3 * (p - 1)
    worked = 1 - bubble(timeline)
    assert bubble(timeline) / worked == pytest.approx((p - 1) / (v * m))


@hand_made.RELAXED
@given(p=st.integers(2, 8), extra=st.integers(0, 24))
def test_bubble_of_zb_h1(p: int, extra: int) -> None:
    """(p - 1)(F + B - W), a third of 1F1B's at F = B = W: Qi et al. 2023, table 2."""
    m = p + extra
    assert step_ticks(program_of("zb_h1", p, m)).finishes[0] == 3 * m + (p - 1)


@hand_made.RELAXED
@given(p=st.integers(2, 8), extra=st.integers(0, 24))
def test_zb_v_never_waits_once_begun(p: int, extra: int) -> None:
    """No bubble at F = B = W between a device's first and last work: Qi et al. 2024, section 3.2."""
    m = 2 * p + extra
    program = program_of("zb_v", p, m)
    ends = finish_times(words(program))
    for device, own in enumerate(words(program)):
        assert ends[own[0]] - 1 == device
        assert max(ends[word] for word in own) - device == 6 * m


@hand_made.RELAXED
@given(p=st.integers(2, 8), m=st.integers(1, 32), v=st.integers(2, 4))
def test_peak_activations(p: int, m: int, v: int) -> None:
    """Micro-batches kept at once, by device, as the papers count them."""
    assert kept_at_once(program_of("gpipe", p, m)) == (m,) * p
    assert kept_at_once(program_of("1f1b", p, m)) == tuple(min(m, p - s) for s in range(p))
    assert kept_at_once(program_of("breadth_first", p, m, v)) == (v * m,) * p
    assert kept_at_once(program_of("zb_h1", p, m)) == (min(m, p),) * p
    if m % p == 0:
        warm_up = [2 * (p - 1 - d) + (v - 1) * p for d in range(p)]
        assert kept_at_once(program_of("interleaved", p, m, v)) == tuple(min(w + 1, v * m) for w in warm_up)
    if m >= 2 * p:
        assert kept_at_once(program_of("zb_v", p, m)) == (2 * p,) * p


@pytest.mark.parametrize("name", NAMES)
def test_the_table_in_the_docstring_is_the_schedule(name: str) -> None:
    devices = 3 if STEP_SCHEDULES[name].chunks == 1 else 2
    table = step_table(step_ticks(program_of(name, devices, 4)))
    module = importlib.import_module(f"pipecompile.schedules.{MODULES.get(name, name)}")
    assert textwrap.indent(table, "    ") in module.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_text_form_and_json_round_trip(name: str) -> None:
    program = program_of(name, 3, 4)
    assert Program.from_json(program.to_json()) == program
    assert all(Instruction.parse(str(step)) == step for device in program.devices for step in device.warm_up)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_placement_and_no_micro_batch_are_refused(name: str) -> None:
    schedule = STEP_SCHEDULES[name]
    plan = plan_for(schedule, 2)
    with pytest.raises(PlanError, match="at least one micro-batch"):
        schedule.order(plan, 0)
    flipped = replace(plan, stages=tuple(replace(s, device=1 - s.device) for s in plan.stages))
    with pytest.raises(PlanError, match=r"schedule '\w+' runs stages .* on device 0, the plan has"):
        schedule.order(flipped, 4)
    lopsided = replace(plan, stages=(*plan.stages, replace(plan.stages[-1], index=len(plan.stages))))
    with pytest.raises(PlanError, match="as many stages on each device"):
        schedule.order(lopsided, 4)
