"""Training on a CUDA card: what it computes, what overlaps, and what it says when the card fails.

None of it can run without a card; what can be shown without is in `test_training_lanes.py`.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map

import pipecompile
from models.training import TRAINING, Job
from pipecompile.errors import InputError, NonFiniteError, PipecompileWarning, StepError, TraceError
from pipecompile.ir.measure import Job as Timed
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.runtime.cuda_measure import CudaMeasure
from pipecompile.schedules.training import STEP_SCHEDULES
from test_training import ADAMW, PARTS, SGD, every_layer_alike, furthest, reference

__all__ = ["every_layer_alike"]  # the fixture, for this file too

CARD = "cuda:0"

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def on_card(job: Job) -> Job:
    """The job with everything on the card."""
    move = lambda nest: tree_map(lambda v: v.to(CARD) if isinstance(v, torch.Tensor) else v, nest)  # noqa: E731
    loss_fn = job.loss_fn.to(CARD) if isinstance(job.loss_fn, nn.Module) else job.loss_fn
    return Job(job.model.to(CARD), move(job.inputs), move(job.targets), loss_fn)


def twin(name: str, dtype: torch.dtype = torch.float64) -> tuple[Job, Job]:
    """The same job twice."""
    return on_card(TRAINING[name].make(dtype)), on_card(TRAINING[name].make(dtype))


def compiled(job: Job, stages: int, schedule: str, optimizer: Any = SGD, **more: Any) -> TrainingPipeline:
    args, kwargs = ((), job.inputs) if isinstance(job.inputs, dict) else (job.inputs, {})
    options = {"loss_fn": job.loss_fn, "optimizer": optimizer, "keep_gradients": True, **more}
    if options["loss_fn"] is None:
        options = {"loss_fn": None, **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        return pipecompile.compile(
            job.model, args, kwargs, mode="train", devices=[CARD] * stages, schedule=schedule,
            **{"micro_batches": PARTS, "profile_seconds": 0.05, "time_limit": 2.0, **options},
        )  # fmt: skip


@pytest.mark.parametrize("name", list(TRAINING))
@pytest.mark.parametrize("stages", [2, 3])
def test_streams_of_one_card_compute_what_eager_does_on_it(name: str, stages: int) -> None:
    """Loss, gradients, weights and buffers after 20 steps, masks of dropout among them; batches given from the host."""
    schedule = list(STEP_SCHEDULES)[(len(name) + stages) % 6]
    optimizer = ADAMW if len(name) % 2 else SGD
    job, other = twin(name)
    wanted = reference(other, optimizer)
    state = torch.cuda.get_rng_state(CARD)
    host = TRAINING[name].make()
    with compiled(job, stages, schedule, optimizer) as pipe:
        losses = [float(pipe.train_step(host.inputs, host.targets)) for _ in wanted.losses]
        assert furthest(pipe.gradients(), wanted.gradients) <= 1e-9
        events = pipe.timeline().events
    assert losses == pytest.approx(wanted.losses, rel=1e-9)
    assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-9
    assert torch.equal(torch.cuda.get_rng_state(CARD), state)
    assert len({event.device for event in events}) == len(pipe.package.modules)
    assert all(0.0 <= event.start <= event.end for event in events)


@pytest.mark.parametrize("schedule", list(STEP_SCHEDULES))
def test_every_schedule_on_a_card(schedule: str) -> None:
    job, other = twin("resnet")
    wanted = reference(other, SGD)
    with compiled(job, 2, schedule, recompute="stage" if schedule == "1f1b" else "none") as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets)) for _ in wanted.losses]
    assert losses == pytest.approx(wanted.losses, rel=1e-9)
    assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-9


def test_steps_under_pressure_stay_right() -> None:
    """Large tensors, many micro-batches, nothing waited for: a missing order of streams would show here."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2048, 2048), nn.Tanh()) for _ in range(8))).to(CARD)
    x, y = torch.randn(4096, 2048).pin_memory(), torch.randn(4096, 2048).pin_memory()
    job, other = (Job(copy.deepcopy(model), (x.to(CARD),), y.to(CARD), nn.MSELoss()) for _ in range(2))
    update, losses = SGD(list(other.model.parameters())), []
    for _ in range(10):
        update.zero_grad()
        total = 0.0
        for part, target in zip(x.to(CARD).split(512), y.to(CARD).split(512), strict=True):
            loss = nn.functional.mse_loss(other.model(part), target) / 8
            loss.backward()
            total += float(loss)
        update.step()
        losses.append(total)
    with compiled(job, 2, "1f1b", micro_batches=8) as pipe:
        found = [float(pipe.train_step(x, y)) for _ in range(10)]
    assert found == pytest.approx(losses, rel=1e-5)
    assert furthest(dict(job.model.state_dict()), dict(other.model.state_dict())) <= 1e-4


