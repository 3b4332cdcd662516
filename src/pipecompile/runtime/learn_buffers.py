"""The buffers that forwards of one stage write to: copied for snapshots, put back where a sample is skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class Buffers:
    """Running statistics and the like, which every forward changes in the order of the samples.

    With ``undo`` there is a copy from before the forward of each sample under way, and a sample that
    is skipped takes back what it did: the buffers are again as before its forward. What the samples
    behind it have added meanwhile goes with it, since it was built upon its values, which may be NaN.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], names: Sequence[str], undo: bool) -> None:
        self._tensors = {name: tensors[name] for name in names}
        self._undo = undo and bool(names)
        self._before: dict[int, dict[str, torch.Tensor]] = {}
        self._marked: dict[int, dict[str, torch.Tensor]] = {}
        self._latest = -1

    def begin(self) -> None:
        """A stream begins; nothing is under way."""
        self._before.clear()
        self._marked.clear()
        self._latest = -1

    def forward(self, sample: int, *, marked: bool, judged: bool) -> None:
        """The forward of a sample is about to write to them. ``judged``: it may yet be skipped."""
        self._settle()
        if judged and self._undo:
            self._before[sample] = self._copies()
        if marked:
            self._latest = sample

    def _settle(self) -> None:
        """Copy what the forward of a marked sample has left, before the next one changes it."""
        if self._latest >= 0:
            self._marked[self._latest], self._latest = self._copies(), -1

    def passed(self, sample: int, *, learned: bool) -> None:
        """A sample is through. One that may be skipped, and was not learned from, is undone."""
        before = self._before.pop(sample, None)
        if before is None or learned:
            return
        for name, value in before.items():
            self._tensors[name].data.copy_(value)  # not counted: graphs of later samples hold them too
        # What later samples would put back is no better than what they were given.
        self._before.clear()
        self._marked.update((number, before) for number in self._marked if number >= sample)

    def of(self, sample: int) -> dict[str, torch.Tensor]:
        """By name, as after the forward of a marked sample; to be asked for once."""
        self._settle()
        return self._marked.pop(sample)

    def _copies(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._tensors.items()}


__all__ = ["Buffers"]
