"""What compile() says about a request that makes no sense, before anything is traced."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.clusters import check_runs_here, make_cluster
from pipecompile.errors import InputError, PipecompileWarning, PlanError, TraceError
from pipecompile.ir.cluster import Cluster, Device
from pipecompile.ir.cluster_file import read_cluster


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
        (Cluster(()), "this Cluster has no devices"),
        (Cluster(("cpu:0",)), r"write Device\('cpu:0'\)"),  # type: ignore[arg-type]  # pyright: ignore
    ],
)
def test_devices_that_make_no_sense(devices: Any, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make_cluster(devices)


def test_a_cluster_of_devices_this_version_cannot_run_on_is_refused_and_missing_cores_are_said() -> None:
    with pytest.raises(PlanError, match=r"device 'gpu:0' is of kind 'gpu'.*CPU cores only"):
        pipecompile.compile(nn.Linear(2, 2), torch.ones(1, 2), devices=read_cluster("devices: [{name: 'gpu:0'}]"))
    with pytest.warns(PipecompileWarning, match="not 9999 of cpu:0"):
        check_runs_here(Cluster((Device("cpu:0", core=9999),)))


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
        ({"colocate": [3]}, "it must be a list of patterns"),
        ({"leaf": "0.*"}, "leaf='0.*': it must be a list of module paths"),
        ({"leaf": ["01"]}, "leaf: no module matches '01'; the nearest is '0'"),
        ({"imports": "numpy"}, "it must be a list of names of modules"),
        ({"throttle": {"0>1": 3}}, "it must be a dict from edges, such as '0>1', to Links"),
        ({"progress": True}, "it must be a function"),
        ({"dynamic_shapes": 3}, "an entry for each input"),
        ({"hang_seconds": float("nan")}, "hang_seconds=nan: it must be a number of seconds above 0"),
        ({"time_limit": "long"}, "time_limit='long': it must be a number of seconds, 0 or more"),
        ({"on_failure": "retry"}, "on_failure='retry': it must be 'raise' or 'restart'"),
        ({"on_overload": "newest"}, "on_overload='newest' is none of 'block'"),
        ({"max_in_flight": 2.5}, "max_in_flight=2.5: it is a whole number of samples"),
        ({"deadline": "soon"}, "deadline='soon': it is seconds"),
        ({"profile_seconds": -1}, "a number of seconds above 0"),
        ({"mode": "train", "micro_batches": "many"}, "micro_batches='many': it must be a whole number or 'auto'"),
        ({"mode": "train", "clip_norm": -1.0}, "a number above 0"),
        ({"mode": "train", "seed": "x"}, "seed='x': it must be a whole number"),
    ],
)
def test_options_of_a_wrong_kind(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        pipecompile.compile(nn.Sequential(nn.Linear(2, 2)), torch.ones(4, 2), **options)
