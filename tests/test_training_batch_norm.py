"""Deferred BatchNorm: running statistics once a step, of the whole batch, as a plain BatchNorm would have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.training import BATCH, Job
from oracles.training import pieces_of
from pipecompile.runtime.batch_norm import BatchStatistics
from test_training import PARTS, SGD, compiled, every_layer_alike

__all__ = ["every_layer_alike"]  # the fixture, for this file too


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=5), st.integers(0, 10**6))
def test_statistics_of_parts_are_those_of_the_whole(sizes: list[int], seed: int) -> None:
    values = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5 + 2
    parts = [BatchStatistics(len(p), p.mean(0), p.var(0)) for p in values.split(sizes)]
    found = BatchStatistics.of(parts)
    assert torch.allclose(found.mean, values.mean(0), rtol=1e-12)
    assert torch.allclose(found.var, values.var(0), rtol=1e-12)
    assert found.count == len(values)


def normed() -> Job:
    """Two BatchNorms, of images and of vectors, one of them used twice."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn1 = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3, momentum=0.3)
            self.fc, self.bn2, self.out = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn1(self.conv(x))).mean((2, 3))
            x = self.bn2(self.fc(x))
            return self.out(torch.tanh(self.bn2(x * 0.5 + 1)))

    model = Net().double().train()
    x = torch.randn(BATCH, 2, 6, 6, dtype=torch.float64) + torch.arange(BATCH).double()[:, None, None, None]
    return Job(model, (x,), torch.randint(4, (BATCH,)), nn.CrossEntropyLoss())


def running(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def by_hand(job: Job, steps: int) -> dict[str, torch.Tensor]:
    """What each BatchNorm saw in all micro-batches, put together, through a plain BatchNorm of its own."""
    model: Any = job.model
    update = SGD(list(model.parameters()))
    kept = {name: (nn.BatchNorm2d if name == "bn1" else nn.BatchNorm1d)(len(m.bias), momentum=m.momentum).double()
            for name, m in model.named_children() if name.startswith("bn")}  # fmt: skip
    seen: list[tuple[str, torch.Tensor]] = []
    for name in kept:
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen.append((name, args[0])))
    for _ in range(steps):
        update.zero_grad()
        calls: dict[tuple[str, int], list[torch.Tensor]] = {}
        for x, y in zip(pieces_of(job.inputs[0], PARTS), pieces_of(job.targets, PARTS), strict=True):
            seen.clear()
            (job.loss_fn(model(x), y) * len(y) / BATCH).backward()
            for i, (name, value) in enumerate(seen):
                calls.setdefault((name, i), []).append(value.detach())
        for (name, _), values in sorted(calls.items(), key=lambda call: call[0][1]):
            kept[name](torch.cat(values))
        update.step()
    return {f"{name}.{key}": value for name, norm in kept.items() for key, value in norm.named_buffers()}


@pytest.mark.parametrize(
    ("schedule", "more"),
    [("1f1b", {}), ("zb_v", {}), ("gpipe", {"recompute": "stage"}), ("breadth_first", {"executor": "process"})],
)
def test_running_statistics_are_of_the_whole_batch(schedule: str, more: dict[str, Any]) -> None:
    job, wanted = normed(), by_hand(normed(), 3)
    with compiled(job, 2, schedule, SGD, deferred_batch_norm=True, **more) as pipe:
        for _ in range(3):
            pipe.train_step(job.inputs, job.targets)
    found = running(job.model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-10), name
    assert int(found["bn2.num_batches_tracked"]) == 6  # used twice a step


def test_normalisation_itself_stays_per_micro_batch() -> None:
    losses: list[list[float]] = []
    for deferred in (False, True):
        job = normed()
        with compiled(job, 2, "1f1b", SGD, deferred_batch_norm=deferred) as pipe:
            losses.append([float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)])
    assert losses[0] == losses[1]
