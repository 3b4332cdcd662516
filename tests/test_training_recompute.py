"""Activation recomputation: the same numbers, masks and statistics, less memory, exactly one forward more."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.training import TRAINING
from oracles.training import pieces_of
from pipecompile.errors import PlanError
from pipecompile.ir.program import HOST, Op
from pipecompile.ir.training import kept_at_once, waiting_at_once
from pipecompile.passes.choose_step import Candidate
from pipecompile.schedules.recompute import recompute, recomputed
from pipecompile.schedules.training import STEP_SCHEDULES
from pipecompile.simulate.step import step_table, step_ticks
from test_training import ADAMW, PARTS, SCHEDULES, SGD, agree, compiled, every_layer_alike, reference
from test_training_drop_in import agree as drop_in_agrees
from test_training_drop_in import dropped_in, eager

__all__ = ["every_layer_alike"]  # the fixture, for this file too

QUICK = ["resnet", "dropout", "statistics", "gpt2", "lstm", "two_heads"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=[] if i < 6 and i % 6 == j else pytest.mark.slow)
        for i, name in enumerate([*QUICK, *sorted(set(TRAINING) - set(QUICK))])
        for j, schedule in enumerate(SCHEDULES)
    ],
)
def test_a_second_forward_changes_no_number(name: str, schedule: str) -> None:
    job, wanted = TRAINING[name].make(), reference(TRAINING[name].make(), ADAMW)
    with compiled(job, 3 if STEP_SCHEDULES[schedule].chunks == 1 else 2, schedule, ADAMW, recompute="stage") as pipe:
        assert recomputed(pipe.program)
        agree(pipe, job, wanted, 1e-10)


def test_in_workers_and_in_a_graph_of_the_caller() -> None:
    job, wanted = TRAINING["resnet"].make(), reference(TRAINING["resnet"].make(), SGD)
    with compiled(job, 2, "gpipe", SGD, recompute="stage", executor="process") as pipe:
        agree(pipe, job, wanted, 1e-10)
    again, plain = TRAINING["dropout"].make(), eager(TRAINING["dropout"].make(), SGD)
    with dropped_in(again, 2, "gpipe", recompute="stage") as pipe:
        assert recomputed(pipe.program) == {0, 1}
        drop_in_agrees(pipe, again, SGD, plain)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb_v"])
def test_every_stage_but_the_last_computes_one_forward_more(schedule: str) -> None:
    job = TRAINING["unet"].make()
    eager_model = copy.deepcopy(job.model)
    with FlopCounterMode(display=False) as once, torch.no_grad():
        for piece in pieces_of(job.inputs, PARTS):
            eager_model(*piece)
    with FlopCounterMode(display=False) as plain:
        for piece, target in zip(pieces_of(job.inputs, PARTS), pieces_of(job.targets, PARTS), strict=True):
            job.loss_fn(eager_model(*piece), target).backward()
    with compiled(job, 2, schedule, SGD, recompute="stage") as pipe, FlopCounterMode(display=False) as counted:
        pipe.train_step(job.inputs, job.targets)
    more = counted.get_total_flops() - plain.get_total_flops()
    assert 0 < more < once.get_total_flops()  # the loss's stage computes its forward once


class Held:
    """Bytes that autograd holds at a time, and their peak."""

    now = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.nbytes = tensor, tensor.nbytes
        Held.now += self.nbytes
        Held.peak = max(Held.peak, Held.now)

    def __del__(self) -> None:
        Held.now -= self.nbytes


def peak_of(schedule: str, recompute: Any) -> int:
    job = TRAINING["resnet"].make()
    with compiled(job, 2, schedule, SGD, recompute=recompute) as pipe:
        Held.now = Held.peak = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            pipe.train_step(job.inputs, job.targets)
        assert Held.now == 0
    return Held.peak


def test_autograd_holds_one_micro_batch_a_stage() -> None:
    whole, again = peak_of("gpipe", "none"), peak_of("gpipe", "stage")
    assert again <= 1.2 * whole / PARTS


def test_auto_recomputes_as_few_stages_as_the_limit_asks_for() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "gpipe", SGD) as pipe:
        sizes, stashes = [c.kept for c in pipe.costs], [c.stash for c in pipe.costs]
        most, least = (
            max(kept_at_once(pipe.program, sizes)),
            kept_at_once(recompute(pipe.program, [0], 1), sizes, stashes),
        )
        waiting = max(waiting_at_once(pipe.program))
    with compiled(job, 2, "gpipe", SGD, recompute="auto", memory_limit=int(most) + waiting) as pipe:
        assert not recomputed(pipe.program)
    limit = int(least[0]) + 1000  # room for what waits
    assert limit < most
    with compiled(job, 2, "gpipe", SGD, recompute="auto", memory_limit=limit) as pipe:
        assert recomputed(pipe.program) == {0}
        assert max(kept_at_once(pipe.program, [c.kept for c in pipe.costs], [c.stash for c in pipe.costs])) <= limit
        wanted = reference(TRAINING["mlp"].make(), SGD)
        agree(pipe, job, wanted, 1e-10)
    with pytest.raises(PlanError, match=r"no schedule keeps its activations within memory_limit=10 bytes"):
        compiled(job, 2, "auto", SGD, recompute="auto", memory_limit=10)
    with pytest.raises(PlanError, match="recompute='auto' recomputes as little as memory_limit= allows"):
        compiled(job, 2, "gpipe", SGD, recompute="auto")
    with pytest.raises(PlanError, match="recompute='sometimes': choose 'none', 'stage' or 'auto'"):
        compiled(job, 2, "gpipe", SGD, recompute="sometimes")


def test_inputs_that_wait_for_their_forward_count_as_memory() -> None:
    """Under gpipe the stage with the loss begins nothing before its backward, and all it is to work on waits."""
    with compiled(TRAINING["resnet"].make(), 2, "gpipe", SGD, recompute="stage") as pipe:
        into = [edge for edge in pipe.program.edges if edge.target == 1 and edge.source in (HOST, 0)]
        rings = sum(edge.slots * edge.nbytes for edge in into)
        assert min(edge.slots for edge in into) > 1
        need = Candidate("gpipe", pipe.plan, pipe.program, pipe.costs).memory
        one = pipe.costs[1].kept  # of the micro-batch under way; what came in of it lies in a ring as well
        assert need >= rings + one - sum(edge.nbytes for edge in into)
    limits: list[Any] = [need, need - 1]
    compiled(TRAINING["resnet"].make(), 2, "gpipe", SGD, recompute="stage", memory_limit=limits[0]).close()
    with pytest.raises(PlanError, match=f"within memory_limit={limits[1]:,} bytes a device; they need: gpipe {need:,}"):
        compiled(TRAINING["resnet"].make(), 2, "gpipe", SGD, recompute="stage", memory_limit=limits[1])


def test_the_clock_table_of_the_comment() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD, 4) as pipe:
        order = STEP_SCHEDULES["1f1b"].order(pipe.plan, 3)
    program = recompute(order, [0, 1], 1)
    assert step_table(step_ticks(program)).splitlines() == [
        "dev 0 0F0 0F1 0R0   . 0B0   ~ 0F2 0R1 0B1   ~ 0R2 0B2   ~",
        "dev 1   . 1F0 1B0   ~ 1F1 1B1   ~ 1F2 1B2   ~   .   .   .",
    ]
    assert [step.op for step in program.devices[1].warm_up[:2]] == [Op.FORWARD, Op.BACKWARD]
