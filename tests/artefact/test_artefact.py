"""A saved pipeline: what loads, and what is refused and why."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipecompile
from pipecompile.artefact import format as layout
from pipecompile.errors import ArtefactError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("wide", torch.randn(4, 6).t())
        self.register_buffer("hidden", torch.ones(6), persistent=False)

    def forward(self, tokens: torch.Tensor) -> dict[str, Any]:
        self.seen += 1
        return {"logits": self.head(self.body(self.embed(tokens) + self.hidden)), "wide": self.wide * 2, "n": self.seen}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, dict[str, torch.Tensor], Net]:
    torch.manual_seed(0)
    model, tokens = Net().eval(), torch.tensor([[1, 4, 9]])
    path = tmp_path_factory.mktemp("saved") / "net.pipe"
    with pipecompile.compile(model, (tokens,), devices=2, executor="inline", profile_seconds=0.05) as pipe:
        pipe.save(path)
    with torch.no_grad():
        expected = model(tokens)
    return path, tokens, {"logits": expected["logits"], "wide": expected["wide"]}, model


@pytest.fixture
def copy(saved: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "net.pipe"))


def test_files_are_the_documented_ones_and_none_is_a_pickle(saved: Any) -> None:
    names = {file.name for file in saved[0].iterdir()}
    assert names == {"manifest.json", "plan.json", "program.json", "weights.safetensors", "device_0.py", "device_1.py"}
    for file in saved[0].iterdir():
        with pytest.raises(Exception):  # noqa: B017, PT011 any way of failing to unpickle will do
            pickle.loads(file.read_bytes())


def test_loads_in_a_process_without_the_model_s_source(saved: Any, tmp_path: Path) -> None:
    torch.save((saved[1], saved[2]), tmp_path / "expected.pt")
    code = f"""
import sys, torch, pipecompile
tokens, expected = torch.load({str(tmp_path / "expected.pt")!r})
with pipecompile.load({str(saved[0])!r}, executor="inline") as pipe:
    result = pipe(tokens)
assert "pickle" not in repr(sys.modules.get("test_artefact"))
assert torch.equal(result["logits"], expected["logits"]) and torch.equal(result["wide"], expected["wide"])
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr


def test_state_dict_ties_strides_and_buffers_survive(saved: Any) -> None:
    model = saved[3]
    with pipecompile.load(saved[0], executor="inline") as pipe:
        state = pipe.state_dict()
        assert set(state) <= set(model.state_dict())
        for name, tensor in state.items():
            if name != "seen":
                assert torch.equal(tensor, model.state_dict()[name])
        parameters = dict(pipe.named_parameters(remove_duplicate=False))
        assert parameters["embed.weight"].data_ptr() == parameters["head.weight"].data_ptr()
        assert state["wide"].stride() == model.wide.stride()
        assert "hidden" not in state


def test_saving_twice_replaces_and_leaves_no_scrap(saved: Any, copy: Path) -> None:
    with pipecompile.load(saved[0], executor="inline") as pipe:
        pipe.save(copy)
        pipe.save(copy)
    assert [file.name for file in copy.parent.iterdir()] == ["net.pipe"]
    pipecompile.load(copy, executor="inline").close()


@pytest.mark.parametrize(
    "name", ["manifest.json", "plan.json", "program.json", "weights.safetensors", "device_0.py", "device_1.py"]
)
def test_every_changed_byte_is_refused_by_file_name(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    place = data.rindex(b"2") if name == "manifest.json" else len(data) // 2
    data[place] = ord("3") if name == "manifest.json" else data[place] ^ 1
    (copy / name).write_bytes(bytes(data))
    with pytest.raises(ArtefactError, match=re.escape(name)):
        pipecompile.load(copy)


@pytest.mark.parametrize("name", ["manifest.json", "plan.json", "weights.safetensors", "device_1.py"])
def test_every_missing_file_is_refused_by_name(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(ArtefactError, match=re.escape(name)):
        pipecompile.load(copy)


def change(copy: Path, **entries: Any) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest.update(entries)
    for name in manifest["files"]:
        manifest["files"][name] = layout.file_digest(copy / name)
    manifest["digest"] = layout.manifest_digest(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))


def test_newer_format_is_refused(copy: Path) -> None:
    change(copy, format=layout.FORMAT + 1)
    with pytest.raises(ArtefactError, match="newer"):
        pipecompile.load(copy)


def test_too_old_torch_is_refused(copy: Path) -> None:
    change(copy, torch="99.1.0")
    with pytest.raises(ArtefactError, match=r"needs torch 99\.1"):
        pipecompile.load(copy)


@pytest.mark.parametrize("entry", ["outputs", "state", "in_tree", "modules", "parameters"])
def test_entries_that_make_no_sense_are_refused(copy: Path, entry: str) -> None:
    change(copy, **{entry: [{"kind": "leaf"}]} if entry != "in_tree" else {entry: {}})
    manifest = json.loads((copy / "manifest.json").read_text())
    if entry == "parameters":
        del manifest["parameters"]
        manifest["digest"] = layout.manifest_digest(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="do not fit together"):
        pipecompile.load(copy)


def test_evil_code_is_refused_even_with_a_true_digest(copy: Path) -> None:
    source = (copy / "device_0.py").read_text()
    (copy / "device_0.py").write_text(source.replace("aten = torch.ops.aten", "aten = __import__('os')", 1))
    change(copy)
    with pytest.raises(ArtefactError, match=r"device_0\.py:\d+"):
        pipecompile.load(copy, trust=True)


def test_a_file_outside_the_folder_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["modules"][0]["file"] = "../device_0.py"
    change(copy, modules=manifest["modules"])
    with pytest.raises(ArtefactError, match="device_0"):
        pipecompile.load(copy)


@pytest.mark.parametrize("what", ["absent", "empty folder", "file"])
def test_what_is_no_pipeline_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "thing"
    if what == "empty folder":
        path.mkdir()
    if what == "file":
        path.write_text("hello")
    with pytest.raises(ArtefactError, match="thing"):
        pipecompile.load(path)


def test_save_does_not_overwrite_something_else(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with (
        pipecompile.load(saved[0], executor="inline") as pipe,
        pytest.raises(ArtefactError, match="not a saved pipeline"),
    ):
        pipe.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_save_where_nothing_can_be_written(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pipecompile.load(saved[0], executor="inline") as pipe, pytest.raises(ArtefactError, match="cannot write"):
        pipe.save(tmp_path / "file" / "net.pipe")
