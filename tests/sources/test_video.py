"""Video files and cameras: the frames, their times, broken files, and what is left behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pipecompile
from media import SIDE, cut, frames, write_video
from pipecompile.errors import InputError
from pipecompile.ir.sample import Sample
from pipecompile.sources import Camera, VideoFile


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("videos")


def threads() -> int:
    return sum(thread.name == "pipecompile-source" for thread in threading.enumerate())


def settle() -> int:
    """Reader threads once those that were told to end have had time to."""
    gc.collect()
    limit = time.monotonic() + 10
    while threads() and time.monotonic() < limit:
        time.sleep(0.01)
    return threads()


def test_frames_are_those_written_with_their_times(folder: Path) -> None:
    path = write_video(folder / "lossless.mkv", 12, codec="ffv1", rate=20)
    source = VideoFile(path, transform=np.array)
    assert (source.live, source.rate) == (False, 20.0)
    for _ in range(2):  # a file can be read again
        samples = list(source)
        assert all(isinstance(sample, Sample) for sample in samples)
        assert [sample.pts for sample in samples] == pytest.approx([i / 20 for i in range(12)], abs=1e-3)
        # RGB through BGR0 and back is exact.
        assert all(np.array_equal(s.value, pixels) for s, pixels in zip(samples, frames(12), strict=True))
    assert threads() == 0


def test_without_transform_frames_are_float_tensors(folder: Path) -> None:
    path = write_video(folder / "plain.mkv", 3, codec="ffv1")
    for sample, pixels in zip(VideoFile(path), frames(3), strict=True):
        expected = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        assert torch.equal(sample.value, expected)
        assert sample.value.is_contiguous()


@pytest.mark.parametrize(
    ("shape", "dtype", "low", "high"),
    [
        ((1, 3, 16, 24), torch.float32, 0.0, 1.0),
        ((3, 16, 24), torch.bfloat16, 0.0, 1.0),
        ((1, 16, 24, 3), torch.float64, 0.0, 1.0),
        ((1, 1, 16, 24), torch.float32, 0.0, 1.0),
        ((3, 16, 24), torch.uint8, 0, 255),
    ],
)
def test_frames_are_fitted_to_the_compiled_input(
    folder: Path, shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float
) -> None:
    path = write_video(folder / "fit.mkv", 2, codec="ffv1")
    net = nn.Sequential(nn.Flatten(0), nn.Identity()) if dtype is torch.uint8 else nn.Sequential(nn.ReLU(), nn.Tanh())
    pipe = pipecompile.compile(
        net, (torch.zeros(shape, dtype=dtype),), devices=1, executor="inline", profile_seconds=0.05
    )
    with pipe, VideoFile(path, like=pipe) as source:
        for sample in source:
            (value,) = sample.value
            assert (value.shape, value.dtype) == (shape, dtype)
            assert low <= float(value.min()) < float(value.max()) <= high
            assert float(value.double().mean()) > 0.2 * high, "the photograph is not dark"
        assert len(list(pipe.stream(source))) == 2


def test_a_model_that_takes_no_pictures_is_said(folder: Path) -> None:
    path = write_video(folder / "any.mkv", 2)
    with (
        pipecompile.compile(
            nn.Linear(4, 4), (torch.zeros(2, 4),), devices=1, executor="inline", profile_seconds=0.05
        ) as pipe,
        pytest.raises(InputError, match=r"pictures fit an input of shape 1x3xHxW.*compiled for 2x4"),
    ):
        VideoFile(path, like=pipe)
    with pytest.raises(InputError, match="no compiled pipeline"):
        VideoFile(path, like=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mkv", "mpeg4", {}),
        ("a.avi", "mpeg4", {}),
        ("fast.mp4", "libx264", {"movflags": "faststart"}),
    ],
)
def test_a_truncated_video_gives_its_frames_then_says_so(
    folder: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    whole = write_video(folder / name, 50, codec=codec, **options)
    assert len(list(VideoFile(whole))) == 50
    got: list[Any] = []
    with pytest.raises(InputError, match=r"cut_.*breaks off after \d+ frames") as error:
        got.extend(VideoFile(cut(whole, 0.6)))
    assert 0 < len(got) < 50
    assert f"after {len(got)} frames" in str(error.value)
    assert settle() == 0


def test_files_that_are_no_videos(folder: Path) -> None:
    (folder / "text.mp4").write_text("not a video at all")
    (folder / "empty.mp4").write_bytes(b"")
    no_index = cut(write_video(folder / "index_at_the_end.mp4", 20), 0.7)
    for name in ("text.mp4", "empty.mp4", no_index.name):
        with pytest.raises(InputError, match=f"{name} cannot be read as a video: "):
            VideoFile(folder / name)
    with pytest.raises(InputError, match="there is no such file"):
        VideoFile(folder / "absent.mp4")


def test_a_consumer_that_walks_away_leaves_no_thread(folder: Path) -> None:
    path = write_video(folder / "long.mkv", 60)
    samples = iter(VideoFile(path))
    next(samples)
    assert threads() == 1
    del samples
    assert settle() == 0
    with VideoFile(path) as source:
        samples = iter(source)
        next(samples)
    assert threads() == 0, "the end of the with block waits for it"
    assert list(samples) == []


def test_a_file_in_real_time_is_live_and_keeps_the_newest(folder: Path) -> None:
    path = write_video(folder / "paced.mkv", 20, rate=40)
    with VideoFile(path, realtime=True) as source:
        assert source.live
        begin = time.monotonic()
        samples = iter(source)
        got = [next(samples)]
        while source.skipped < 5:  # nobody takes frames for a while
            time.sleep(0.01)
        got.extend(samples)
    assert len(got) + source.skipped == 20, "every frame is given or counted"
    assert [s.pts for s in got] == sorted({s.pts for s in got})
    assert time.monotonic() - begin >= 19 / 40 * 0.9, "not faster than the video itself"


WRITER = """
import sys, time
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb", buffering=0) as pipe:
    while data := source.read(1500):
        pipe.write(data)
        time.sleep(0.005)
"""


def test_a_camera_reads_what_a_program_writes_to_a_pipe(folder: Path) -> None:
    path = write_video(folder / "live.ts", 40, codec="libx264", rate=40, preset="ultrafast")
    fifo = folder / "camera"
    os.mkfifo(fifo)
    with Camera(fifo) as camera:
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(fifo)])
        try:
            assert camera.live
            got = list(camera)
            assert writer.wait(30) == 0
        finally:
            writer.kill()
            writer.wait()
        assert len(got) + camera.skipped == 40
        assert got[-1].value.shape == (1, 3, SIDE, SIDE)
    assert settle() == 0


def test_a_camera_nobody_feeds_can_be_closed(folder: Path) -> None:
    fifo = folder / "silent"
    os.mkfifo(fifo)
    camera = Camera(fifo)
    threading.Timer(0.2, camera.close).start()
    assert list(camera) == []
    assert settle() == 0


def test_cameras_that_cannot_be_opened(folder: Path) -> None:
    with pytest.raises(InputError, match="there is no camera /dev/video99"):
        Camera("/dev/video99")
    with pytest.raises(InputError, match=r"camera http://127\.0\.0\.1:9/none cannot be opened: "):
        list(Camera("http://127.0.0.1:9/none"))
    with pytest.raises(InputError, match="camera /dev/null cannot be opened"):
        list(Camera("/dev/null"))
