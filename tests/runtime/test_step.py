"""What generated training steps rely on: sums, seeds, losses, and what must not stay in a ring slot."""

from __future__ import annotations

import mmap
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from oracles.training import mixed
from pipecompile.errors import InputError
from pipecompile.ir.tree import Tree
from pipecompile.passes.stage_code import IMPORTS
from pipecompile.runtime import pickled
from pipecompile.runtime.batches import loss_weights, option, split_targets
from pipecompile.runtime.criterion import Criterion
from pipecompile.runtime.step import Sums, mask_seed


def in_a_slot(values: list[float]) -> torch.Tensor:
    view = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.float32, count=len(values))
    view.copy_(torch.tensor(values))
    return view


def test_a_sum_is_not_changed_by_the_next_message_in_the_slot() -> None:
    sums, message = Sums(), in_a_slot([1.0, 2.0])
    sums.add("w", message.view(2, 1))
    message.fill_(100.0)
    sums.add("w", torch.tensor([[1.0], [1.0]]))
    sums.add("v", None)
    assert sums.values["w"].flatten().tolist() == [2.0, 3.0]
    assert set(sums.values) == {"w"}


def test_a_sum_leaves_its_first_gradient_alone() -> None:
    sums, first = Sums(), torch.ones(2)
    for _ in range(3):
        sums.add("w", first)
    assert first.tolist() == [1.0, 1.0]
    assert sums.values["w"].tolist() == [3.0, 3.0]


def test_a_sum_given_away_begins_anew_and_is_zero_where_there_was_none() -> None:
    sums = Sums()
    sums.know("w", torch.ones(2))
    assert sums.take("w").tolist() == [0.0, 0.0]
    sums.add("w", torch.ones(2))
    assert sums.take("w").tolist() == [1.0, 1.0]
    assert sums.take("w").tolist() == [0.0, 0.0]


def test_generated_code_keeps_copies_of_what_lies_in_a_slot() -> None:
    namespace: dict[str, Any] = {}
    exec(IMPORTS, namespace)
    message, own = in_a_slot([1.0, 2.0]), torch.ones(2)
    kept = namespace["held"](message.view(2, 1))
    message.fill_(7.0)
    assert kept.flatten().tolist() == [1.0, 2.0]
    assert namespace["held"](own) is own
    assert namespace["held"](3) == 3


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 10**6), min_size=3, max_size=3))
def test_the_seed_of_a_mask_is_the_documented_one(seed: int, parts: list[int]) -> None:
    found = mask_seed(seed, *parts)
    assert found == mixed([seed, *parts])
    assert 0 <= found < 2**63


def test_seeds_of_masks_do_not_collide() -> None:
    seeds = {mask_seed(s, i, j, k) for s in range(3) for i in range(30) for j in range(8) for k in range(8)}
    assert len(seeds) == 3 * 30 * 8 * 8


def parts_of(targets: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    return list(targets.split(sizes))


@pytest.mark.parametrize(
    "loss_fn",
    [
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])),
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=0, label_smoothing=0.2),
        nn.CrossEntropyLoss(reduction="sum"),
        partial(F.cross_entropy, reduction="sum", ignore_index=2),
        partial(F.cross_entropy, ignore_index=2),
    ],
    ids=repr,
)
def test_the_weighted_losses_of_the_parts_are_the_loss_of_the_batch(loss_fn: Any) -> None:
    torch.manual_seed(0)
    result, targets, sizes = torch.randn(9, 3), torch.randint(3, (9,)), [4, 3, 2]
    weights = loss_weights(loss_fn, parts_of(targets, sizes), sizes, "auto")
    parts = zip(weights, result.split(sizes), targets.split(sizes), strict=True)
    assert float(sum(w * loss_fn(r, t) for w, r, t in parts)) == pytest.approx(float(loss_fn(result, targets)))


def test_a_count_of_ones_own_weighs_the_parts() -> None:
    targets = torch.tensor([[1, 0], [1, 1], [0, 1]])
    assert loss_weights(lambda r, t: r, parts_of(targets, [1, 2]), [1, 2], lambda t: float(t.sum())) == [0.25, 0.75]
    assert loss_weights(nn.MSELoss(), parts_of(targets, [1, 2]), [1, 2], "auto") == [1 / 3, 2 / 3]
    assert loss_weights(lambda r, t: r, parts_of(targets, [1, 2]), [1, 2], "sum") == [1.0, 1.0]
    assert option(partial(partial(F.cross_entropy, ignore_index=5), reduction="sum"), "ignore_index", None) == 5
    with pytest.raises(InputError, match="reduction 'none'"):
        loss_weights(nn.MSELoss(reduction="none"), parts_of(targets, [1, 2]), [1, 2], "auto")


def test_targets_are_split_in_their_nest() -> None:
    nest = {"a": torch.arange(5), "b": (torch.zeros(5, 2), None)}
    first, second = split_targets(nest, 5, 2)
    assert first["a"].tolist() == [0, 1, 2]
    assert second["b"][0].shape == (2, 2)
    assert second["b"][1] is None
    assert split_targets(None, 5, 2) == [None, None]
    with pytest.raises(InputError, match=r"target 1 has shape \(4, 2\), the batch 5 samples"):
        split_targets({"a": torch.arange(5), "b": torch.zeros(4, 2)}, 5, 2)


def test_a_loss_is_scaled_and_checked() -> None:
    criterion = Criterion(lambda result, target: (result - target).square().mean(), Tree("leaf"))
    criterion.targets, criterion.weights = [torch.zeros(2), torch.zeros(2)], [0.5, 0.0]
    result = torch.ones(2, requires_grad=True)
    assert float(criterion(0, (result,)).detach()) == 0.5
    assert float(criterion(1, (result,)).detach()) == 0.0
    with pytest.raises(InputError, match="depends on nothing that has gradients"):
        criterion(0, (result.detach(),))


def test_nests_travel_in_any_dtype() -> None:
    nest = {"x": torch.arange(6).view(2, 3).t(), "y": [torch.ones(2, dtype=torch.bfloat16), 3, None]}
    back = pickled.unpacked(pickled.packed(nest))
    assert torch.equal(back["x"], nest["x"])
    assert back["y"][0].dtype is torch.bfloat16
    assert back["y"][1:] == [3, None]
