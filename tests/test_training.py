"""The promise of training: loss, gradients, weights and buffers equal plain PyTorch over the same micro-batches."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.training import TRAINING, Job, Training
from oracles.training import Run, pieces_of, train
from pipecompile.clusters import make_cluster
from pipecompile.errors import InputError, PipecompileWarning, PipelineClosed, PlanError, StepError, TraceError
from pipecompile.ir.cluster import Link
from pipecompile.ir.profile import Profile
from pipecompile.passes.profile import ProfileLayers
from pipecompile.pipelines import step_planner
from pipecompile.pipelines.train_driver import compile_training
from pipecompile.pipelines.training import TrainingPipeline
from pipecompile.schedules.training import STEP_SCHEDULES

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.003, weight_decay=0.05)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAMW}
STEPS, PARTS = 20, 4
SCHEDULES = list(STEP_SCHEDULES)
CASES = list(TRAINING.values())


@pytest.fixture(autouse=True)
def every_layer_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same cut every time, and one that has skips between stages; what layers really take is tested elsewhere."""

    def apply(self: ProfileLayers, graph: Any, *_: Any) -> Profile:
        sizes = dict.fromkeys(graph.values, 1) | dict.fromkeys(graph.inputs, 1)
        return Profile((1.0,) * len(graph.layers), sizes, Link(1e-6, 1e12), float(len(graph.layers)))

    monkeypatch.setattr(ProfileLayers, "apply", apply)
    monkeypatch.setattr(step_planner, "_TOLERANCE", math.inf)  # nor is it cut again after measuring


Way = tuple[Training, str, int, str]


def pairwise() -> list[Way]:
    """Every model with two schedules, two numbers of stages and both optimizers."""
    ways: list[Way] = []
    for i, case in enumerate(CASES):
        ways.append((case, SCHEDULES[i % 6], 2 + i % 2, "sgd" if i % 4 < 2 else "adamw"))
        ways.append((case, SCHEDULES[(i + 3) % 6], 3 - i % 2, "adamw" if i % 4 < 2 else "sgd"))
    return ways


QUICK = pairwise()
EVERYTHING = [way for way in product(CASES, SCHEDULES, (2, 3, 4), OPTIMIZERS) if way not in QUICK]


