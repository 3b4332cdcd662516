"""Equal pipelines that share a batch: what they compute together is what plain PyTorch does with its micro-batches."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
import test_training_drop_in as drop_in
from models.training import TRAINING, Job, Training
from pipecompile.errors import InputError, NonFiniteError, PlanError, StepError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.program import Op, Program
from pipecompile.passes.verify_step import VerifyStep
from test_training import ADAMW, CASES, OPTIMIZERS, SCHEDULES, SGD, STEPS, agree, compiled, furthest, reference
from test_training import every_layer_alike as every_layer_alike

#: Models that write to buffers cannot have copies.
WRITING = {"resnet", "frozen", "statistics"}
FREE = [case for case in CASES if case.name not in WRITING]
QUICK = [(case, SCHEDULES[i % 6], 2 * (1 + i % 2), 2, "sgd" if i % 4 < 2 else "adamw") for i, case in enumerate(FREE)][
    ::2
]
EVERYTHING = [
    (case, schedule, devices, shared, optimizer)
    for case, schedule, (devices, shared), optimizer in product(FREE, SCHEDULES, [(2, 2), (4, 2), (4, 4)], OPTIMIZERS)
    if (case, schedule, devices, shared, optimizer) not in QUICK
]


def check(case: Training, schedule: str, devices: int, shared: int, optimizer: str, executor: str) -> None:
    job, wanted = case.make(), reference(case.make(), OPTIMIZERS[optimizer])
    more: dict[str, Any] = {"data_parallel": shared, "executor": executor}
    with compiled(job, devices, schedule, OPTIMIZERS[optimizer], **more) as pipe:
        assert pipe.plan.data_parallel == pipe.program.data_parallel == shared
        assert pipe.micro_batches == 4
        agree(pipe, job, wanted, 1e-10)


@pytest.mark.parametrize(("case", "schedule", "devices", "shared", "optimizer"), QUICK, ids=str)
def test_pipelines_together_equal_plain_pytorch(
    case: Training, schedule: str, devices: int, shared: int, optimizer: str
) -> None:
    check(case, schedule, devices, shared, optimizer, "inline")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "schedule", "devices", "shared", "optimizer"), EVERYTHING, ids=str)
def test_pipelines_together_equal_plain_pytorch_everywhere(
    case: Training, schedule: str, devices: int, shared: int, optimizer: str
) -> None:
    check(case, schedule, devices, shared, optimizer, "inline")


@pytest.mark.parametrize(("name", "schedule", "devices"), [("dropout", "zb_h1", 4)])
def test_pipelines_in_workers_equal_plain_pytorch(name: str, schedule: str, devices: int) -> None:
    check(TRAINING[name], schedule, devices, 2, "adamw", "process")


@pytest.mark.slow
@pytest.mark.parametrize("case", FREE, ids=str)
def test_pipelines_in_workers_equal_plain_pytorch_everywhere(case: Training) -> None:
    check(case, SCHEDULES[len(case.name) % 6], 2, 2, "sgd", "process")


@pytest.mark.parametrize(
    ("name", "schedule", "devices", "executor"),
    [("two_heads", "gpipe", 2, "inline"), ("gpt2", "breadth_first", 4, "inline"), ("dropout", "gpipe", 2, "process")],
)
def test_pipelines_with_the_callers_own_loss(name: str, schedule: str, devices: int, executor: str) -> None:
    job, wanted = TRAINING[name].make(), drop_in.eager(TRAINING[name].make(), ADAMW)
    with drop_in.dropped_in(job, devices, schedule, data_parallel=2, executor=executor) as pipe:
        drop_in.agree(pipe, job, ADAMW, wanted)


def test_every_weight_has_one_owner_and_the_owners_about_as_much() -> None:
    job = TRAINING["gpt2"].make()
    with compiled(job, 4, "1f1b", SGD, data_parallel=2) as pipe:
        owned = pipe._step.owned  # pyright: ignore[reportPrivateUsage]
        names = [name for own in owned.values() for name in own]
        assert len(names) == len(set(names)) == sum(1 for _ in job.model.parameters())
        nbytes = {entry.name: entry.nbytes for entry in pipe.package.state}
        first, second = (sum(nbytes[n] for stage in half for n in owned.get(stage, ())) for half in ((0, 1), (2, 3)))
        assert abs(first - second) <= max(nbytes[name] for name in names)
        for device in pipe.program.devices:  # all that others give is added before any update
            ops = [step.op for step in device.warm_up]
            assert ops.index(Op.STEP) > max(i for i, op in enumerate(ops) if op is Op.REDUCE)
        VerifyStep().apply(Program.from_json(pipe.program.to_json()))
        assert Program.from_json(pipe.program.to_json()) == pipe.program
        assert "2 pipelines of 2 stages" in pipe.plan.shape


def test_smaller_batches_clipping_and_accumulation() -> None:
    job = TRAINING["mlp"].make()
    wanted = reference(TRAINING["mlp"].make(), ADAMW, clip=0.05, accumulate=2)
    with compiled(job, 2, "1f1b", ADAMW, data_parallel=2, clip_norm=0.05, dynamic_batch=True) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets, update=step % 2 == 1)) for step in range(STEPS)]
        assert losses == pytest.approx(wanted.losses, rel=1e-10)
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10
        (x,) = job.inputs
        for size in (1, 3):  # one that the second pipeline has nothing of, and an uneven one
            twin = TRAINING["mlp"].make()
            twin.model.load_state_dict(job.model.state_dict())
            loss = twin.loss_fn(twin.model(x[:size]), job.targets[:size])
            assert float(pipe.train_step(x[:size], job.targets[:size], update=False)) == pytest.approx(loss.item())


def test_a_saved_pipeline_goes_on_bit_for_bit(tmp_path: Path) -> None:
    job = TRAINING["dropout"].make()
    with compiled(job, 2, "1f1b", ADAMW, data_parallel=2) as pipe:
        pipe.train_step(job.inputs, job.targets)
        pipe.save(tmp_path / "net.pipe")
        wanted = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
    options: Any = {"loss_fn": job.loss_fn, "optimizer": ADAMW, "executor": "inline"}
    with pipecompile.load(tmp_path / "net.pipe", mode="train", **options) as pipe:
        assert [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)] == wanted


class Root(nn.Module):
    """NaN in a known layer for a sample whose first entry is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.tanh(self.a(x)) * x[:, :1].sqrt())


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_pipeline_that_fails_stops_the_others_before_any_update(executor: Any) -> None:
    torch.manual_seed(0)
    job = Job(Root(), (torch.rand(8, 4),), torch.rand(8, 2), nn.MSELoss())
    with compiled(job, 2, "1f1b", SGD, data_parallel=2, executor=executor, check_finite=True) as pipe:
        before = copy.deepcopy(pipe.state_dict())
        bad = job.inputs[0].clone()
        bad[7, 0] = -1.0  # in the last micro-batch, which the second pipeline has
        with pytest.raises(
            NonFiniteError, match=r"micro-batch 3 is nan in step 0: stage 1 makes it in .*sqrt"
        ) as found:
            pipe.train_step(bad, job.targets)
        assert found.value.micro_batch == 3
        assert furthest(pipe.state_dict(), before) == 0.0
        wanted = nn.functional.mse_loss(job.model(*job.inputs), job.targets).item()
        assert float(pipe.train_step(*job.inputs, job.targets)) == pytest.approx(wanted)
        assert furthest(pipe.state_dict(), before) > 0.0


