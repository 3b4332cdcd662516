"""Every error pipecompile raises on purpose derives from :class:`PipecompileError`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial


class PipecompileError(Exception):
    """Base of all errors raised by pipecompile."""


class TraceError(PipecompileError):
    """The model could not be captured, or the captured graph does not behave like the model."""


class ExampleError(TraceError):
    """The model itself raises on the example inputs; ``__cause__`` is what it raised."""


class PlanError(PipecompileError):
    """No plan satisfies the request (devices, pins, memory)."""


class ProgramError(PipecompileError):
    """A Program breaks a rule: it could deadlock, use a value too early or overrun a ring."""


class InputError(PipecompileError):
    """A call does not match what the pipeline was compiled for."""


class ArtefactError(PipecompileError):
    """A saved pipeline is incomplete, altered, too new, or asks for something not allowed."""


class SampleDropped(PipecompileError):
    """A sample was dropped at the entrance, by the overload policy or because its deadline had passed."""


class Overloaded(PipecompileError):
    """A sample was refused because the entrance was full (``on_overload="error"``, or ``block`` timed out)."""


class PipelineError(PipecompileError):
    """A running pipeline failed. Base of the three ways in which it can.

    ``device`` and ``sample`` say where, as far as is known; -1 where it is not.
    """

    def __init__(self, message: str = "", *, device: int = -1, sample: int = -1) -> None:
        super().__init__(message)
        self.device, self.sample = device, sample


class StageError(PipelineError):
    """A stage raised while computing a sample. The sample is lost; the pipeline goes on with the next.

    Attributes:
        stage: number of the stage.
        device: number of the device it runs on.
        sample: number of the sample within its stream; -1 before the first.
        layer: the model's name of the layer, with its source line where known.
        line: the line of the generated module that raised.
        raised: class name of the exception.
        reason: its text.
        trace: its traceback on the device.
    """

    def __init__(
        self,
        *,
        raised: str,
        reason: str,
        trace: str = "",
        device: int = -1,
        stage: int = -1,
        sample: int = -1,
        layer: str = "",
        line: str = "",
    ) -> None:
        self.raised, self.reason, self.trace = raised, reason, trace
        self.stage, self.layer, self.line = stage, layer, line
        super().__init__(device=device, sample=sample)

    def __str__(self) -> str:
        """Everything known, traceback included."""
        where = f" in layer {self.layer}" if self.layer else ""
        when = f"at sample {self.sample}" if self.sample >= 0 else "before the first sample"
        return (
            f"stage {self.stage} on device {self.device} raised {self.raised} {when}{where}: {self.reason}\n"
            f"  at {self.line}\n\nTraceback on the device:\n{self.trace}"
        )

    def __reduce__(self) -> tuple[Callable[[], StageError], tuple[()]]:
        """Keyword arguments survive pickling and copying."""
        fields = ("raised", "reason", "trace", "device", "stage", "sample", "layer", "line")
        return partial(StageError, **{name: getattr(self, name) for name in fields}), ()


class StepError(PipelineError):
    """A stage raised in a training step. Names stage, device, micro-batch, layer and line."""


class NonFiniteError(StepError):
    """A loss or gradients are NaN or infinite (``check_finite=True``); nothing was updated.

    ``micro_batch`` is the one whose loss is, -1 where only gradients are: those of ``weights``.
    """

    def __init__(self, message: str = "", *, micro_batch: int = -1, weights: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.micro_batch, self.weights = micro_batch, weights


class WorkerDied(PipelineError):
    """The process of a device ended without being asked to."""


class WorkerHung(PipelineError):
    """A device made no progress for longer than the hang limit."""


class PipelineClosed(PipelineError):
    """The pipeline was used after ``close()`` or after it failed."""


class PipecompileWarning(UserWarning):
    """Something was decided for the user that they may want to know (fewer stages, shared cores)."""


def warn(text: str) -> None:
    """Say something as a :class:`PipecompileWarning` at the line of whoever called us, however deep."""
    warnings.warn(text, PipecompileWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """The ``stacklevel`` of the first frame that is neither ours nor torch's, seen from our caller."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("pipecompile", "torch"):
        level, frame = level + 1, frame.f_back
    return level
