"""Image folders, arrays and random samples."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import pipecompile
from media import frames
from pipecompile.errors import InputError
from pipecompile.sources import ImageFolder, NumpyFile, Random
from pipecompile.sources.fit import Picture


def compiled(net: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> pipecompile.InferencePipeline:
    return pipecompile.compile(net, args, kwargs, devices=1, executor="inline", profile_seconds=0.05)


def test_a_folder_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    pictures = list(frames(12))
    for i, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a picture, nor called one")
    (tmp_path / ".hidden.png").write_text("hidden")
    source = ImageFolder(tmp_path, transform=np.array, rate=10)
    assert source.length == 12
    got = list(source)
    assert [s.pts for s in got] == pytest.approx([i / 10 for i in range(12)])
    assert all(np.array_equal(s.value, pixels) for s, pixels in zip(got, pictures, strict=True))


def test_folders_below_and_grey_and_transparent_pictures(tmp_path: Path) -> None:
    pixels = next(frames(1))
    (tmp_path / "b").mkdir()
    Image.fromarray(pixels).convert("RGBA").save(tmp_path / "b" / "1.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "a.jpg")
    Image.fromarray(pixels).convert("P").save(tmp_path / "c.gif")
    with compiled(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 20, 30)) as pipe, ImageFolder(tmp_path, like=pipe) as source:
        assert [file.name for file in source.files] == ["a.jpg", "1.png", "c.gif"]
        assert [r.shape for r in pipe.stream(source)] == [(1, 2, 18, 28)] * 3


def test_a_picture_lies_as_its_exif_data_says(tmp_path: Path) -> None:
    pixels = next(frames(1))[:40]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (sample,) = ImageFolder(tmp_path, transform=np.array)
    assert np.array_equal(sample.value, np.rot90(pixels, -1))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        ImageFolder(tmp_path / "absent")
    with pytest.raises(InputError, match="there is no picture in this folder"):
        ImageFolder(tmp_path)
    Image.fromarray(next(frames(1))).save(tmp_path / "1.png")
    Image.fromarray(next(frames(1))).save(tmp_path / "2.png")
    (tmp_path / "3.png").write_text("text")
    got: list[Any] = []
    with pytest.raises(InputError, match=r"3\.png is no picture"):
        got.extend(ImageFolder(tmp_path))
    assert len(got) == 2
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:700])
    with pytest.raises(InputError, match=r"2\.png cannot be read as a picture"):
        list(ImageFolder(tmp_path))
    assert not [t for t in threading.enumerate() if t.name == "pipecompile-source"]


def test_an_array_entry_by_entry(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float64).reshape(4, 6)
    np.save(tmp_path / "x.npy", array)
    got = list(NumpyFile(tmp_path / "x.npy", rate=2))
    assert [s.pts for s in got] == [0.0, 0.5, 1.0, 1.5]
    assert torch.equal(torch.stack([s.value for s in got]), torch.from_numpy(array))
    with compiled(nn.Linear(3, 2), torch.zeros(2, 3)) as pipe:
        source = NumpyFile(tmp_path / "x.npy", like=pipe)
        values = [s.value for s in source]
        assert torch.equal(values[1][0], torch.arange(6.0, 12.0).reshape(2, 3))
        assert len(list(pipe.stream(source))) == 4
    doubled = NumpyFile(tmp_path / "x.npy", transform=lambda entry: torch.from_numpy(entry * 2))
    assert torch.equal(next(iter(doubled)).value, torch.from_numpy(array[0] * 2))


def test_entries_are_reshaped_where_that_keeps_the_order_of_their_axes(tmp_path: Path) -> None:
    values = np.arange(48, dtype=np.float32).reshape(2, 24)
    with compiled(nn.Flatten(), torch.zeros(1, 3, 4, 2)) as pipe:
        for shape in [(3, 4, 2), (1, 3, 4, 2), (24,), (12, 2), (3, 8), (3, 2, 2, 2)]:
            np.save(tmp_path / "x.npy", values.reshape(2, *shape))
            got = [sample.value[0] for sample in NumpyFile(tmp_path / "x.npy", like=pipe)]
            assert torch.equal(torch.cat(got).reshape(2, 24), torch.from_numpy(values)), shape
        for shape in [(4, 2, 3), (2, 3, 4), (8, 3)]:
            np.save(tmp_path / "x.npy", values.reshape(2, *shape))
            with pytest.raises(InputError, match=r"in another order.*numpy.moveaxis"):
                NumpyFile(tmp_path / "x.npy", like=pipe)
    np.save(tmp_path / "x.npy", values.astype(">f4"))
    assert torch.equal(next(iter(NumpyFile(tmp_path / "x.npy"))).value, torch.from_numpy(values[0]))


def test_arrays_that_cannot_be_used(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.zeros((2, 5), np.float32))
    np.save(tmp_path / "number.npy", np.float32(3))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.savez(tmp_path / "several.npy", a=np.zeros(2), b=np.zeros(2))
    (tmp_path / "several.npy.npz").rename(tmp_path / "several.npy")
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "wide.npy").read_bytes()[:140])
    with compiled(nn.Linear(3, 2), torch.zeros(1, 3)) as pipe:
        for name, said in [
            ("wide.npy", "must hold the 3 values"),
            ("number.npy", "a single number"),
            ("words.npy", "must hold the 3 values|which is no number"),
            ("several.npy", "several arrays"),
            ("text.npy", "no array as numpy.save writes it"),
            ("cut.npy", "no array as numpy.save writes it"),
            ("absent.npy", "there is no such file"),
        ]:
            with pytest.raises(InputError, match=said):
                NumpyFile(tmp_path / name, like=pipe)
    with pytest.raises(InputError, match="rate=0"):
        NumpyFile(tmp_path / "wide.npy", rate=0)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) * scale


def test_random_samples_fit_every_input_and_are_the_same_again() -> None:
    with compiled(Two(), torch.ones(2, 3, dtype=torch.int64), scale=torch.ones(4)) as pipe:
        source = Random(40, like=pipe)
        one, two = list(pipe.stream(source)), list(pipe.stream(source))
        assert len(one) == 40
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        assert not torch.equal(one[0], one[1])
        assert len(list(Random(0, like=pipe))) == 0
        with pytest.raises(InputError, match="can feed one input, but the model has 2: ids, scale"):
            Picture.like(pipe.package, "a folder")


def test_an_array_can_be_paced_as_a_live_source(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((5, 2), np.float32))
    source = NumpyFile(tmp_path / "x.npy", rate=100, realtime=True)
    assert source.live
    got = list(source)
    assert len(got) + source.skipped == 5
    assert got[-1].pts == pytest.approx(0.04)