def compiled(job: Job, stages: int, schedule: str, optimizer: Any, parts: int = PARTS, **more: Any) -> TrainingPipeline:
    args, kwargs = ((), job.inputs) if isinstance(job.inputs, dict) else (job.inputs, {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PipecompileWarning)
        return compile_training(
            job.model, args, kwargs, make_cluster(stages), loss_fn=job.loss_fn, optimizer=optimizer, schedule=schedule,
            micro_batches=parts, profile_seconds=0.02, time_limit=2.0, keep_gradients=True,
            **{"executor": "inline", **more},
        )  # fmt: skip


def loss_shares(job: Job, parts: int) -> list[float]:
    """By hand, for the losses of the zoo: shares of samples, of targets not ignored, of class weights; 1 for a sum."""
    if getattr(job.loss_fn, "reduction", "mean") == "sum":
        return [1.0] * parts
    counts: list[float] = []
    for piece in pieces_of(job.targets, parts):
        if isinstance(job.loss_fn, nn.CrossEntropyLoss):
            valid = piece[piece != -100]
            scale = job.loss_fn.weight
            counts.append(float(len(valid)) if scale is None else float(scale[valid].sum()))
        else:
            leaf = next(iter(piece.values())) if isinstance(piece, dict) else piece
            counts.append(float(len(leaf)))
    return [count / sum(counts) for count in counts]


def reference(job: Job, optimizer: Any, parts: int = PARTS, **more: Any) -> Run:
    return train(
        job.model, job.inputs, job.targets, job.loss_fn, optimizer, parts=parts, weights=loss_shares(job, parts),
        steps=STEPS, **more,
    )  # fmt: skip


def furthest(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a tensor, in the 2-norm; small tensors count by the mean size of all."""
    assert set(mine) == set(wanted)
    norms = {name: float(value.double().norm()) for name, value in wanted.items()}
    floor = max(1e-3 * max(norms.values(), default=0.0), 1e-30)
    return max(float((mine[n].double() - wanted[n].double()).norm()) / max(norms[n], floor) for n in wanted)


def agree(pipe: TrainingPipeline, job: Job, wanted: Run, tolerance: float, **options: Any) -> None:
    losses = [float(pipe.train_step(job.inputs, job.targets, **options)) for _ in range(STEPS)]
    assert losses == pytest.approx(wanted.losses, rel=tolerance, abs=tolerance * abs(wanted.losses[0]))
    assert furthest(pipe.gradients(), wanted.gradients) <= tolerance
    assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= tolerance
    assert losses[-1] != losses[0], "nothing was trained"


def check(case: Training, schedule: str, stages: int, optimizer: str, dtype: torch.dtype, tolerance: float) -> None:
    job, wanted = case.make(dtype), reference(case.make(dtype), OPTIMIZERS[optimizer])
    with compiled(job, stages, schedule, OPTIMIZERS[optimizer]) as pipe:
        agree(pipe, job, wanted, tolerance)


@pytest.mark.parametrize(("case", "schedule", "stages", "optimizer"), QUICK, ids=lambda v: str(v))
def test_training_equals_plain_pytorch(case: Training, schedule: str, stages: int, optimizer: str) -> None:
    check(case, schedule, stages, optimizer, torch.float64, 1e-10)


@pytest.mark.parametrize(("case", "schedule", "stages", "optimizer"), QUICK[::5], ids=lambda v: str(v))
def test_training_equals_plain_pytorch_in_single_precision(
    case: Training, schedule: str, stages: int, optimizer: str
) -> None:
    check(case, schedule, stages, optimizer, torch.float32, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "schedule", "stages", "optimizer"), EVERYTHING, ids=lambda v: str(v))
def test_training_equals_plain_pytorch_everywhere(case: Training, schedule: str, stages: int, optimizer: str) -> None:
    check(case, schedule, stages, optimizer, torch.float64, 1e-10)


def test_the_zoo_exercises_what_it_is_for() -> None:
    """Skips over a stage, tied weights in two and three stages, a stage without gradients, an input read late."""

    def edges(name: str, stages: int) -> set[str]:
        with compiled(TRAINING[name].make(), stages, "1f1b", SGD) as pipe:
            assert len(pipe.plan.stages) == stages
            return {edge.name for edge in pipe.program.edges}

    assert {"0>2", "2>0"} <= edges("unet", 3)
    assert "2>0:tied" in edges("gpt2", 3)
    assert {"1>0:tied", "2>0:tied"} <= edges("autoencoder", 3)
    assert "1>0" not in edges("frozen", 4)
    assert {"host>1", "host>2"} & edges("masked", 3)


COUNTED = ["mlp", "resnet", "lstm", "unet", "attention", "weight_norm"]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, name in enumerate(COUNTED)
        for j, schedule in enumerate(SCHEDULES)
    ],
)
def test_a_step_takes_the_operations_of_eager(name: str, schedule: str) -> None:
    """No second forward, nothing computed twice, whatever the schedule splits."""
    job = TRAINING[name].make()
    eager = copy.deepcopy(job.model)
    with FlopCounterMode(display=False) as wanted:
        for piece, target in zip(pieces_of(job.inputs, PARTS), pieces_of(job.targets, PARTS), strict=True):
            job.loss_fn(eager(*piece), target).backward()
    with compiled(job, 2, schedule, SGD) as pipe, FlopCounterMode(display=False) as counted:
        pipe.train_step(job.inputs, job.targets)
    assert counted.get_total_flops() == wanted.get_total_flops() > 0


@pytest.mark.parametrize("name", ["mlp", "resnet", "lstm", "gpt2", "masked", "unet"])
@pytest.mark.parametrize(("size", "parts"), [(7, 3), (8, 3)])
def test_micro_batches_of_different_sizes(name: str, size: int, parts: int) -> None:
    case = TRAINING[name]

    def cut(nest: Any) -> Any:
        if isinstance(nest, dict):
            return {key: value[:size] for key, value in nest.items()}
        return tuple(value[:size] for value in nest) if isinstance(nest, tuple) else nest[:size]

    def short() -> Job:
        job = case.make()
        return Job(job.model, cut(job.inputs), cut(job.targets), job.loss_fn)

    schedule = SCHEDULES[(size + len(name)) % 6]
    job, wanted = short(), reference(short(), SGD, parts)
    with compiled(job, 2, schedule, SGD, parts) as pipe:
        agree(pipe, job, wanted, 1e-10)


def mlp_job() -> Job:
    return TRAINING["mlp"].make()


def test_clipping_by_global_norm() -> None:
    """Over all stages and devices together, as torch.nn.utils.clip_grad_norm_ does."""
    for schedule, clip in (("1f1b", 0.05), ("zb_v", 0.05), ("gpipe", 100.0)):
        job, wanted = mlp_job(), reference(mlp_job(), SGD, clip=clip)
        with compiled(job, 3 if schedule != "zb_v" else 2, schedule, SGD, clip_norm=clip) as pipe:
            agree(pipe, job, wanted, 1e-10)


@pytest.mark.parametrize("name", ["mlp", "gpt2"])
def test_gradients_accumulate_over_steps_without_update(name: str) -> None:
    job, wanted = TRAINING[name].make(), reference(TRAINING[name].make(), ADAMW, accumulate=2)
    with compiled(job, 3, "zb_h1", ADAMW) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets, update=step % 2 == 1)) for step in range(STEPS)]
        assert losses == pytest.approx(wanted.losses, rel=1e-10)
        assert furthest(pipe.gradients(), wanted.gradients) <= 1e-10
        assert furthest(dict(job.model.state_dict()), dict(wanted.model.state_dict())) <= 1e-10


def test_the_mask_depends_on_the_seed_and_the_step_and_on_nothing_else() -> None:
    case = TRAINING["dropout"]
    runs: dict[tuple[str, int, int], list[float]] = {}
    for schedule, stages, seed in (("1f1b", 2, 3), ("zb_v", 2, 3), ("gpipe", 3, 3), ("1f1b", 2, 4)):
        job = case.make()
        frozen = partial(torch.optim.SGD, lr=0.0)
        with compiled(job, stages, schedule, frozen, seed=seed) as pipe:
            torch.manual_seed(stages)  # the caller's random state plays no part, and is left alone
            before = torch.get_rng_state()
            runs[schedule, stages, seed] = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
            assert torch.equal(torch.get_rng_state(), before)
    first = runs["1f1b", 2, 3]
    assert runs["zb_v", 2, 3] == first == runs["gpipe", 3, 3]
    assert runs["1f1b", 2, 4] != first
    assert len(set(first)) == 3  # another mask each step


def test_optimizer_state_moves_to_a_plain_optimizer_and_back() -> None:
    for optimizer in (SGD, ADAMW):
        job = TRAINING["autoencoder"].make()
        with compiled(job, 3, "1f1b", optimizer) as pipe:
            for _ in range(3):
                pipe.train_step(job.inputs, job.targets)
            state, weights = pipe.optimizer_state_dict(), copy.deepcopy(pipe.state_dict())
            more = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(3)]
        # on in plain PyTorch
        eager = TRAINING["autoencoder"].make()
        eager.model.load_state_dict(weights)
        plain = optimizer(list(eager.model.parameters()))
        plain.load_state_dict(copy.deepcopy(state))
        found: list[float] = []
        for _ in range(3):
            plain.zero_grad()
            total = 0.0
            for x, y in zip(pieces_of(eager.inputs[0], PARTS), pieces_of(eager.targets, PARTS), strict=True):
                loss = eager.loss_fn(eager.model(x), y) / PARTS
                loss.backward()
                total += loss.item()
            plain.step()
            found.append(total)
        assert found == pytest.approx(more, rel=1e-10)
        # and on in another pipeline, cut otherwise
        again = TRAINING["autoencoder"].make()
        with compiled(again, 2, "gpipe", optimizer) as pipe:
            pipe.load_state_dict(weights)
            pipe.load_optimizer_state_dict(state)
            resumed = [float(pipe.train_step(again.inputs, again.targets)) for _ in range(3)]
        assert resumed == pytest.approx(more, rel=1e-10)


def test_a_learning_rate_set_between_steps_counts_from_the_next() -> None:
    job = mlp_job()
    with compiled(job, 2, "1f1b", SGD) as pipe:
        pipe.train_step(job.inputs, job.targets)
        pipe.set_optimizer(lr=0.0, momentum=0.0)
        before = copy.deepcopy(pipe.state_dict())
        pipe.train_step(job.inputs, job.targets)
        assert furthest(pipe.state_dict(), before) == 0.0


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient * 2.0


class Lossy(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.how = how
        if how == "module hook":
            self.second.register_full_backward_hook(lambda _m, gi, _go: tuple(g * 3 for g in gi))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        if self.how == "custom backward":
            x = Doubled.apply(x)
        if self.how == "tensor hook" and x.requires_grad:
            x.register_hook(lambda g: g * 2)
        return self.third(x)


@pytest.mark.parametrize(
    ("how", "layer"), [("custom backward", "second"), ("tensor hook", "second"), ("module hook", "first")]
)
def test_what_capture_loses_of_a_backward_is_named(how: str, layer: str) -> None:
    job = Job(Lossy(how), (torch.randn(4, 4),), torch.randn(4, 2), nn.MSELoss())
    with pytest.raises(TraceError, match=rf"gradients of the captured graph .* layer '{layer}' \(Linear\)"):
        compiled(job, 2, "1f1b", SGD, parts=2)


def test_bad_input_is_named() -> None:
    job = mlp_job()
    x, y = job.inputs[0], job.targets
    with pytest.raises(PlanError, match="there is no schedule 'zigzag': choose one of auto, gpipe, 1f1b"):
        compiled(job, 2, "zigzag", SGD)
    with pytest.raises(InputError, match=r"micro_batches=9: a batch of 8 samples has 1 to 8 micro-batches"):
        compiled(job, 2, "1f1b", SGD, parts=9)
    with pytest.raises(TraceError, match="nothing to train"):
        compiled(Job(copy.deepcopy(job.model).requires_grad_(False), job.inputs, y, job.loss_fn), 2, "1f1b", SGD)
    with compiled(job, 2, "1f1b", SGD) as pipe:
        with pytest.raises(InputError, match="a batch of 6 samples, compiled for 8: 4 micro-batches of 2"):
            pipe.train_step(x[:6], y[:6])
        with pytest.raises(InputError, match=r"the target has shape \(6,\), the batch 8 samples"):
            pipe.train_step(x, y[:6])
        with pytest.raises(InputError, match=r"has dtype torch\.float32, compiled for torch\.float64"):
            pipe.train_step(x.float(), y)
        assert float(pipe.train_step(x, y)) > 0  # none of that harmed it
        with pytest.raises(StepError, match=r"(?s)stage 1 on device 1 raised IndexError in step 1|Target 77 is out of"):
            pipe.train_step(x, torch.full_like(y, 77))
        assert float(pipe.train_step(x, y)) > 0
        pipe.close()
        with pytest.raises(PipelineClosed, match="it was closed"):
            pipe.train_step(x, y)


@pytest.mark.parametrize(
    ("loss_fn", "reason"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "reduction 'none': a loss must be reduced"),
        (lambda out, y: out, r"loss_fn returned a tensor of shape \(2, 5\)"),
        (lambda out, y: 3.0, "loss_fn returned float"),
        (lambda out, y: out.detach().sum(), "the loss depends on nothing that has gradients"),
    ],
)
def test_losses_that_cannot_be_used(loss_fn: Any, reason: str) -> None:
    job = mlp_job()
    with (
        compiled(Job(job.model, job.inputs, job.targets, loss_fn), 2, "1f1b", SGD) as pipe,
        pytest.raises((InputError, StepError), match=reason),
    ):
        pipe.train_step(job.inputs, job.targets)


def test_a_micro_batch_whose_targets_are_all_ignored_counts_for_nothing() -> None:
    job = mlp_job()
    targets = job.targets.clone()
    targets[:2] = -100
    with torch.no_grad():
        wanted = nn.CrossEntropyLoss()(copy.deepcopy(job.model)(*job.inputs), targets)
    with compiled(job, 2, "zb_h1", SGD) as pipe:
        assert float(pipe.train_step(job.inputs, targets)) == pytest.approx(float(wanted), rel=1e-12)
        assert all(bool(torch.isfinite(g).all()) for g in pipe.gradients().values())


def test_one_micro_batch_and_one_stage() -> None:
    for stages, parts in ((1, 4), (2, 1), (1, 1)):
        job, wanted = mlp_job(), reference(mlp_job(), SGD, parts=parts)
        with compiled(job, stages, "1f1b", SGD, parts) as pipe:
            agree(pipe, job, wanted, 1e-10)


def test_the_generated_module_shows_its_parts() -> None:
    job = TRAINING["gpt2"].make()
    with compiled(job, 3, "zb_h1", SGD) as pipe:
        first, last = (pipe.step_package.package.modules[i].source for i in (0, 2))
    for name in ("forward_0", "backward_input_0", "backward_weight_0"):
        assert f"def {name}(" in first
    assert "0REDUCE0@2>0:tied" in first
    assert "link.update(0)  # 0STEP0" in first
    assert "loss = loss_of(" in last
    assert "draw(" in first


def test_a_model_in_train_mode_keeps_the_modes_of_its_submodules_and_is_left_as_it_was() -> None:
    job = TRAINING["frozen"].make()
    frozen_norm = job.model.get_submodule("0.1")
    before = copy.deepcopy(frozen_norm.state_dict())
    with compiled(job, 2, "1f1b", SGD) as pipe:
        pipe.train_step(job.inputs, job.targets)
        assert all(torch.equal(value, before[name]) for name, value in frozen_norm.state_dict().items())
        assert pipe.eval().training is False
        assert not job.model.training
    assert job.model.get_submodule("1.1").num_batches_tracked.item() == PARTS  # once a micro-batch, as eager would
    assert all(parameter.grad is None for parameter in job.model.parameters())
