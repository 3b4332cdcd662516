"""Calibration: layer times that agree with what finished stages were measured to take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from pipecompile.errors import PlanError
from pipecompile.ir.profile import Profile

#: Standard deviations assumed of a layer's time in its place against its time in another cut, and
#: of a stage's measured time: relative.
LAYER_ERROR, STAGE_ERROR = 0.3, 0.02

#: No layer's time is changed by more than this factor.
LIMIT = 5.0


def calibrate(profile: Profile, measured: Iterable[tuple[Sequence[int], float]]) -> Profile:
    """The profile, changed as little as the measured stages demand.

    ``measured`` are stages, of one plan or of several, as ``(layers, seconds)``. Each says what a sum of
    layers takes. The layers' times are estimated from the profile (error ``LAYER_ERROR``) and
    all sums together (error ``STAGE_ERROR``) by least squares, so that stages that overlap in
    different cuts share what they tell, and a stage measured twice counts twice.

    Raises:
        PlanError: if a stage has layers the profile lacks, or a time that is no time.
    """
    seconds = np.asarray(profile.seconds, dtype=np.float64)
    rows: list[np.ndarray[tuple[int], np.dtype[np.float64]]] = []
    times: list[float] = []
    for layers, took in measured:
        if not all(0 <= layer < len(seconds) for layer in layers):
            raise PlanError(f"a stage of layers {tuple(layers)} was measured, the profile has {len(seconds)} layers")
        if not 0 < took < float("inf"):
            raise PlanError(f"a stage of layers {tuple(layers)} was measured to take {took} s")
        if seconds[list(layers)].sum() > 0:
            row = np.zeros(len(seconds))
            row[list(layers)] = 1.0
            rows.append(row)
            times.append(took)
    if not rows:
        return profile
    # x = s + V A' (A V A' + W)^-1 (t - A s), with V and W the squared errors.
    stages, target = np.array(rows), np.array(times)
    spread = (LAYER_ERROR * seconds) ** 2
    noise = np.diag((STAGE_ERROR * (stages @ seconds)) ** 2)
    inner = stages @ (spread[:, None] * stages.T) + noise
    found = seconds + spread * (stages.T @ np.linalg.solve(inner, target - stages @ seconds))
    found = np.clip(found, seconds / LIMIT, seconds * LIMIT)
    return replace(profile, seconds=tuple(found.tolist()))


__all__ = ["LAYER_ERROR", "LIMIT", "STAGE_ERROR", "calibrate"]
