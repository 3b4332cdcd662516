"""Models of other kinds than the zoo's, cut as measured, in worker processes: the same numbers as plain PyTorch."""

from __future__ import annotations

import pytest

from models.training_more import MORE
from oracles.training import train
from test_training import ADAMW, PARTS, SCHEDULES, SGD, compiled, furthest, loss_shares

_STEPS = 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [(name, i) for i, name in enumerate(MORE)], ids=str)
def test_other_models_train_in_workers_as_in_plain_pytorch(name: str, number: int) -> None:
    case, schedule = MORE[name], [*SCHEDULES, "auto"][number % 7]
    job, twin, optimizer = case.make(), case.make(), ADAMW if number % 2 else SGD
    wanted = train(
        twin.model, twin.inputs, twin.targets, twin.loss_fn, optimizer, parts=PARTS, weights=loss_shares(twin, PARTS),
        steps=_STEPS,
    )  # fmt: skip
    with compiled(job, case.devices, schedule, optimizer, executor="process", **case.options) as pipe:
        losses = [float(pipe.train_step(job.inputs, job.targets)) for _ in range(_STEPS)]
    assert losses == pytest.approx(wanted.losses, rel=1e-10)
    # statistics that are deferred are others by design
    weights = [name for name, _ in job.model.named_parameters()]
    mine, theirs = job.model.state_dict(), wanted.model.state_dict()
    names = weights if case.options else list(mine)
    assert furthest({n: mine[n] for n in names}, {n: theirs[n] for n in names}) <= 1e-10
    assert len(set(losses)) == _STEPS
