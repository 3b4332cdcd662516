"""Checkpoints: resume bit for bit after a real SIGKILL, and never half a file."""

from __future__ import annotations

import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from models.training import TRAINING
from pipecompile.errors import ArtefactError, InputError
from pipecompile.pipelines.checkpoint import Checkpoint
from test_training import ADAMW, SGD, compiled, every_layer_alike
from test_training_drop_in import dropped_in

__all__ = ["every_layer_alike"]  # the fixture, for this file too

HERE = Path(__file__).parent

TRAIN = """
import functools, sys, time, torch
from pathlib import Path
import pipecompile
from models.training import TRAINING

def slow(result, target):
    time.sleep(0.02)  # so that a kill meets the middle of a step
    return torch.nn.functional.cross_entropy(result, target)

path, job = Path(sys.argv[1]), TRAINING["dropout"].make()
pipe = pipecompile.compile(
    job.model, job.inputs, mode="train", devices=2, schedule=sys.argv[2], loss_fn=slow,
    optimizer=functools.partial(torch.optim.AdamW, lr=0.003), profile_seconds=0.02,
)
done = pipe.load_checkpoint(path)["done"] if path.exists() else 0
for step in range(done, 10):
    print(float(pipe.train_step(job.inputs, job.targets)).hex(), flush=True)
    pipe.save_checkpoint(path, extra={"done": step + 1})
"""


def run(path: Path, schedule: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-c", TRAIN, str(path), schedule]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_training_killed_in_a_step_goes_on_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    with run(path, "1f1b") as first:
        assert first.stdout is not None
        losses = [first.stdout.readline().strip() for _ in range(4)]
        time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        losses += first.stdout.read().split()
    assert first.returncode == -signal.SIGKILL
    assert len(losses) < 10
    done = Checkpoint.load(path).steps
    assert done in (len(losses) - 1, len(losses))
    with run(path, "1f1b") as second:
        more, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    job = TRAINING["dropout"].make()
    with compiled(job, 2, "1f1b", partial(torch.optim.AdamW, lr=0.003)) as pipe:
        wanted = [float(pipe.train_step(job.inputs, job.targets)).hex() for _ in range(10)]
    assert losses[:done] + more.split() == wanted
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


SAVE = """
import sys, torch
from pipecompile.pipelines.checkpoint import Checkpoint
i = 0
while True:
    value = torch.full((1 << 20,), float(i))
    Checkpoint({str(n): value + n for n in range(4)}, None, i).save(sys.argv[1])
    print(i, flush=True)
    i += 1
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    path, chance = tmp_path / "c.safetensors", random.Random(0)
    for _ in range(4):
        saver = subprocess.Popen([sys.executable, "-c", SAVE, str(path)], stdout=subprocess.PIPE, text=True)
        assert saver.stdout is not None
        saver.stdout.readline()
        time.sleep(chance.random() * 0.2)
        saver.kill()
        saver.communicate()
        found = Checkpoint.load(path)
        assert all(bool((found.model[str(n)] == found.steps + n).all()) for n in range(4))
    assert {file.name for file in tmp_path.iterdir()} <= {"c.safetensors", ".c.safetensors.part"}


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    Checkpoint({"a": torch.ones(2)}, None, 1).save(path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Checkpoint({"a": torch.zeros(2)}, None, 2).save(path)
    assert Checkpoint.load(path).steps == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("optimizer", [SGD, ADAMW, partial(torch.optim.Adam, lr=torch.tensor(0.003), foreach=False)])
def test_a_checkpoint_goes_on_under_another_schedule(tmp_path: Path, optimizer: Any) -> None:
    """Tied weights are saved once; the optimizer's state comes back exactly."""
    case, path = TRAINING["autoencoder"], tmp_path / "c.safetensors"
    job = case.make()
    with compiled(job, 3, "zb_h1", optimizer) as pipe:
        for _ in range(3):
            pipe.train_step(job.inputs, job.targets)
        extra = {"epoch": 2, "betas": [1, (2.5, None)], "rates": ADAMW([torch.zeros(0)]).state_dict()}
        pipe.save_checkpoint(path, extra=extra)
        state = pipe.optimizer_state_dict()
        wanted = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
    again = case.make()
    with compiled(again, 2, "gpipe", optimizer) as pipe:
        assert pipe.load_checkpoint(path) == extra  # tuples too, such as the betas of an optimizer
        found = pipe.optimizer_state_dict()
        assert found["param_groups"] == state["param_groups"]
        assert found["state"].keys() == state["state"].keys()
        for i, values in state["state"].items():
            assert all(
                torch.equal(torch.as_tensor(found["state"][i][k]), torch.as_tensor(v)) for k, v in values.items()
            )
        assert [float(pipe.train_step(again.inputs, again.targets)) for _ in range(3)] == pytest.approx(
            wanted, rel=1e-12
        )


def test_an_optimizer_of_the_caller_is_saved_with_it(tmp_path: Path) -> None:
    path, losses = tmp_path / "c.safetensors", list[list[float]]()
    for resumed in (False, True):
        job = TRAINING["dropout"].make()
        with dropped_in(job, 2, "gpipe") as pipe:
            update = ADAMW(list(pipe.parameters()))
            if resumed:
                pipe.load_checkpoint(path, optimizer=update)
            losses.append([])
            for step in range(2 if resumed else 4):
                update.zero_grad()
                loss = job.loss_fn(pipe(*job.inputs), job.targets)
                loss.backward()
                update.step()
                losses[-1].append(loss.item())
                if step == 1 and not resumed:
                    pipe.save_checkpoint(path, optimizer=update)
            with pytest.raises(InputError, match="has no optimizer: give yours"):
                pipe.save_checkpoint(path)
    assert losses[0][2:] == losses[1]


def test_what_cannot_be_saved_or_loaded_is_named(tmp_path: Path) -> None:
    path, job = tmp_path / "c.safetensors", TRAINING["mlp"].make()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        pipe.train_step(job.inputs, job.targets, update=False)
        with pytest.raises(InputError, match=r"gradients of train_step\(update=False\) wait"):
            pipe.save_checkpoint(path)
        pipe.train_step(job.inputs, job.targets)
        with pytest.raises(InputError, match="extra holds a device"):
            pipe.save_checkpoint(path, extra={"where": [torch.device("cpu")]})
        assert not path.exists()
        pipe.save_checkpoint(path)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtefactError, match="not a whole checkpoint"):
            pipe.load_checkpoint(path)
        with pytest.raises(ArtefactError, match="there is no such checkpoint"):
            pipe.load_checkpoint(tmp_path / "other.safetensors")
        save_file({"a": torch.ones(1)}, path)
        with pytest.raises(ArtefactError, match="no checkpoint of pipecompile"):
            pipe.load_checkpoint(path)
        path.write_bytes(whole)
    other = TRAINING["lstm"].make()
    with compiled(other, 2, "1f1b", SGD) as pipe, pytest.raises(InputError, match="is of another model: it lacks"):
        pipe.load_checkpoint(path)


