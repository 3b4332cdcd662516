"""pipecompile: a compiler from a PyTorch model to a pipelined executable.

The public names are loaded at first use: importing torch takes two seconds, and the command's
``--help`` or an error class should not wait for it (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipecompile._version import __version__
    from pipecompile.driver import compile, load
    from pipecompile.errors import (
        ArtefactError,
        InputError,
        PipecompileError,
        PipecompileWarning,
        PipelineClosed,
        PipelineError,
        PlanError,
        ProgramError,
        StageError,
        StepError,
        TraceError,
        WorkerDied,
        WorkerHung,
    )
    from pipecompile.ir.cluster import Cluster, Device, Link
    from pipecompile.pipeline import InferencePipeline
    from pipecompile.training import TrainingPipeline

_HOME = {
    "__version__": "_version",
    "compile": "driver",
    "load": "driver",
    "InferencePipeline": "pipeline",
    "TrainingPipeline": "training",
    "Cluster": "ir.cluster",
    "Device": "ir.cluster",
    "Link": "ir.cluster",
}

__all__ = [
    "ArtefactError",
    "Cluster",
    "Device",
    "InferencePipeline",
    "InputError",
    "Link",
    "PipecompileError",
    "PipecompileWarning",
    "PipelineClosed",
    "PipelineError",
    "PlanError",
    "ProgramError",
    "StageError",
    "StepError",
    "TraceError",
    "TrainingPipeline",
    "WorkerDied",
    "WorkerHung",
    "__version__",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
