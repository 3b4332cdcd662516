"""The code for a card with torch.cuda played by the host: that it asks for what there is, in the form it is asked for.

What it computes is right here because the host computes in order; what a card must wait for is checked in
`test_training_lanes.py`.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from models.training import TRAINING, Job
from pipecompile.errors import InputError, NonFiniteError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.measure import Job as Timed
from pipecompile.pipelines.train_driver import compile_training
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.runtime.cuda_measure import CudaMeasure
from pipecompile.runtime.inline_step import InlineTrainer
from test_training import PARTS, SGD, furthest, reference


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        self.time = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.time - self.time) * 1e3


class Stream:
    made = 0

    def __init__(self, device: torch.device) -> None:
        assert isinstance(device, torch.device)
        Stream.made += 1

    def wait_event(self, event: Event) -> None:
        assert event.time <= time.perf_counter()

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card called ``cpu``."""
    for name, value in {
        "Event": Event, "Stream": Stream, "stream": lambda stream: nullcontext(), "current_stream": Stream,
        "device": lambda device: nullcontext(), "synchronize": lambda device: None,
        "get_rng_state": lambda device: None, "set_rng_state": lambda state, device: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)


def compiled(job: Job, schedule: str, **more: Any) -> TrainingPipeline:
    devices = tuple(Device(f"cpu/{i}", "cuda") for i in range(2))
    args, kwargs = ((), job.inputs) if isinstance(job.inputs, dict) else (job.inputs, {})
    options = {"loss_fn": job.loss_fn, "optimizer": SGD, "keep_gradients": True, "example_targets": job.targets, **more}
    return compile_training(
        job.model, args, kwargs, Cluster(devices), schedule=schedule, micro_batches=PARTS, profile_seconds=0.02,
        time_limit=1.0, executor="inline", **options,
    )  # fmt: skip


def test_from_compile_to_gradients(tmp_path: Path) -> None:
    job, wanted = TRAINING["dropout"].make(), reference(TRAINING["dropout"].make(), SGD)
    with compiled(job, "auto") as pipe:
        assert pipe.plan.cluster.card == "cpu"
        assert pipe.plan.cluster.link.overlap == 1.0
        before = Stream.made
        losses = [float(pipe.train_step(job.inputs, job.targets)) for _ in wanted.losses]
        assert Stream.made >= before + 2 + len([edge for edge in pipe.program.edges if edge.slots])
        assert furthest(pipe.gradients(), wanted.gradients) <= 1e-10
        trainer = pipe._trainer
        assert isinstance(trainer, InlineTrainer)
        assert {span.device for span in trainer.spans()} == {device.device for device in pipe.program.devices}
        assert all(0.0 <= event.start <= event.end for event in pipe.timeline().events)
        pipe.save_checkpoint(tmp_path / "state.safetensors")
        with pytest.raises(InputError, match="cannot be saved yet"):
            pipe.save(tmp_path / "net.pipe")
    assert losses == pytest.approx(wanted.losses, rel=1e-10)


def test_the_code_of_a_stage_on_a_card_is_under_its_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: plain({"cuda": "cpu"}[kind], **options))
    with compiled(TRAINING["mlp"].make(torch.float32), "1f1b", autocast=torch.bfloat16) as pipe:
        assert all('with torch.autocast("cuda", dtype=torch.bfloat16):' in m.source for m in pipe.package.modules)


def test_where_a_value_that_is_not_finite_comes_from() -> None:
    job = TRAINING["mlp"].make()
    with compiled(job, "1f1b", check_finite=True) as pipe:
        with torch.no_grad():
            next(iter(job.model.parameters())).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="on device 0 is NaN"):
            pipe.train_step(job.inputs, job.targets)


def test_timings() -> None:
    measure, x = CudaMeasure("cpu"), torch.randn(64, 64)
    layers = "import time\ndef model(clock, x):\n    clock(0)\n    time.sleep(0.002)\n    clock(1)\n"
    (first, second), whole, repeats = measure.layers(layers, [x], 2, 0.02)
    assert 0.0 <= first < second <= whole
    assert repeats >= 3
    jobs = [Timed(f"import time\ndef run(x):\n    time.sleep({t})\n", "run", [x]) for t in (0.0005, 0.005)]
    short, long = measure.functions(jobs, 0.02)
    assert 0.0 < short < long
    ours, theirs = measure.slowdowns(jobs, [None, None], 0.02)  # one after the other, each waits for the other too
    assert ours > theirs >= 1.0
    assert measure.link().overlap == 1.0
