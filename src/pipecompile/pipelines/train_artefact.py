"""A training pipeline as a folder: what an inference pipeline is saved as, and what training goes on from.

``training.safetensors`` is a checkpoint without weights, which lie beside it: the optimizers' state,
the number of steps, and the options of the pipeline. Loss and optimizer are code of the caller's and
are given again when it is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipecompile import artefact
from pipecompile._version import __version__
from pipecompile.errors import ArtefactError
from pipecompile.ir.training import StageCost, StepPackage
from pipecompile.pipelines.checkpoint import Checkpoint

FILE = "training.safetensors"


@dataclass(frozen=True)
class SavedTraining:
    """What a folder holds. ``options`` are those of :class:`pipecompile.pipelines.training.TrainingPipeline`."""

    step: StepPackage
    tensors: dict[str, torch.Tensor]
    costs: tuple[StageCost, ...]
    options: Mapping[str, Any]
    resume: Checkpoint

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the folder, whole or not at all.

        Raises:
            ArtefactError: if it cannot be written or holds something else.
            InputError: if an option is no JSON data.
        """
        extra = {
            "owned": [[stage, list(names)] for stage, names in self.step.owned.items()],
            "batched": list(self.step.batched),
            "batch": [self.step.batch, self.step.smaller],
            "costs": [cost.to_json() for cost in self.costs],
            "options": dict(self.options),
        }
        found = Checkpoint({}, self.resume.optimizer, self.resume.steps, extra)

        def more(folder: Path) -> None:
            found.save(folder / FILE)

        return artefact.save(self.step.package, self.tensors, path, __version__, mode="train", more=more)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: bool = False) -> SavedTraining:
        """Read the folder.

        Raises:
            ArtefactError: as :func:`pipecompile.artefact.load`.
        """
        package, tensors = artefact.load(path, trust=trust, mode="train")
        try:
            found = Checkpoint.load(Path(path) / FILE)
            extra = found.extra
            owned = {stage: tuple(names) for stage, names in extra["owned"]}
            step = StepPackage(package, owned, tuple(extra["batched"]), *extra["batch"])
            costs = tuple(StageCost(**cost) for cost in extra["costs"])
            return cls(step, tensors, costs, extra["options"], found)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise ArtefactError(
                f"{path}: {FILE} does not fit the rest ({type(error).__name__}: {error}): save the pipeline again"
            ) from error


__all__ = ["SavedTraining"]
