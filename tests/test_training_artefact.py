"""A saved training pipeline goes on bit for bit without the model's source; what was altered is refused."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from models.training import TRAINING, Job
from pipecompile.artefact.allow import check_source
from pipecompile.artefact.format import file_digest, manifest_digest
from pipecompile.errors import ArtefactError, InputError
from test_training import ADAMW, SCHEDULES, SGD, compiled, every_layer_alike
from test_training_groups import decay_groups

__all__ = ["every_layer_alike"]  # the fixture, for this file too


def steps(pipe: Any, job: Job, count: int) -> list[float]:
    return [float(pipe.train_step(job.inputs, job.targets)) for _ in range(count)]


@pytest.mark.parametrize(
    ("name", "schedule", "optimizer", "executor", "more"),
    [
        ("gpt2", "zb_v", ADAMW, "inline", {"param_groups": decay_groups, "clip_norm": 0.5}),
        ("frozen", "1f1b", SGD, "inline", {"recompute": "stage", "seed": 3}),
        ("resnet", "zb_h1", SGD, "process", {"deferred_batch_norm": True}),
    ],
)
def test_a_loaded_pipeline_goes_on_bit_for_bit(
    tmp_path: Path, name: str, schedule: str, optimizer: Any, executor: Any, more: dict[str, Any]
) -> None:
    job, path = TRAINING[name].make(), tmp_path / "run.pipe"
    with compiled(job, 2, schedule, optimizer, executor=executor, **more) as pipe:
        steps(pipe, job, 2)
        pipe.save(path)
        steps(pipe, job, 1)
        pipe.save(path)  # in place of the first
        wanted, weights = steps(pipe, job, 3), pipe.state_dict()
    with pipecompile.load(path, mode="train", loss_fn=job.loss_fn, optimizer=optimizer, executor=executor) as again:
        assert steps(again, job, 3) == wanted
        found = again.state_dict()
        assert found.keys() <= weights.keys()
        assert all(torch.equal(found[key], weights[key]) for key in found)
        assert again.optimizer_state_dict()["param_groups"] == pipe_groups(optimizer, job.model, more)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.pipe"]


def pipe_groups(optimizer: Any, model: nn.Module, more: dict[str, Any]) -> Any:
    groups = more.get("param_groups", lambda model: list(model.parameters()))(model)
    return optimizer(groups).state_dict()["param_groups"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "unet" else pytest.mark.slow) for n in TRAINING])
def test_generated_training_code_is_on_the_allow_list(name: str) -> None:
    for i, schedule in enumerate(SCHEDULES):
        more: dict[str, Any] = {"recompute": "stage"} if i % 2 else {"deferred_batch_norm": True}
        with compiled(TRAINING[name].make(), 2, schedule, SGD, **more) as pipe:
            for module in pipe.step_package.package.modules:
                check_source(module.source, module.filename, step=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Job]:
    job, path = TRAINING["mlp"].make(), tmp_path_factory.mktemp("saved") / "net.pipe"
    with compiled(job, 2, "zb_h1", SGD, reduction=lambda target: float(len(target))) as pipe:
        steps(pipe, job, 1)
        pipe.save(path)
    return path, job


def load(path: Path, job: Job, **more: Any) -> Any:
    options = {"loss_fn": job.loss_fn, "optimizer": SGD, "reduction": "mean", "executor": "inline", **more}
    return pipecompile.load(path, mode="train", **options)


def test_whatever_is_cut_short_or_altered_is_refused(saved: tuple[Path, Job], tmp_path: Path) -> None:
    path, job = saved
    names = {file.name for file in path.iterdir()}
    assert names == {
        "manifest.json", "plan.json", "program.json", "weights.safetensors", "training.safetensors",
        "device_0.py", "device_1.py",
    }  # fmt: skip
    for name in names:
        broken = shutil.copytree(path, tmp_path / f"cut {name}")
        whole = (broken / name).read_bytes()
        (broken / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtefactError, match=re.escape(name)):
            load(broken, job)
        (broken / name).unlink()
        with pytest.raises(ArtefactError, match=re.escape(name)):
            load(broken, job)


def signed(path: Path, name: str, change: Any) -> Path:
    """An altered file whose digests fit again, as somebody who means harm would leave it."""
    file = path / name
    file.write_bytes(change(file.read_bytes()))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = file_digest(file)
    manifest["digest"] = manifest_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("import math", "import os", "'import os'"),
        ("grad = torch.autograd.grad", "grad = torch.load", "'grad = torch.load'"),
        (
            "return torch.zeros_like(value) if",
            "torch.save(value, 'x')\n    return torch.zeros_like(value) if",
            "torch.save",
        ),
        ("link.norm()", "link.norm.__globals__", "__globals__"),
        ("link.sums, {}, {}", "link._tensors, {}, {}", "_tensors"),
        ("kept.pop((0, 0))", "kept.update((0, 0))", "'kept.update'"),
        ("sums, kept, passed =", "sums, link.number, passed =", "changing"),
        ("STATE_0 = (", "STATE_0 = (eval('1'), ", "STATE_0"),
        ("with torch.enable_grad():", "with open('x'):", "'with open"),
    ],
)
def test_code_that_is_not_allowed_is_refused(
    saved: tuple[Path, Job], tmp_path: Path, old: str, new: str, reason: str
) -> None:
    path = Path(shutil.copytree(saved[0], tmp_path / "net.pipe"))

    def change(data: bytes) -> bytes:
        assert old.encode() in data
        return data.replace(old.encode(), new.encode(), 1)

    with pytest.raises(ArtefactError, match=re.escape(reason)):
        load(signed(path, "device_0.py", change), saved[1])


def test_what_does_not_fit_is_named(saved: tuple[Path, Job], tmp_path: Path) -> None:
    path, job = saved
    with pytest.raises(ArtefactError, match="saved by a pipeline of mode='train': load it with mode='train'"):
        pipecompile.load(path)
    with pytest.raises(InputError, match="give loss_fn= and optimizer= again"):
        load(path, job, optimizer=None)
    with pytest.raises(InputError, match="a function as reduction=: give it again"):
        load(path, job, reduction=None)
    with pytest.raises(InputError, match="are for training"):
        pipecompile.load(path, optimizer=SGD)  # type: ignore[call-overload]
    other = Path(shutil.copytree(path, tmp_path / "other.pipe"))
    with pytest.raises(ArtefactError, match=r"training\.safetensors: not a whole checkpoint"):
        load(signed(other, "training.safetensors", lambda data: data[:100]), job)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(4, 4)
    with pipecompile.compile(
        model, (x,), mode="train", executor="inline", profile_seconds=0.02, micro_batches=2
    ) as pipe:
        pipe.save(tmp_path / "plain.pipe")
        wanted = pipe(x)
    with pytest.raises(InputError, match="compiled without a loss: load it without"):
        load(tmp_path / "plain.pipe", job)
    with pipecompile.load(tmp_path / "plain.pipe", mode="train", executor="inline") as again:
        update = partial(torch.optim.SGD, lr=0.1)(again.parameters())
        result = again(x)
        assert torch.equal(result, wanted)
        result.sum().backward()
        update.step()
        assert not torch.equal(again(x), wanted)


def test_accumulated_gradients_and_strange_settings_are_not_lost_silently(tmp_path: Path) -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        pipe.train_step(job.inputs, job.targets, update=False)
        with pytest.raises(InputError, match=r"gradients of train_step\(update=False\) wait"):
            pipe.save(tmp_path / "net.pipe")
    assert not list(tmp_path.iterdir())
