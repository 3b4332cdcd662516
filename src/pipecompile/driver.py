"""compile() and load(): what users call."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

import torch
from torch import nn

from pipecompile import artefact
from pipecompile.clusters import check_runs_here, make_cluster
from pipecompile.errors import InputError
from pipecompile.ir.cluster import Link
from pipecompile.ir.package import Package
from pipecompile.options import InferenceOptions, LearningOptions, Mode, TrainingOptions, check_options, check_values
from pipecompile.passes.partition import with_memory
from pipecompile.pipelines.infer_driver import compile_inference
from pipecompile.pipelines.inference import InferencePipeline
from pipecompile.pipelines.learn_driver import compile_learning
from pipecompile.pipelines.learning import LearningPipeline
from pipecompile.pipelines.train_artefact import SavedTraining
from pipecompile.pipelines.train_driver import compile_training
from pipecompile.pipelines.training import TrainingPipeline, resume_training
from pipecompile.runtime.batches import Reduction
from pipecompile.runtime.update import OptimizerFactory
from pipecompile.streams.engine import ExecutorName, OnFailure
from pipecompile.streams.entrance import Overload

#: What carries out each mode: called with model, args, kwargs, cluster and the options of the mode.
_MODES: Mapping[str, Any] = {"infer": compile_inference, "train": compile_training, "learn": compile_learning}

#: Torch's tracing keeps state of the whole process, and two that time a model at once would time each other.
_one_at_a_time = threading.RLock()


@overload
def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Literal["infer"] = "infer",
    **options: Unpack[InferenceOptions],
) -> InferencePipeline: ...


@overload
def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Literal["train"],
    **options: Unpack[TrainingOptions],
) -> TrainingPipeline: ...


@overload
def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Literal["learn"],
    **options: Unpack[LearningOptions],
) -> LearningPipeline: ...


def compile(
    model: nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    mode: Mode = "infer",
    **options: Any,
) -> InferencePipeline | TrainingPipeline | LearningPipeline:
    """Compile ``model``, called as ``model(*example_inputs, **example_kwargs)``, into a pipeline.

    Of several threads that call it one compiles at a time.

    Args:
        model: any module that ``torch.export`` can capture, on the CPU, or on the card it is to be trained on.
            Its own mode is left as it is.
            Its parameters stay its own objects and share their storage with the pipeline from the
            first use on.
        example_inputs: positional arguments of one call; a single tensor may stand alone.
        example_kwargs: keyword arguments of that call.
        mode: ``"infer"``: the model is compiled in eval mode. ``"train"``: in train mode, for one batch
            of the size of the example. ``"learn"``: in train mode, for samples like the example.
        options: those of every mode, and those of the chosen one.

    Keyword Args:
        devices: how many cores to use, names such as ``["cpu:0", "cpu:1"]``, or a Cluster. The link
            of a Cluster that names none is measured. (train) ``["cuda:0", "cuda:0"]``: two streams of a card.
        leaf: modules never cut inside: path patterns (``"encoder.layer.*"``) or module classes.
        ahead: how many messages a stage receives ahead of the one it works on; chosen if None.
        executor: ``"process"``, a pinned worker a device, or ``"inline"``, all in this process
            (slow; for debugging, breakpoints and tests).
        memory: bytes (or ``"2 GiB"``) each device may take, or a mapping by device name.
        time_limit: seconds the planner may take; the best plan found until then is kept. In training, those of all
            the plans it chooses from together, with half a second for each search at the least.
        profile_seconds: about how long to time the model.
        hang_seconds: how long a worker may compute one sample; max(2 s, 10 x profiled) if None.
        throttle: slow down edges (``{"0>1": Link(latency, bandwidth)}``): to try a slower network.
        imports: modules the workers import first because they register custom operators. Those in which
            ``torch.library.custom_op`` made an operator of the model are found without.
        progress: called as ``progress(phase, fraction)`` while compiling.
        dynamic_shapes: (infer) sizes that may differ from sample to sample, as for ``torch.export.export``.
        pin: (infer) layers that must run on a device: ``{"encoder.*": "cpu:0"}``, patterns of layer names or
            module paths to a device's name or several.
        colocate: (infer) patterns whose layers share a stage: ``["encoder.0.*", ["embed", "head"]]``.
        replicate: (infer) whether a stage may have copies on several devices, which take samples in turn (at
            the cost of its weights in each one's caches). The best plan with copies and the best without
            are measured and simulated; where they come close, both run in workers for a moment.
        objective: (infer) ``"throughput"`` (the busiest device's time per sample), ``"latency"`` (one
            sample's time through all stages), or ``("throughput", 0.02)``: the same, while the other
            stays at most so many seconds.
        use_cache: (infer) keep profiles on disk and use them again for the same graph on the same machine.
        on_overload: (infer) what happens to samples that come too fast; the default of ``stream()``, and
            the policy of ``submit()``: ``"block"``, ``"drop_oldest"``, ``"drop_newest"``,
            ``"latest"`` or ``"error"``.
        max_in_flight: (infer) how many samples may be inside the pipeline; as many as its rings hold if None.
        deadline: (infer) seconds within which a sample must have entered, else it is dropped.
        on_failure: (infer, learn) ``"raise"``: a worker that dies or hangs ends the pipeline with one exception.
            ``"restart"``: the workers are replaced and the samples in flight computed again, from
            copies kept meanwhile; buffers that the model writes to are put back to a snapshot
            first. After three deaths in a row without a new result the last one is raised.
        loss_fn: (train, learn) called as ``loss_fn(result, target)`` in the last stage; gives a scalar.
        optimizer: (train, learn) called with a list of parameters, such as
            ``functools.partial(torch.optim.SGD, lr=0.1)``; one is made for each stage. In training, without
            both ``pipe(x)`` takes part in autograd, for a loss and an optimizer of the caller's (schedules
            ``"gpipe"`` and ``"breadth_first"`` only).
        param_groups: (train) parameter groups as torch's optimizers take them, or a function of the model that
            gives them: ``[{"params": ["*.bias", "*norm*"], "weight_decay": 0.0}, {"params": "*"}]``. ``params``
            are parameters, their names, or patterns of names; a parameter is in the first group it fits.
        schedule: (train) ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"breadth_first"``, ``"zb_h1"``,
            ``"zb_v"``, or ``"auto"``, which measures the stages and simulates all of them.
        micro_batches: (train) into how many parts a batch is split along dimension 0. ``"auto"`` tries one, two,
            four and eight a device (or divisors of the batch close by) and takes the fastest within ``memory_limit``:
            by simulation, and where several are close, by trial in workers. The plan's notes say what was considered.
        data_parallel: (train) how many equal pipelines share the devices and, in turn, the micro-batches of a step;
            each has the whole model, every weight is updated once, by one of them. None: one; but where schedule
            and micro_batches are ``"auto"``, a pipeline on each device is tried, too. Not for models that write to
            buffers, such as running statistics.
        dynamic_batch: (train) batches may be smaller than the example, such as the last one of an epoch: they make
            fewer micro-batches. So it is without it where ``micro_batches`` does not divide the example batch.
        autocast: (train) ``torch.bfloat16``: stages compute under torch's autocast, as the model would in plain
            PyTorch. The loss is computed outside of it, on results made float32.
        reduction: (train) how the loss is reduced where ``loss_fn`` does not say: ``"mean"``, ``"sum"``,
            or a function of a target that counts what its mean is over.
        example_targets: (train, learn) targets of the example, to measure the last stage with.
        clip_norm: (train, learn) the largest norm of all gradients together; learning, of those of a stage.
        memory_limit: (train) bytes of activations a device may keep; ``schedule="auto"`` chooses within it.
        recompute: (train) ``"none"``; ``"stage"``: stages keep what they receive and compute the rest again
            for the backward; ``"auto"``: as few of them as ``memory_limit`` asks for.
        deferred_batch_norm: (train) running statistics are updated once a step, with those of the whole
            batch (each micro-batch is normalised by its own all the same).
        seed: (train, learn) of dropout masks.
        keep_gradients: (train) for ``pipe.gradients()``.
        check_finite: (train) a step whose loss or gradients are NaN or infinite raises before the update.
        updates: (learn) ``"sync"``, ``"weight_stashing"``, ``"2bw"``, ``"stale"`` or ``"sideways"``: which
            weights a backward sees. See docs/learning.md.
        clock: (learn) ``"1f1b"``, or ``"lockstep"``, PARTIME's, which doubles the delay.
        accumulate: (learn) samples of one update; None is 1, or as few as ``"2bw"`` needs.
        on_nonfinite: (learn) a loss that is not finite ends the pipeline (``"stop"``) or makes no
            update and takes back what its sample did to buffers (``"skip"``).
        snapshot_every: (learn) with ``on_failure="restart"`` a snapshot is taken after so many samples, and
            samples are kept until the next: what followed the last snapshot is learned again.
        scale_lr: (learn) divide each stage's learning rate by 1 + its delay.

    Raises:
        TraceError: if the model cannot be captured or its graph differs from eager.
        PlanError: if ``devices`` makes no sense, or no plan meets pins, colocation, memory and objective.
        InputError: if example inputs or options cannot be used.
    """
    check_options(mode, options)
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise InputError(f"compile() takes a model, got its class: give it {model.__name__}(...)")
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"compile() takes an nn.Module, got {type(model).__name__}: put it into a module's forward()")
    if isinstance(example_inputs, Mapping):
        raise InputError("example_inputs are the positional arguments; give a dict of keywords as example_kwargs=")
    _import_aside("pulp")
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    devices = options.pop("devices", 2)
    cluster = with_memory(make_cluster(devices), options.pop("memory", None))
    if mode == "train" and isinstance(devices, int):  # so many cores, however they are best used
        options["threads"] = min(devices, len({device.core for device in cluster.devices}))
    check_runs_here(cluster, mode, options.get("executor"))
    if cluster.card is not None:
        options["executor"] = "inline"
    with _one_at_a_time:
        return _MODES[mode](model, args, dict(example_kwargs or {}), cluster, **options)


def _import_aside(module: str) -> None:
    """Import in a thread of its own.

    PuLP keeps the tracebacks of imports that failed within it, and these keep every frame of whoever
    imported it first: the model compiled first, and the workers of its pipeline, would never end.
    """
    if module not in sys.modules:
        thread = threading.Thread(target=importlib.import_module, args=(module,))
        thread.start()
        thread.join()


@overload
def load(
    path: str | os.PathLike[str],
    *,
    mode: Literal["infer"] = "infer",
    executor: ExecutorName = "process",
    trust: bool = False,
    hang_seconds: float | None = None,
    on_overload: Overload = "block",
    max_in_flight: int | None = None,
    deadline: float | None = None,
    on_failure: OnFailure = "raise",
    throttle: Mapping[str, Link] | None = None,
) -> InferencePipeline: ...


@overload
def load(
    path: str | os.PathLike[str],
    *,
    mode: Literal["train"],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    reduction: Reduction | None = None,
    executor: ExecutorName = "process",
    trust: bool = False,
    hang_seconds: float | None = None,
    throttle: Mapping[str, Link] | None = None,
) -> TrainingPipeline: ...


def load(
    path: str | os.PathLike[str],
    *,
    mode: Literal["infer", "train"] = "infer",
    loss_fn: Callable[[Any, Any], Any] | None = None,
    optimizer: OptimizerFactory | None = None,
    reduction: Reduction | None = None,
    executor: ExecutorName = "process",
    trust: bool = False,
    hang_seconds: float | None = None,
    on_overload: Overload = "block",
    max_in_flight: int | None = None,
    deadline: float | None = None,
    on_failure: OnFailure = "raise",
    throttle: Mapping[str, Link] | None = None,
) -> InferencePipeline | TrainingPipeline:
    """Load a pipeline written by ``save()``; the model's source is not needed. Options as for :func:`compile`.

    Training goes on where it was saved, bit for bit; ``loss_fn`` and ``optimizer`` are code of the caller's, which
    a saved pipeline does not hold, and are given again.

    Raises:
        ArtefactError: if a file is missing, altered, too new, of another mode, or holds code that is not
            allowed (``trust=True`` allows custom operators).
        InputError: if a training pipeline was compiled with a loss and gets none, or the reverse.
    """
    check_values({"hang_seconds": hang_seconds, "throttle": throttle})
    if mode == "train":
        saved = SavedTraining.load(path, trust=trust)
        return resume_training(
            saved, _skeleton(saved.step.package, saved.tensors), loss_fn, optimizer, reduction=reduction,
            executor=executor, hang_seconds=hang_seconds, throttle=throttle,
        )  # fmt: skip
    if loss_fn is not None or optimizer is not None or reduction is not None:
        raise InputError("loss_fn=, optimizer= and reduction= are for training: load with mode='train'")
    package, tensors = artefact.load(path, trust=trust)
    model = _skeleton(package, tensors)
    return InferencePipeline(
        package,
        tensors,
        model,
        executor=executor,
        hang_seconds=hang_seconds,
        throttle=throttle,
        on_overload=on_overload,
        max_in_flight=max_in_flight,
        deadline=deadline,
        on_failure=on_failure,
    )


class _Skeleton(nn.Module):
    """Parameters and buffers of a model whose code is not here."""

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        """Only the model's own class knows."""
        raise InputError(
            "a loaded training pipeline has no model to evaluate with, only its stages for training steps: "
            "model.load_state_dict(pipe.state_dict()) on a model of yours, and call that"
        )


def _skeleton(package: Package, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module tree that holds a loaded package's parameters and buffers under their old names; ties stay ties."""
    root, known = _Skeleton(), dict[Any, nn.Parameter]()
    for entry in package.state:
        if entry.kind == "constant":
            continue
        *path, key = entry.fqn.split(".")
        owner = root
        for part in path:
            child = owner._modules.get(part)  # pyright: ignore[reportPrivateUsage]
            if child is None:
                child = nn.Module()
                owner.add_module(part, child)
            owner = child
        if entry.kind == "buffer":
            owner.register_buffer(key, tensors[entry.name], persistent=entry.persistent)
        else:
            tensor = tensors[entry.name]
            place = (tensor.data_ptr() or entry.name, tensor.shape, tensor.stride())
            parameter = known.setdefault(place, nn.Parameter(tensor, requires_grad=entry.requires_grad))
            owner.register_parameter(key, parameter)
            tensors[entry.name] = parameter  # type: ignore[index]
    return root
