from __future__ import annotations

from dataclasses import replace

import pytest

import hand_made
from pipecompile.errors import PlanError
from pipecompile.passes.schedule import Schedule
from pipecompile.schedules.stream import stream


def test_each_device_computes_the_sample_at_hand() -> None:
    program = stream(hand_made.plan([[0], [1, 2], [3]]))
    assert [[str(step) for step in device.body] for device in program.devices] == [["0F0"], ["1F0"], ["2F0"]]
    assert [device.stages for device in program.devices] == [(0,), (1,), (2,)]
    assert program.edges == ()
    assert all(device.warm_up == device.drain == () for device in program.devices)


def test_unrolled_order_is_that_of_the_samples() -> None:
    unrolled = stream(hand_made.plan([[0], [1]])).unroll(3)
    assert [[str(step) for step in steps] for steps in unrolled] == [["0F0", "0F1", "0F2"], ["1F0", "1F1", "1F2"]]


def test_a_device_with_two_stages_computes_them_in_pipeline_order() -> None:
    plan = hand_made.plan([[0], [1], [2]])
    wrapped = replace(plan, stages=(*plan.stages[:2], replace(plan.stages[2], device=0)))
    (first, second) = stream(wrapped).devices
    assert (first.device, first.stages, [str(step) for step in first.body]) == (0, (0, 2), ["0F0", "2F0"])
    assert (second.device, second.stages) == (1, (1,))


def test_schedule_pass_picks_by_name() -> None:
    plan = hand_made.plan([[0], [1]])
    assert Schedule("stream").apply(plan) == stream(plan)
    with pytest.raises(PlanError, match="no schedule 'gpipe': choose one of stream"):
        Schedule("gpipe").apply(plan)
