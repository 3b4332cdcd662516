"""Every error pipecompile raises on purpose derives from :class:`PipecompileError`."""

from __future__ import annotations


class PipecompileError(Exception):
    """Base of all errors raised by pipecompile."""


class TraceError(PipecompileError):
    """The model could not be captured, or the captured graph does not behave like the model."""


class PlanError(PipecompileError):
    """No plan satisfies the request (devices, pins, memory)."""


class ProgramError(PipecompileError):
    """A Program breaks a rule: it could deadlock, use a value too early or overrun a ring."""


class InputError(PipecompileError):
    """A call does not match what the pipeline was compiled for."""


class ArtefactError(PipecompileError):
    """A saved pipeline is incomplete, altered, too new, or asks for something not allowed."""


class PipelineError(PipecompileError):
    """A running pipeline failed. Base of the three ways in which it can."""


class StageError(PipelineError):
    """A stage raised while computing a sample."""


class StepError(PipelineError):
    """A stage raised in a training step. Names stage, device, micro-batch, layer and line."""


class WorkerDied(PipelineError):
    """The process of a device ended without being asked to."""


class WorkerHung(PipelineError):
    """A device made no progress for longer than the hang limit."""


class PipelineClosed(PipelineError):
    """The pipeline was used after ``close()`` or after it failed."""


class PipecompileWarning(UserWarning):
    """Something was decided for the user that they may want to know (fewer stages, shared cores)."""
