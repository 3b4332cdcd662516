"""Batches that are smaller than the example, the last of an epoch say: they make fewer micro-batches, exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

import pipecompile
from models.training import TRAINING, Job
from oracles.training import Masks, Run, pieces_of
from pipecompile.errors import InputError, StepError, TraceError
from test_training import ADAMW, OPTIMIZERS, SCHEDULES, SGD, compiled, every_layer_alike, furthest, loss_shares
from test_training_drop_in import call, dropped_in

__all__ = ["every_layer_alike"]  # the fixture, for this file too

#: Samples of a batch -> micro-batches, for an example of 8 in 4: no more than two samples each.
PARTS_OF = {8: 4, 7: 4, 6: 3, 5: 3, 4: 2, 3: 2, 2: 1, 1: 1}
BATCHES = (8, 5, 8, 3, 6, 8)
#: For models with a BatchNorm of features, which plain PyTorch refuses to train with one sample, or a 2 in a view.
OF_TWO = (8, 4, 8, 2, 6, 8)


def cut(job: Job, size: int, skip: int = 0) -> Job:
    def some(nest: Any) -> Any:
        if isinstance(nest, dict):
            return {key: some(value) for key, value in nest.items()}
        return tuple(map(some, nest)) if isinstance(nest, tuple) else nest[skip : skip + size]

    return Job(job.model, some(job.inputs), some(job.targets), job.loss_fn)


def plain(job: Job, optimizer: Any, batches: tuple[int, ...] = BATCHES) -> Run:
    """One step a batch in plain PyTorch, micro-batch by micro-batch."""
    run, update = Run(job.model), optimizer([p for p in job.model.parameters() if p.requires_grad])
    for step, size in enumerate(batches):
        update.zero_grad()
        batch, parts, total = cut(job, size), PARTS_OF[size], 0.0
        shares = loss_shares(batch, parts)
        for i, (piece, target) in enumerate(
            zip(pieces_of(batch.inputs, parts), pieces_of(batch.targets, parts), strict=True)
        ):
            if shares[i] == 0.0:  # every target ignored: a mean over nothing
                continue
            with Masks(0, step, i), torch.random.fork_rng(devices=[]):
                loss = job.loss_fn(call(job.model, piece), target) * shares[i]
            loss.backward()
            total += loss.item()
        update.step()
        run.losses.append(total)
    run.gradients = {name: p.grad.clone() for name, p in job.model.named_parameters() if p.grad is not None}
    return run


def steps(pipe: Any, job: Job, batches: tuple[int, ...] = BATCHES) -> list[float]:
    found: list[float] = []
    for size in batches:
        batch = cut(job, size)
        found.append(float(pipe.train_step(batch.inputs, batch.targets)))
    return found


def check(name: str, schedule: str, stages: int, optimizer: Any, **more: Any) -> None:
    job = TRAINING[name].make()
    with compiled(job, stages, schedule, optimizer, dynamic_batch=True, **more) as pipe:
        least, _ = pipe.step_package.sizes
        batches = {1: BATCHES, 2: OF_TWO}[least]
        normed = any(isinstance(module, nn.BatchNorm1d) for module in job.model.modules())
        assert least == 1 or normed or name == "handed_through"
        wanted = plain(TRAINING[name].make(), optimizer, batches)
        losses = steps(pipe, job, batches)
        assert losses == pytest.approx(wanted.losses, rel=1e-10, abs=1e-10 * abs(wanted.losses[0]))
        assert furthest(pipe.gradients(), wanted.gradients) <= 1e-10
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10


QUICK = [
    ("mlp", "zb_v", 2, "inline"),
    ("resnet", "zb_h1", 3, "inline"),
    ("unet", "interleaved", 2, "inline"),
    ("dropout", "breadth_first", 2, "process"),
]


@pytest.mark.parametrize(("name", "schedule", "stages", "executor"), QUICK)
def test_smaller_batches_equal_plain_pytorch(name: str, schedule: str, stages: int, executor: str) -> None:
    check(name, schedule, stages, SGD, executor=executor)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", TRAINING)
def test_smaller_batches_equal_plain_pytorch_everywhere(name: str, schedule: str, stages: int, optimizer: str) -> None:
    check(name, schedule, stages, OPTIMIZERS[optimizer])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "i"), [(name, i) for i, name in enumerate(TRAINING)])
def test_smaller_batches_in_workers_equal_plain_pytorch_everywhere(name: str, i: int) -> None:
    check(name, SCHEDULES[i % 6], 2 + i % 2, SGD, executor="process", recompute="stage" if i % 3 == 0 else "none")


def test_the_last_batch_of_an_epoch_may_have_one_sample() -> None:
    """Export takes a size of 1 for a constant of its own; there the graph was compared with eager."""
    job, wanted = TRAINING["mlp"].make(), plain(TRAINING["mlp"].make(), ADAMW, (8, 1, 7, 8))
    with compiled(job, 2, "1f1b", ADAMW, dynamic_batch=True) as pipe:
        assert steps(pipe, job, (8, 1, 7, 8)) == pytest.approx(wanted.losses, rel=1e-10)
    single = TRAINING["mlp"].make()
    with compiled(single, 2, "1f1b", SGD, parts=8, dynamic_batch=True) as pipe:  # one sample each: nothing differs
        assert not pipe.package.symbols
        for size in (8, 3, 1):
            assert float(pipe.train_step(single.inputs[0][:size], single.targets[:size])) > 0.0


def test_an_uneven_batch_with_a_micro_batch_of_one() -> None:
    """8 samples in 5 micro-batches: two, two, two, one, one; without dynamic_batch."""
    job = TRAINING["mlp"].make()
    eager = TRAINING["mlp"].make()
    update = SGD(list(eager.model.parameters()))
    with compiled(job, 2, "gpipe", SGD, parts=5) as pipe:
        for size in (8, 4, 8):
            update.zero_grad()
            whole = eager.loss_fn(eager.model(eager.inputs[0][:size]), eager.targets[:size])
            whole.backward()
            update.step()
            assert float(pipe.train_step(job.inputs[0][:size], job.targets[:size])) == pytest.approx(whole.item())
        assert furthest(dict(job.model.state_dict()), dict(eager.model.state_dict())) <= 1e-10


def test_a_saved_pipeline_takes_smaller_batches(tmp_path: Path) -> None:
    job = TRAINING["lstm"].make()
    with compiled(job, 2, "zb_h1", ADAMW, dynamic_batch=True) as pipe:
        steps(pipe, job, (8, 3))
        pipe.save(tmp_path / "run.pipe")
        wanted = steps(pipe, job, (5, 8, 1))
    with pipecompile.load(
        tmp_path / "run.pipe", mode="train", loss_fn=job.loss_fn, optimizer=ADAMW, executor="inline"
    ) as again:
        assert steps(again, job, (5, 8, 1)) == wanted


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_smaller_batches_in_autograd(executor: str) -> None:
    """Also where a call is given up before its backward, and the model in this process evaluates any size."""
    job, eager = TRAINING["resnet"].make(), TRAINING["resnet"].make()
    updates = [SGD(list(one.model.parameters())) for one in (job, eager)]
    with dropped_in(job, 2, "gpipe", dynamic_batch=True, executor=executor) as pipe:
        for size in (8, 3, 5, 8):
            batch = cut(job, size)
            parts = [eager.model(*piece) for piece in pieces_of(batch.inputs, PARTS_OF[size])]
            wanted = eager.loss_fn(tree_map(lambda *leaves: torch.cat(leaves), *parts), batch.targets)
            loss = job.loss_fn(pipe(*batch.inputs), batch.targets)
            assert float(loss.detach()) == pytest.approx(wanted.item(), rel=1e-10)
            for update, value in zip(updates, (loss, wanted), strict=True):
                update.zero_grad()
                value.backward()
                update.step()
        pipe.eval()
        assert len(pipe(torch.cat([job.inputs[0]] * 3))) == 24
        pipe.train()
        pipe(*cut(job, 3).inputs)
        pipe(*cut(job, 5).inputs).sum().backward()


def test_a_step_of_a_small_batch_that_fails_is_taken_back() -> None:
    job, wanted = TRAINING["mlp"].make(), plain(TRAINING["mlp"].make(), SGD, (8, 5, 8))
    for executor in ("inline", "process"):
        job = TRAINING["mlp"].make()
        with compiled(job, 2, "1f1b", SGD, dynamic_batch=True, executor=executor) as pipe:
            losses = steps(pipe, job, (8,))
            for size in (3, 5):
                bad = job.targets[:size].clone()
                bad[-1] = 99
                with pytest.raises(StepError, match="stage 1 on device 1 raised IndexError"):
                    pipe.train_step(job.inputs[0][:size], bad)
            assert [*losses, *steps(pipe, job, (5, 8))] == pytest.approx(wanted.losses, rel=1e-10)


class Sized(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.how = how

    def forward(self, parts: torch.Tensor) -> torch.Tensor:  # a name that generated code uses itself
        y = self.norm(self.first(parts)) if self.how == "norm" else self.first(parts)
        if self.how == "odd" and parts.shape[0] % 2 == 0:
            y = y * 2
        if self.how == "fixed":
            y = y.reshape(4, -1, 6).flatten(0, 1)
        return self.last(y)


def sized(how: str, batch: int = 8, parts: int = 2, **more: Any) -> Any:
    job = Job(Sized(how), (torch.randn(batch, 6),), torch.arange(batch) % 3, nn.CrossEntropyLoss())
    return compiled(job, 2, "1f1b", SGD, parts=parts, **{"dynamic_batch": True, **more})


def test_a_model_for_certain_sizes_is_refused_by_name() -> None:
    with pytest.raises(TraceError, match=r"micro-batches of 4 samples only.*\n  reason: .*% 2 == 0") as caught:
        sized("odd")
    assert "no dynamic_batch=True" in str(caught.value)
    with pytest.raises(TraceError, match=r"a constant of the size of 'parts' in dimension 0"):
        sized("fixed")
    with sized("fixed", dynamic_batch=False) as pipe:
        assert pipe.step_package.sizes == (4, 4)
    with pytest.raises(TraceError, match=r"2 samples only, and 1 must be possible.*\n  reason: .*more than 1 value"):
        sized("norm", batch=7, parts=4, dynamic_batch=False)


def test_a_batch_that_cannot_be_split_is_named() -> None:
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    with sized("norm", parts=4) as pipe:  # of two samples each, which BatchNorm needs
        assert float(pipe.train_step(x[:6], y[:6])) > 0.0
        for size in (7, 1):
            with pytest.raises(
                InputError, match=rf"a batch of {size} samples cannot be split into micro-batches of 2 samples"
            ):
                pipe.train_step(x[:size], y[:size])
        for size in (0, 9):
            with pytest.raises(InputError, match=f"a batch of {size} samples, compiled for 1 to 8"):
                pipe.train_step(x[:size], y[:size])
        with pytest.raises(InputError, match="the target has shape"):
            pipe.train_step(x[:6], y[:4])
    with sized("norm", dynamic_batch=False) as pipe, pytest.raises(InputError, match="compile with dynamic_batch=True"):
        pipe.train_step(x[:6], y[:6])


def test_a_smaller_step_accumulates_and_is_clipped_like_a_whole_one() -> None:
    job, eager = TRAINING["mlp"].make(), TRAINING["mlp"].make()
    update = partial(torch.optim.SGD, lr=0.05)(list(eager.model.parameters()))
    with compiled(job, 2, "zb_v", partial(torch.optim.SGD, lr=0.05), dynamic_batch=True, clip_norm=0.1) as pipe:
        for size, last in ((8, False), (3, True)):
            eager.loss_fn(eager.model(eager.inputs[0][:size]), eager.targets[:size]).backward()
            pipe.train_step(job.inputs[0][:size], job.targets[:size], update=last)
        nn.utils.clip_grad_norm_(eager.model.parameters(), 0.1)
        update.step()
        assert furthest(dict(job.model.state_dict()), dict(eager.model.state_dict())) <= 1e-10