def test_what_cannot_be_shared_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 4)
    own: Any = {"mode": "train", "executor": "inline", "profile_seconds": 0.01}
    own |= {"loss_fn": nn.MSELoss(), "optimizer": SGD, "schedule": "1f1b"}
    for wrong, error, text in (
        ({"data_parallel": 0}, PlanError, "data_parallel=0: 2 devices make no such number of equal pipelines"),
        ({"data_parallel": 3}, PlanError, "2 devices make no such number of equal pipelines"),
        ({"data_parallel": 2, "micro_batches": 3}, PlanError, "must divide the number of micro-batches, 3"),
        ({"data_parallel": True}, InputError, "must be a whole number of pipelines"),
        ({"data_parallel": "2"}, InputError, "must be a whole number of pipelines"),
    ):
        with pytest.raises(error, match=text):
            pipecompile.compile(model, (x,), **own, **wrong)
    unequal = Cluster((Device("a"), Device("b", speed=2.0)))
    with pytest.raises(PlanError, match="equal pipelines need devices of one kind, speed and memory"):
        pipecompile.compile(model, (x,), **own, devices=unequal, data_parallel=2)
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    with pytest.raises(PlanError, match=r"the model writes to '1.running_mean' and 2 other buffers.*data_parallel=1"):
        pipecompile.compile(normed, (x,), **own, data_parallel=2)


