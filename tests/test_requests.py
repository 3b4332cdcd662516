"""What compile() says about a request that makes no sense, before anything is traced."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.clusters import make_cluster
from pipecompile.errors import InputError, PlanError, TraceError


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        (0, "at least one"),
        (-1, "at least one"),
        ([], "at least one"),
        ("cuda:0", "'cuda:0'"),
        (["cpu"], "'cpu'"),
        (["cpu:0", "cpu:0"], "twice"),
        (["cpu:9999"], "cpu:9999"),
        (2.5, "count"),
    ],
)
def test_devices_that_make_no_sense(devices: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_cluster(devices)


def test_one_device_by_name() -> None:
    assert [device.name for device in make_cluster("cpu:0").devices] == ["cpu:0"]


def test_a_function_is_no_module() -> None:
    with pytest.raises(InputError, match="function"):
        pipecompile.compile(lambda x: x, (torch.ones(1),))  # type: ignore[arg-type]  # pyright: ignore


def test_weights_without_values() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(TraceError, match=r"'weight' of Linear is on meta .* load its state_dict"):
        pipecompile.compile(model, torch.ones(1, 2))


def test_keywords_given_as_positional_arguments() -> None:
    with pytest.raises(InputError, match="example_kwargs"):
        pipecompile.compile(nn.Linear(2, 2), {"input": torch.ones(1, 2)})  # type: ignore[arg-type]  # pyright: ignore


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pin": "0.*"}, "pin='0.*': it must be a dict"),
        ({"colocate": "0.*"}, "it must be a list of patterns"),
        ({"profile_seconds": -1}, "a number of seconds above 0"),
        ({"mode": "train", "micro_batches": "many"}, "micro_batches='many': it must be a whole number or 'auto'"),
        ({"mode": "train", "clip_norm": -1.0}, "a number above 0"),
        ({"mode": "train", "seed": "x"}, "seed='x': it must be a whole number"),
    ],
)
def test_options_of_a_wrong_kind(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        pipecompile.compile(nn.Linear(2, 2), torch.ones(4, 2), **options)