def test_transfers_and_stages_overlap(tmp_path: Path) -> None:
    """In the trace of a step: copies run beside kernels of other streams, and kernels of two devices side by side."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4096, 4096), nn.ReLU()) for _ in range(6))).to(CARD)
    x, y = torch.randn(8192, 4096).pin_memory(), torch.randn(8192, 4096).pin_memory()
    with compiled(Job(model, (x.to(CARD),), y.to(CARD), nn.MSELoss()), 2, "1f1b", micro_batches=8) as pipe:
        for _ in range(3):
            pipe.train_step(x, y)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
            pipe.train_step(x, y)
            torch.cuda.synchronize()
    trace.export_chrome_trace(str(tmp_path / "trace.json"))
    rows = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    work = [row for row in rows if row.get("cat") in ("kernel", "gpu_memcpy")]
    kernels = [row for row in work if row["cat"] == "kernel"]
    copies = [row for row in work if row["cat"] == "gpu_memcpy"]
    assert len({row["args"]["stream"] for row in kernels}) >= 2
    hosts = [row for row in copies if "HtoD" in row["name"]]
    assert beside(hosts, kernels) > 0.0, "no input is copied while something is computed"
    assert beside([row for row in copies if "DtoD" in row["name"]], kernels) > 0.0, "no message is"
    assert beside(kernels, kernels) > 0.0, "the devices take turns"


def beside(some: list[Any], others: list[Any]) -> float:
    """Microseconds in which one of ``some`` runs beside one of ``others`` in another stream."""
    return sum(
        max(0.0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"]))
        for a in some
        for b in others
        if a["args"]["stream"] != b["args"]["stream"]
    )


def test_a_drop_in_pipeline_on_a_card() -> None:
    job, other = twin("autoencoder")
    update, plain = SGD(list(job.model.parameters())), SGD(list(other.model.parameters()))
    with compiled(Job(job.model, job.inputs, job.targets, None), 2, "gpipe") as pipe:  # type: ignore[arg-type]
        for _ in range(5):
            for run, optimizer in ((pipe, update), (other.model, plain)):
                optimizer.zero_grad()
                job.loss_fn(run(*job.inputs), job.targets).backward()
                optimizer.step()
    assert furthest(dict(job.model.state_dict()), dict(other.model.state_dict())) <= 1e-9


def test_autocast_on_a_card_is_that_of_plain_torch() -> None:
    job, other = twin("mlp", torch.float32)
    with compiled(job, 2, "1f1b", autocast=torch.bfloat16, micro_batches=1) as pipe:
        assert all('torch.autocast("cuda", dtype=torch.bfloat16)' in m.source for m in pipe.package.modules)
        loss = float(pipe.train_step(job.inputs, job.targets))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        result = other.model(*other.inputs)
    assert loss == pytest.approx(float(other.loss_fn(result.float(), other.targets)), rel=1e-5)


def test_a_checkpoint_of_a_card_goes_on(tmp_path: Path) -> None:
    job, other = twin("dropout")
    with compiled(job, 2, "1f1b", ADAMW) as pipe:
        for _ in range(3):
            pipe.train_step(job.inputs, job.targets)
        pipe.save_checkpoint(tmp_path / "state.safetensors")
        wanted = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
        with pytest.raises(InputError, match="cannot be saved yet"):
            pipe.save(tmp_path / "net.pipe")
    with compiled(other, 2, "gpipe", ADAMW) as pipe:
        pipe.load_checkpoint(tmp_path / "state.safetensors")
        assert [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)] == pytest.approx(wanted, rel=1e-9)


def test_no_memory_left_names_stage_device_and_layer_and_the_next_step_runs() -> None:
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 8)).to(
        CARD
    )
    x, y = torch.randn(1 << 16, 1024, device=CARD), torch.randn(1 << 16, 8, device=CARD)
    with compiled(Job(model, (x,), y, nn.MSELoss()), 2, "gpipe") as pipe:
        loss = float(pipe.train_step(x, y, update=False))
        torch.cuda.empty_cache()
        try:
            total = torch.cuda.get_device_properties(CARD).total_memory
            torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(CARD) / total, CARD)  # no more
            with pytest.raises(
                StepError, match=r"stage [01] on device [01] raised OutOfMemoryError in .*share the memory"
            ):
                pipe.train_step(x, y)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, CARD)
        assert float(pipe.train_step(x, y)) == pytest.approx(loss, rel=1e-5)


ASSERT = """
import functools, torch, pipecompile
from torch import nn
model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).to("cuda:0")
x, y = torch.zeros(8, 3, dtype=torch.long, device="cuda:0"), torch.zeros(8, 3, 2, device="cuda:0")
pipe = pipecompile.compile(
    model, (x,), mode="train", devices=["cuda:0"] * 2, loss_fn=nn.MSELoss(), schedule="1f1b", micro_batches=2,
    optimizer=functools.partial(torch.optim.SGD, lr=0.1), profile_seconds=0.05,
)
pipe.train_step(x, y)
for _ in range(2):
    try:
        pipe.train_step(x + 99, y)
    except pipecompile.PipecompileError as error:
        print(type(error).__name__, str(error).splitlines()[0])
