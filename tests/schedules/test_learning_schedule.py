"""The order of a stream that is learned from, its verification and its simulation, against counting by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from learners import CLOCKS, RULES, learning, network
from pipecompile.errors import ProgramError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.learning import Rule
from pipecompile.ir.plan import Plan, Stage
from pipecompile.ir.program import Instruction, Op, Program
from pipecompile.ir.training import StageCost
from pipecompile.passes.verify_learn import VerifyLearn
from pipecompile.schedules.learning import learning as schedule
from pipecompile.simulate.learn import simulate_learn


def plan(stages: int) -> Plan:
    own = tuple(Stage(i, i, (), 1.0) for i in range(stages))
    return Plan(own, Cluster(tuple(Device(f"d:{i}") for i in range(stages))), 1.0, 1.0, "none", 0.0, float(stages))


@pytest.mark.parametrize(("clock", "ahead"), [("1f1b", 1), ("lockstep", 2)])
@pytest.mark.parametrize("samples", [0, 1, 3, 12])
def test_in_lockstep_as_in_turn_each_stage_is_as_far_ahead_as_said(clock: Any, ahead: int, samples: int) -> None:
    orders = schedule(plan(4), Rule(clock=clock)).unroll(samples)
    for stage, order in enumerate(orders):
        forward = backward = most = 0
        for step in order:
            forward += step.op is Op.FORWARD
            backward += step.op is Op.BACKWARD
            most = max(most, forward - backward)
            assert step.op is not Op.STEP or step.sample == backward - 1
        assert forward == backward == samples
        assert most == min(samples, ahead * (3 - stage) + 1)


def test_simulated_in_unit_time_no_device_waits_once_the_pipeline_is_full() -> None:
    cost = [StageCost(1.0, 0.0, 0.0, 1.0, 0.0)] * 3
    for clock in CLOCKS:
        timeline = simulate_learn(schedule(plan(3), Rule(clock=clock)), cost, 20)
        assert timeline.period == 2.0
        assert timeline.finishes[0] == 3.0
    sync = simulate_learn(schedule(plan(3), Rule("sync")), cost, 20)
    assert sync.period == 6.0  # one sample at a time
    uneven = [replace(cost[0], backward=2.0, update=0.5), cost[1], cost[2]]
    assert simulate_learn(schedule(plan(3), Rule("stale")), uneven, 20).period == 3.5  # the slowest stage


@pytest.mark.parametrize("updates", RULES)
def test_the_lowered_program_simulates_as_fast_as_the_order_alone(updates: str) -> None:
    """Rings are deep enough that no sender waits."""
    with learning(network(), 3, updates) as pipe:
        cost = [StageCost(1.0, 0.0, 0.0, 1.0, 0.0)] * 3
        bare = simulate_learn(schedule(plan(3), pipe.rule), cost, 24)
        assert simulate_learn(pipe.program, cost, 24).finishes == pytest.approx(bare.finishes)


def broken(program: Program, device: int, change: Any) -> Program:
    devices = list(program.devices)
    devices[device] = change(devices[device])
    return replace(program, devices=tuple(devices))


def test_what_would_hang_lose_or_overrun_is_refused() -> None:
    with learning(network(), 3) as pipe:
        good, rule = pipe.program, pipe.rule
    assert VerifyLearn(rule).apply(good) is good

    def without(op: Op) -> Any:
        return lambda d: replace(d, body=tuple(step for step in d.body if step.op is not op))

    def later(d: Any) -> Any:
        return replace(d, warm_up=(*d.warm_up, Instruction(Op.FORWARD, d.stages[0], 2)))

    for device, change, said in (
        (0, without(Op.STEP), "stage 0, in a stream of 1 samples, never makes update 0"),
        (1, without(Op.BACKWARD), "sends what is not yet made"),
        (1, without(Op.SEND), "deadlock in a stream of 1 samples: device 0: 0BW0 waits for message 0 on edge 1>0"),
        (2, without(Op.RECV), "2F3 uses message 3 of edge 1>2, never posted"),
        (0, later, "0F2 comes when the forward of sample 3 is due"),
    ):
        with pytest.raises(ProgramError, match=said):
            VerifyLearn(rule).apply(broken(good, device, change))
    narrow = replace(good, edges=tuple(replace(e, slots=1) if e.name == "0>1" else e for e in good.edges))
    with pytest.raises(ProgramError, match="overruns the ring: message 0 is still needed"):
        VerifyLearn(rule).apply(narrow)
    with pytest.raises(ProgramError, match="the rule says"):
        VerifyLearn(Rule(clock="lockstep")).apply(good)
