"""Measured stage costs and the choice of a schedule."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hand_made
import pipecompile
from models.training import TRAINING
from test_lower_step import chain, placed
from pipecompile.errors import PipecompileWarning, PlanError
from pipecompile.ir.training import Gradients, StageCost
from pipecompile.passes.choose_step import Candidate, ChooseStep
from pipecompile.passes.lower_step import LowerStep
from pipecompile.schedules.training import STEP_SCHEDULES

SGD = partial(torch.optim.SGD, lr=0.1)


def candidate(name: str, micro_batches: int, cost: StageCost) -> Candidate:
    """A chain of two devices; ``cost`` is that of half a model, split further where a device has two stages."""
    chunks = STEP_SCHEDULES[name].chunks
    stages = 2 * chunks
    plan = placed(name, 2, stages)
    values, weights = {f"v{i}" for i in range(stages)}, {f"w{i}": hand_made.spec() for i in range(stages)}
    order = STEP_SCHEDULES[name].order(plan, micro_batches)
    program = LowerStep().apply(chain(stages), plan, order, Gradients(frozenset(values), weights))
    numbers = (cost.forward, cost.backward_input, cost.backward_weight, cost.backward, cost.update)
    part = StageCost(*(n / chunks for n in numbers), kept=cost.kept // chunks)
    return Candidate(name, plan, program, (part,) * stages)


EVEN = StageCost(1.0, 1.0, 1.0, 2.0, 0.0, 1000)
#: A backward that does not like to be split, as a small perceptron's.
COSTLY = StageCost(1.0, 1.5, 1.5, 2.0, 0.0, 1000)


def test_the_fastest_by_simulation_is_taken() -> None:
    every = [candidate(name, 4, EVEN) for name in STEP_SCHEDULES]
    assert ChooseStep().apply(every).name == "zb_v"
    costly = [candidate(name, 4, COSTLY) for name in STEP_SCHEDULES]
    assert ChooseStep().apply(costly).name in ("interleaved", "breadth_first")  # splitting costs more than it gains
    chosen = ChooseStep().apply(costly)
    assert chosen.seconds == min(c.seconds for c in costly)


def test_a_memory_limit_leaves_out_what_keeps_too_much() -> None:
    every = [candidate(name, 8, EVEN) for name in STEP_SCHEDULES]
    needs = {c.name: c.memory for c in every}
    assert needs["gpipe"] == needs["breadth_first"] == 8000
    ahead = hand_made.spec().nbytes  # one more message may have come
    assert needs["1f1b"] == 2000 + ahead
    assert all(2000 <= needs[name] <= 2000 + 4 * ahead for name in ("zb_h1", "zb_v"))
    assert ChooseStep(needs["zb_v"]).apply(every).name == "zb_v"
    with pytest.raises(PlanError, match=rf"within memory_limit=1,999 bytes a device; they need: .*1f1b {2000 + ahead:,}"):
        ChooseStep(1999).apply(every)


def test_a_refusal_names_a_handful_and_their_micro_batches() -> None:
    every = [candidate(name, count, EVEN) for name in STEP_SCHEDULES for count in (4, 8)]
    least = min(c.memory for c in every if c.name == "1f1b")
    with pytest.raises(PlanError, match=r"they need: .*, 6 others more\. Use more") as refused:
        ChooseStep(10).apply(every)
    said = str(refused.value)
    assert f"1f1b (4 micro-batches) {least:,}" in said
    assert said.count("micro-batches)") == 6


def test_beside_others_a_stage_takes_longer_for_as_long_as_they_are_busy() -> None:
    """By hand: 1F1B with two stages and four micro-batches is 15 units of time long, of which 12 are work."""
    found = candidate("1f1b", 4, EVEN)
    slowed = found.slowed({0: 1.5, 1: 1.0})
    assert [cost.forward for cost in slowed.costs] == pytest.approx([1 + 0.5 * 12 / 15, 1.0], rel=1e-4)
    assert [cost.backward for cost in slowed.costs] == pytest.approx([2 + 1.0 * 12 / 15, 2.0], rel=1e-4)
    assert slowed.costs[0].kept == EVEN.kept
    assert [stage.alone for stage in slowed.plan.stages] == [3.0, 3.0]
    assert [stage.measured for stage in slowed.plan.stages] == pytest.approx([3 * 1.4, 3.0], rel=1e-4)
    assert slowed.seconds > found.seconds
    updating = found.costing([dataclasses.replace(cost, update=0.8) for cost in found.costs])
    assert [stage.measured for stage in updating.plan.stages] == pytest.approx([3.2, 3.2])  # a fourth of it each
    assert updating.seconds == pytest.approx(found.seconds + 0.8)


def compiled(job: Any, **more: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        return pipecompile.compile(
            job.model, job.inputs, mode="train", loss_fn=job.loss_fn, optimizer=SGD, executor="inline",
            profile_seconds=0.05, example_targets=job.targets, **more,
        )  # fmt: skip


def test_costs_are_measured_and_the_step_simulated_from_them() -> None:
    job = TRAINING["resnet"].make()
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    with compiled(job, schedule="zb_h1") as pipe:
        assert all(torch.equal(value, before[name]) for name, value in job.model.state_dict().items())
        costs = pipe.costs
        assert len(costs) == len(pipe.plan.stages)
        for cost in costs:
            assert cost.forward > 0
            assert cost.backward_input + cost.backward_weight > 0
            assert cost.update > 0
        timeline = pipe.simulate()
        assert timeline.finishes[0] >= max(4 * (c.forward + c.backward_input + c.backward_weight) for c in costs)


def test_what_is_kept_is_counted_from_what_autograd_saves() -> None:
    """By hand: a linear layer keeps its input, tanh its result, and the loss what it needs."""
    model = nn.Sequential(*itertools.chain.from_iterable((nn.Linear(64, 64), nn.Tanh()) for _ in range(4)))
    x = torch.randn(32, 64)
    pipe: Any = pipecompile.compile(
        model, (x,), mode="train", loss_fn=nn.MSELoss(), optimizer=SGD, schedule="1f1b", micro_batches=2,
        executor="inline", profile_seconds=0.05, example_targets=x,
    )  # fmt: skip
    with pipe:
        one = 16 * 64 * 4  # bytes of an activation of one micro-batch
        layers = [len(stage.layers) for stage in pipe.plan.stages]
        assert sum(layers) == 8
        # each Linear-Tanh pair keeps the linear's input and the tanh's output, which is the next input
        for stage, cost in zip(pipe.plan.stages, pipe.costs, strict=True):
            assert one <= cost.kept <= (len(stage.layers) + 4) * one
    with compiled(TRAINING["mlp"].make(), schedule="auto") as pipe:
        assert pipe.program.schedule in STEP_SCHEDULES
    with pytest.raises(PlanError, match="memory_limit=10 bytes"):
        compiled(TRAINING["mlp"].make(), schedule="auto", memory_limit=10)


def test_options_of_the_other_mode_are_refused() -> None:
    job = TRAINING["mlp"].make()
    with pytest.raises(pipecompile.InputError, match="loss_fn: only mode='train' or mode='learn' takes that"):
        pipecompile.compile(job.model, job.inputs, loss_fn=job.loss_fn)  # type: ignore[call-overload]
    with pytest.raises(PlanError, match="mode='fly' is not available: choose 'infer'"):
        pipecompile.compile(job.model, job.inputs, mode="fly")  # type: ignore[call-overload]
    with pytest.raises(pipecompile.InputError, match="dynamic_shapes: only mode='infer' takes that, this is mode='train'"):
        compiled(job, dynamic_shapes=({0: 2},))
