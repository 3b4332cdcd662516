"""pipecompile: a compiler from a PyTorch model to a pipelined executable.

The public names are loaded at first use: importing torch takes two seconds, and the command's
``--help`` or an error class should not wait for it (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipecompile import losses, sources
    from pipecompile._version import __version__
    from pipecompile.decorator import pipeline
    from pipecompile.driver import compile, load
    from pipecompile.errors import (
        ArtefactError,
        InputError,
        NonFiniteError,
        Overloaded,
        PipecompileError,
        PipecompileWarning,
        PipelineClosed,
        PipelineError,
        PlanError,
        ProgramError,
        SampleDropped,
        StageError,
        StepError,
        TraceError,
        WorkerDied,
        WorkerHung,
    )
    from pipecompile.ir.cluster import Cluster, Device, Link
    from pipecompile.ir.learning import Learned, LearnTimes
    from pipecompile.ir.sample import Counts, Record, Result, Sample
    from pipecompile.pipelines.inference import InferencePipeline
    from pipecompile.pipelines.learning import LearningPipeline
    from pipecompile.pipelines.training import TrainingPipeline
    from pipecompile.streams.pulled import Stream
    from pipecompile.streams.pushed import Results
    from pipecompile.streams.ticket import Ticket

#: Packages reached by attribute: ``pipecompile.sources.VideoFile``.
_ROOMS = ("losses", "sources")

_HOME = {
    "__version__": "_version",
    "compile": "driver",
    "load": "driver",
    "pipeline": "decorator",
    "InferencePipeline": "pipelines.inference",
    "TrainingPipeline": "pipelines.training",
    "Cluster": "ir.cluster",
    "Device": "ir.cluster",
    "Link": "ir.cluster",
    "LearnTimes": "ir.learning",
    "Learned": "ir.learning",
    "LearningPipeline": "pipelines.learning",
    "Counts": "ir.sample",
    "Record": "ir.sample",
    "Result": "ir.sample",
    "Sample": "ir.sample",
    "Results": "streams.pushed",
    "Stream": "streams.pulled",
    "Ticket": "streams.ticket",
}

__all__ = [
    "ArtefactError",
    "Cluster",
    "Counts",
    "Device",
    "InferencePipeline",
    "InputError",
    "LearnTimes",
    "Learned",
    "LearningPipeline",
    "Link",
    "NonFiniteError",
    "Overloaded",
    "PipecompileError",
    "PipecompileWarning",
    "PipelineClosed",
    "PipelineError",
    "PlanError",
    "ProgramError",
    "Record",
    "Result",
    "Results",
    "Sample",
    "SampleDropped",
    "StageError",
    "StepError",
    "Stream",
    "Ticket",
    "TraceError",
    "TrainingPipeline",
    "WorkerDied",
    "WorkerHung",
    "__version__",
    "compile",
    "load",
    "losses",
    "pipeline",
    "sources",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module it lives in."""
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