def test_a_raising_stage_is_named() -> None:
    job = TRAINING["mlp"].make()

    def loss(result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such thing")

    job = replace(job, loss_fn=loss)
    with (
        compiled(job, 2, "1f1b", SGD, data_parallel=2, reduction="mean") as pipe,
        pytest.raises(StepError, match=r"stage 0 on device 0 raised ValueError.*no such thing"),
    ):
        pipe.train_step(job.inputs, job.targets)


def test_devices_asked_for_by_number_are_cut_into_pipelines() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 4, "1f1b", SGD, data_parallel=2) as pipe:
        assert [(s.index, s.device) for s in pipe.plan.stages] == [(0, 0), (1, 1), (2, 2), (3, 3)]
        assert [s.layers for s in pipe.plan.stages[:2]] == [s.layers for s in pipe.plan.stages[2:]]
        assert len(pipe.plan.cluster.devices) == 4
        (end,) = pipe.simulate().finishes
        assert end > 0


def test_the_report_says_which_micro_batches_a_pipeline_was_dealt(tmp_path: Path) -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD, data_parallel=2) as pipe:
        pipe.train_step(job.inputs, job.targets)
        page = pipe.report(tmp_path / "step.html").read_text()
    assert "2 pipelines of 1 stage on 2 devices" in page
    assert "4 micro-batches a step" in page
    for number in range(4):  # drawn twice, as predicted and as measured
        assert page.count(f"<title>stage {number % 2}, forward of micro-batch {number}:") == 2


class Aside(nn.Module):
    """Two results, of which the loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.aside = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.tanh(self.body(x))
        return self.head(hidden), self.aside(hidden)


def first_result(result: Any, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(result[0], target)


def test_a_weight_that_the_loss_does_not_lead_to_has_no_gradient_and_does_not_decay() -> None:
    torch.manual_seed(0)
    job = Job(Aside().double(), (torch.rand(8, 4).double(),), torch.rand(8, 2).double(), first_result)
    before = copy.deepcopy(job.model.state_dict())
    plain = copy.deepcopy(job.model)
    decaying = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)
    update = decaying(plain.parameters())
    with compiled(job, 2, "1f1b", decaying, data_parallel=2, reduction="mean") as pipe:
        for _ in range(3):
            pipe.train_step(job.inputs, job.targets)
            update.zero_grad()
            first_result(plain(*job.inputs), job.targets).backward()
            update.step()
        assert set(pipe.gradients()) == {f"{layer}.{kind}" for layer in ("body", "head") for kind in ("weight", "bias")}
    assert torch.equal(job.model.get_parameter("aside.weight"), before["aside.weight"])
    assert furthest(dict(job.model.state_dict()), dict(plain.state_dict())) <= 1e-12
