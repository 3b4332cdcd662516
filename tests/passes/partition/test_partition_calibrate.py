"""Layer times corrected by stages: agreement with the measurements, and no more change than needed."""

from __future__ import annotations

import numpy as np
import pytest

from pipecompile.errors import PlanError
from pipecompile.ir.cluster import Link
from pipecompile.ir.profile import Profile
from pipecompile.passes.partition import calibrate


def profile(*seconds: float) -> Profile:
    return Profile(seconds, {}, Link(), sum(seconds))


def test_without_measurements_nothing_changes() -> None:
    before = profile(1.0, 2.0)
    assert calibrate(before, []) == before
    assert calibrate(before, [((0,), 1.0), ((1,), 2.0)]).seconds == pytest.approx((1.0, 2.0))


def test_a_stage_agrees_with_its_measurement_and_others_stay() -> None:
    after = calibrate(profile(1.0, 1.0, 1.0, 1.0), [((0, 1), 3.0)])
    assert sum(after.seconds[:2]) == pytest.approx(3.0, rel=0.03)
    assert after.seconds[0] == pytest.approx(after.seconds[1])
    assert after.seconds[2:] == (1.0, 1.0)


def test_overlapping_cuts_find_the_layer_that_was_wrong() -> None:
    truth = np.array([1.0, 1.0, 2.0, 1.0, 1.0, 1.0])
    cuts = [[(0, 1, 2), (3, 4, 5)], [(0, 1), (2, 3, 4, 5)], [(0, 1, 2, 3), (4, 5)]]
    measured = [(stage, float(truth[list(stage)].sum())) for cut in cuts for stage in cut]
    after = np.array(calibrate(profile(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), measured).seconds)
    assert after == pytest.approx(truth, rel=0.05)
    # One cut alone can only spread the surplus over its stage.
    one = np.array(calibrate(profile(*[1.0] * 6), measured[:2]).seconds)
    assert one[:3] == pytest.approx([4 / 3] * 3, rel=0.02)


def test_noise_is_averaged_not_chased() -> None:
    rng = np.random.default_rng(0)
    noisy = [((0, 1), float(2.0 * rng.normal(1.0, 0.02))) for _ in range(200)]
    assert sum(calibrate(profile(1.0, 1.0), noisy).seconds) == pytest.approx(2.0, rel=0.005)


def test_a_wild_measurement_changes_no_layer_beyond_the_limit() -> None:
    after = calibrate(profile(1.0, 1.0), [((0, 1), 1e6)])
    assert max(after.seconds) == 5.0
    assert calibrate(profile(0.0, 1.0), [((0,), 1.0)]).seconds == (0.0, 1.0)


@pytest.mark.parametrize(
    ("stage", "message"), [(((7,), 1.0), "the profile has 2 layers"), (((0,), 0.0), "take 0.0 s")]
)
def test_senseless_measurements_are_refused(stage: tuple[tuple[int, ...], float], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        calibrate(profile(1.0, 1.0), [stage])