"""


def test_an_error_the_card_reports_after_the_fact_is_told_as_one() -> None:
    """In a process of its own: its card cannot be used any more afterwards."""
    found = subprocess.run([sys.executable, "-c", ASSERT], capture_output=True, text=True, timeout=300, check=False)
    first, second = [line for line in found.stdout.splitlines() if line.startswith(("StepError", "PipelineClosed"))]
    assert first.startswith("StepError"), found.stderr
    assert "after the fact" in first
    assert "CUDA_LAUNCH_BLOCKING" in first
    assert second.startswith("PipelineClosed")


def test_a_model_elsewhere_than_its_devices_is_named() -> None:
    job = TRAINING["mlp"].make()
    with pytest.raises(InputError, match=r"example inputs must be dense tensors on cuda:0.* got one on cpu"):
        compiled(job, 2, "1f1b")
    with pytest.raises(
        TraceError, match=r"is on cpu .* on cuda:0, as the devices are: convert it with .to\('cuda:0'\)"
    ):
        compiled(Job(job.model, on_card(TRAINING["mlp"].make()).inputs, job.targets, job.loss_fn), 2, "1f1b")
    moved = on_card(TRAINING["mlp"].make())
    with compiled(moved, 2, "1f1b") as pipe:
        moved.model.cpu()
        with pytest.raises(InputError, match="of stage 0 is on cpu, the stage runs on cuda:0"):
            pipe.train_step(moved.inputs, moved.targets)


def test_a_loss_that_is_not_finite_is_named_on_a_card() -> None:
    job = on_card(TRAINING["mlp"].make())
    with compiled(job, 2, "1f1b", check_finite=True) as pipe:
        with torch.no_grad():
            next(iter(job.model.parameters())).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match=r"is NaN|of micro-batch 0 is nan"):
            pipe.train_step(TRAINING["mlp"].make().inputs, TRAINING["mlp"].make().targets)


def test_timings_of_a_card_are_of_the_card() -> None:
    measure, x = CudaMeasure(CARD), torch.randn(2048, 2048, device=CARD)
    few, many = (f"def run(x):\n    for _ in range({n}):\n        y = x @ x\n" for n in (4, 64))
    short, long = measure.functions([Timed(few, "run", [x]), Timed(many, "run", [x])], 0.05)
    assert 0.0 < short < long
    layers = (
        "def model(clock, x):\n    y = x @ x\n    clock(0)\n    for _ in range(64):\n        y = x @ x\n    clock(1)\n"
    )
    (first, second), whole, _ = measure.layers(layers, [x], 2, 0.05)
    assert 0.0 < first < second < whole * 1.01
    assert all(factor >= 1.0 for factor in measure.slowdowns([Timed(many, "run", [x])] * 2, [None, None], 0.05))
    link = measure.link()
    assert link.overlap == 1.0
    assert link.latency < 1e-3
    assert link.bandwidth > 1e9
