"""``micro_batches="auto"``: which numbers are tried, and that the simulator's best within the limit is taken."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.errors import PipecompileWarning, PlanError, TraceError
from pipecompile.ir.training import StageCost
from pipecompile.passes.choose_step import Candidate, ChooseStep
from pipecompile.passes.part_counts import best_count, part_counts
from pipecompile.schedules.training import STEP_SCHEDULES
from test_choose_step import candidate


@pytest.mark.parametrize(
    ("batch", "devices", "wanted"),
    [
        (32, 2, [2, 4, 8, 16]),
        (64, 4, [4, 8, 16, 32]),
        (30, 2, [2, 5, 10, 15]),
        (12, 2, [2, 4, 6]),
        (37, 2, [2, 4, 8, 16]),  # prime: parts that differ by a sample
        (8, 4, [4]),
        (3, 2, [1]),
        (1, 2, [1]),
    ],
)
def test_the_numbers_that_are_tried(batch: int, devices: int, wanted: list[int]) -> None:
    found = part_counts(batch, devices)
    assert found == wanted
    assert all(count == 1 or batch // count >= 2 for count in found)


def split(count: int, fixed: float, each: float) -> list[Candidate]:
    """A batch of 16 in so many parts: ``fixed`` seconds a message of a stage, ``each`` a sample."""
    one = fixed + each * 16 / count
    cost = StageCost(one, one, one, 2 * one, 0.0, 1600 // count)
    return [candidate(name, count, cost) for name in STEP_SCHEDULES]


@pytest.mark.parametrize(("fixed", "wanted"), [(0.0, 16), (0.5, 2)])
def test_many_small_parts_or_few_large_ones(fixed: float, wanted: int) -> None:
    counts = [2, 4, 8, 16]
    chosen, (note,) = best_count(counts, lambda i: split(counts[i], fixed, 0.1), ChooseStep())
    every = [c for count in counts for c in split(count, fixed, 0.1)]
    assert chosen.seconds == min(c.seconds for c in every)
    assert chosen.program.micro_batches == wanted
    assert all(f"{count}: " in note for count in counts)


def test_the_limit_counts_over_all_numbers_and_what_fails_is_told() -> None:
    counts = [2, 4, 8]

    def tried(i: int) -> list[Candidate]:
        if counts[i] == 8:
            raise TraceError("sizes are baked")
        return split(counts[i], 0.5, 0.1)

    free, _ = best_count(counts, tried, ChooseStep())
    assert free.program.micro_batches == 2
    limit = min(c.memory for c in split(2, 0.5, 0.1)) - 1
    tight, (note,) = best_count(counts, tried, ChooseStep(limit))
    assert tight.program.micro_batches == 4
    assert tight.memory <= limit
    assert f"within {limit:,} bytes" in note
    assert "8: sizes are baked" in note
    with pytest.raises(PlanError, match="no schedule keeps"):
        best_count(counts, tried, ChooseStep(10))

    def never(i: int) -> list[Candidate]:
        raise TraceError(f"no {counts[i]}")

    with pytest.raises(TraceError, match="no 2"):
        best_count(counts, never, ChooseStep())


def test_a_pipeline_that_chose_trains_as_plain_pytorch_does() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    x, y = torch.randn(12, 6).double(), torch.randint(3, (12,))
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    before = nn.functional.cross_entropy(model(x), y)
    (wanted,) = torch.autograd.grad(before, [model[0].weight])
    start = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        pipe = pipecompile.compile(
            model, (x,), mode="train", micro_batches="auto", schedule="1f1b", loss_fn=nn.CrossEntropyLoss(), optimizer=sgd,
            executor="inline", profile_seconds=0.02,
        )  # fmt: skip
    with pipe:
        assert pipe.micro_batches in (2, 4, 6)
        assert f"micro_batches='auto' took {pipe.micro_batches} (1f1b" in pipe.plan.notes[-1]
        assert float(pipe.train_step(x, y)) == pytest.approx(before.item(), rel=1e-12)
    assert torch.allclose(model[0].weight, start - 0.1 * wanted, rtol=1e-10)
