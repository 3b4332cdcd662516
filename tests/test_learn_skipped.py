"""What a bad sample leaves behind: nothing in buffers, weights and snapshots. Gradients clipped, or left out."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from learners import learning, network, same, stream
from pipecompile.errors import InputError, PipecompileWarning, PipelineClosed, StepError

PLAIN = partial(torch.optim.SGD, lr=0.1)


def test_gradients_are_clipped_by_the_norm_of_each_stage() -> None:
    model, samples = network().train(), stream(12)
    update = PLAIN(list(model.parameters()))
    with learning(network(), 3, "sync", optimizer=PLAIN, clip_norm=0.05) as pipe:
        losses = [result.loss for result in pipe.learn(samples)]
        names = {entry.name: entry.fqn for entry in pipe.package.state}
        stages = [{names[name] for name in owned} for owned in pipe.learn_package.owned.values()]
        for (x, y), loss in zip(samples, losses, strict=True):
            update.zero_grad()
            plain = nn.functional.cross_entropy(model(x), y)
            plain.backward()
            assert plain.item() == loss
            for stage in stages:
                nn.utils.clip_grad_norm_([p for name, p in model.named_parameters() if name in stage], 0.05)
            update.step()
        assert same(dict(pipe.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("updates", ["weight_stashing", "2bw", "stale", "sideways"])
def test_a_sample_that_is_not_finite_leaves_no_trace(updates: str) -> None:
    """Not in the running statistics, nor in a snapshot taken right there; under `sideways` not in other's gradients."""
    samples = stream(30)
    samples[10] = samples[10][0] * math.nan, samples[10][1]
    snapshots: list[dict[str, Any]] = []
    with learning(network(), 3, updates, clock="lockstep", on_nonfinite="skip") as pipe:
        results = pipe.learn(samples)
        skipped: list[int] = []
        for result in results:
            skipped += [result.seq] if result.skipped else []
            if result.seq >= 4 and len(snapshots) < 8:
                snapshots.append(pipe.snapshot())
            if result.seq == 29 and updates == "sideways":
                with pytest.warns(PipecompileWarning, match=r"were left out: 2 on device 0, 1 on device 1"):
                    assert next(results, None) is None
        assert skipped == [10]
        # There stage 1 has the activations of 10 when the error of 8 comes, stage 0 when that of 6 does, and what
        # stage 1 makes of 8 is no number either.
        assert pipe.left_out == 3 * (updates == "sideways")
        snapshots.append(pipe.snapshot())
    assert any(snapshot["samples"] > 10 for snapshot in snapshots[:3])
    for snapshot in snapshots:
        assert all(bool(value.isfinite().all()) for value in snapshot["model"].values()), snapshot["samples"]
    with learning(network(), 1, on_nonfinite="skip") as pipe:  # one stage: exactly as if it had not been there
        list(pipe.learn(samples))
        found = dict(pipe.state_dict())
    with learning(network(), 1) as pipe:
        list(pipe.learn(samples[:10] + samples[11:]))
        assert same(found, dict(pipe.state_dict()))


class Root(nn.Module):
    """A finite loss with an infinite gradient where the targets are all 2."""

    def forward(self, result: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        rest = (result * 0.0).sum().abs().sqrt() if bool((target == 2).all()) else 0.0
        return nn.functional.cross_entropy(result, target) + rest


def test_gradients_that_are_not_finite_are_left_out_or_an_error_where_they_are_clipped() -> None:
    samples = stream(9)
    samples[4] = samples[4][0], torch.full((4,), 2)
    with learning(network(), 2, loss_fn=Root(), on_nonfinite="skip", clip_norm=1.0) as pipe:
        with pytest.warns(PipecompileWarning, match=r"were left out: 1 on device 0, 1 on device 1"):
            assert all(math.isfinite(result.loss or 0.0) for result in pipe.learn(samples))
        assert pipe.snapshot()["updates"] == 9
        assert all(bool(value.isfinite().all()) for value in pipe.state_dict().values())
    with (
        learning(network(), 2, loss_fn=Root(), clip_norm=1.0) as pipe,
        pytest.raises(StepError, match="the gradients of stage 1 have the norm nan"),
    ):
        list(pipe.learn(samples))
    with pytest.raises(InputError, match=r"clip_norm=0: it must be a number above 0"):
        learning(network(), 2, clip_norm=0)


def test_snapshots_asked_for_while_another_is_under_way() -> None:
    """By restarts, after every sample; by the caller, now and then: each is of its own sample."""
    with learning(network(), 3, clock="lockstep", on_failure="restart", snapshot_every=1) as pipe:
        marks = (result.seq for result in pipe.learn(stream(60)) if result.seq in (10, 11, 30))
        taken = [pipe.snapshot()["samples"] - seq for seq in marks]
    assert len(taken) == 3
    assert all(0 < ahead < 15 for ahead in taken)


def test_results_that_nobody_took_are_not_delivered_and_the_report_shows_what_was_measured(tmp_path: Path) -> None:
    with learning(network(), 2, executor="process") as pipe:
        with pytest.raises(PipelineClosed, match="there is no timeline"):
            pipe.timeline()
        results = pipe.learn(stream(40))
        assert [next(results).seq for _ in range(5)] == list(range(5))
        results.close()
        counts = pipe.counts
        assert (counts.delivered, counts.in_flight) == (5, 0)
        assert counts.dropped == counts.submitted - 5
        list(pipe.learn(stream(10)))
        measured, first = pipe.timeline(), counts.submitted
        done = {(e.device, e.activity, e.sample) for e in measured.events if e.sample >= first and e.activity != "wait"}
        assert {(d, a, k) for d in (0, 1) for a in ("F", "BW") for k in range(first, first + 10)} <= done
        assert {a for _, a, _ in done} == {"F", "BW", "SEND", "STEP"}
        assert len(measured.finishes) == pipe.samples
        assert pipe.report(tmp_path / "learned.html").read_text(encoding="utf-8").count("measured") > 1
    with learning(network(), 2) as pipe:
        list(pipe.learn(stream(3)))
        with pytest.raises(InputError, match="devices take turns there"):
            pipe.timeline()