def test_the_state_of_another_optimizer_changes_nothing(tmp_path: Path) -> None:
    job, path = TRAINING["mlp"].make(), tmp_path / "sgd.safetensors"
    with compiled(job, 2, "gpipe", SGD) as pipe:
        pipe.train_step(job.inputs, job.targets)
        pipe.save_checkpoint(path)
    other = TRAINING["mlp"].make()
    with compiled(other, 2, "gpipe", ADAMW) as pipe:
        pipe.train_step(other.inputs, other.targets)
        before = {name: value.clone() for name, value in pipe.state_dict().items()}
        with pytest.raises(InputError, match=r"another kind of optimizer: it has dampening, .* and no amsgrad, betas"):
            pipe.load_checkpoint(path)
        assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


@pytest.mark.parametrize(
    "optimizer", [SGD, ADAMW, partial(torch.optim.Adafactor, lr=0.01)], ids=["sgd", "adamw", "factored"]
)
def test_a_state_of_other_shapes_is_refused_before_anything_changes(tmp_path: Path, optimizer: Any) -> None:
    job, path = TRAINING["mlp"].make(), tmp_path / "c.safetensors"
    with compiled(job, 2, "gpipe", optimizer) as pipe:
        pipe.train_step(job.inputs, job.targets)
        good = pipe.optimizer_state_dict()
        pipe.load_optimizer_state_dict(good)
        bad = copy.deepcopy(good)
        names = [name for name, _ in job.model.named_parameters()]
        i = next(i for i, name in enumerate(names) if name.endswith("weight"))
        key = next(key for key, value in bad["state"][i].items() if value.dim())
        shape = tuple(job.model.get_parameter(names[i]).shape)
        bad["state"][i][key] = bad["state"][i][key].transpose(0, 1).contiguous()
        there = tuple(bad["state"][i][key].shape)
        words = re.escape(
            f"is of another model: {key!r} of weight {names[i]!r} has shape {there} there; this weight has"
        )
        with pytest.raises(InputError, match=f"the optimizer state {words} shape {re.escape(str(shape))}"):
            pipe.load_optimizer_state_dict(bad)
        weights = {name: torch.ones_like(value) for name, value in pipe.state_dict().items()}
        Checkpoint(weights, bad, 7).save(path)
        with pytest.raises(InputError, match=re.escape(str(path)) + " " + words):
            pipe.load_checkpoint(path)
        found = pipe.optimizer_state_dict()["state"]
        assert all(torch.equal(v, found[i][k]) for i, state in good["state"].items() for k, v in state.items())
        assert not any(torch.equal(value, weights[name]) for name, value in pipe.state_dict().items())
        assert pipe.training_state_dict()["steps"] == 1
    own = TRAINING["mlp"].make()
    with dropped_in(own, 2, "gpipe") as pipe:
        update = optimizer(list(pipe.parameters()))
        with pytest.raises(InputError, match=re.escape(str(path)) + " " + words):
            pipe.load_checkpoint(path, optimizer=update)
        assert not update.state
        Checkpoint(weights, good, 7).save(path)
        pipe.load_checkpoint(path, optimizer=update)
        assert len(update.state) == len(good["state"])
