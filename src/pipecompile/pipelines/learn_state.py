"""What a pipeline has learned, taken out as one snapshot and put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipecompile.errors import InputError, PipelineError
from pipecompile.pipelines.model_weights import ModelWeights
from pipecompile.runtime.learn_host import Learner


class LearnState:
    """Model and optimizers. What is put back or set without a learner waits for the next one."""

    def __init__(self, weights: ModelWeights, model: nn.Module) -> None:
        self._weights, self._model = weights, model
        self._carried: tuple[dict[str, Any], dict[str, Any], int | None] = {}, {}, None

    def snapshot(self, learner: Learner | None, samples: int) -> dict[str, Any]:
        """As it is now, when nothing is in flight."""
        if learner is not None:
            return self.assembled(learner.states(), samples)
        state, settings, version = self._carried
        groups = dict.fromkeys(self._weights.positions(), settings)
        return self.assembled([{"state": state, "groups": groups, "version": version or 0}], samples)

    def assembled(self, parts: Sequence[Mapping[str, Any]], samples: int) -> dict[str, Any]:
        """A snapshot from what the stages say.

        Raises:
            PipelineError: if they have not made the same number of updates.
        """
        versions = {part["version"] for part in parts if part.get("groups")}
        if len(versions) > 1:
            raise PipelineError(f"the parts of a snapshot are of different versions: {sorted(versions)}")
        tensors = {name: value for part in parts for name, value in part.get("tensors", {}).items()}
        state = {name: value for part in parts for name, value in part.get("state", {}).items()}
        groups = {name: value for part in parts for name, value in part.get("groups", {}).items()}
        return {
            "model": self._weights.state_dict(tensors),
            "optimizer": self._weights.packed(copy.deepcopy(state), groups),
            "samples": samples,
            "updates": max(versions, default=0),
        }

    def put_back(self, snapshot: Mapping[str, Any], learner: Learner | None) -> None:
        """Values of a snapshot: the model's at once, the optimizers' now or with the next learner.

        Raises:
            InputError: if it is none, or one of another model; nothing has been changed then.
        """
        missing = [name for name in ("model", "optimizer", "samples", "updates") if name not in snapshot]
        if missing:
            raise InputError(f"this is no snapshot, it has no {missing[0]!r}: give what pipe.snapshot() gave")
        mine, theirs = self._model.state_dict(), snapshot["model"]
        names = sorted(mine.keys() ^ theirs.keys())
        names += [n for n in mine if n in theirs and torch.is_tensor(mine[n]) and mine[n].shape != theirs[n].shape]
        if names:
            raise InputError(f"this is a snapshot of another model: they differ in {', '.join(map(repr, names[:5]))}")
        state, (settings,) = self._weights.unpacked(snapshot["optimizer"])
        self._model.load_state_dict(theirs)
        self._carried = state, settings, int(snapshot["updates"])
        if learner is not None:
            self.hand_over(learner)

    def set(self, settings: Mapping[str, Any], learner: Learner | None) -> None:
        """Change settings of all optimizers."""
        state, known, version = self._carried
        self._carried = state, {**known, **settings}, version
        if learner is not None:
            learner.load({}, settings, None)

    def hand_over(self, learner: Learner) -> None:
        """Give a learner what waits for it."""
        if self._carried != ({}, {}, None):
            learner.load(*self._carried)


__all__ = ["LearnState"]
