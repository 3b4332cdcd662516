"""A live source that is faster than the model: the newest frame is kept, the others are dropped.

A photograph seen by a moving camera is written to a video file of 240 frames a second. Played at
its own rate, it stands for a camera: frames come whether or not the pipeline has room. The stream
keeps only the newest (``latest``), so results stay young; every half second the live rate and the
age of the results are printed.

    python examples/live_source.py [--seconds 5]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np
import torch
from skimage.data import astronaut
from transformers import ResNetConfig, ResNetForImageClassification

import pipecompile
from pipecompile.sources import VideoFile

RATE, SIDE = 240, 160


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="length of the video")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10)
    model = ResNetForImageClassification(config).eval()
    with (
        tempfile.TemporaryDirectory() as folder,
        pipecompile.compile(model, example_inputs=torch.zeros(1, 3, SIDE, SIDE), devices=2) as pipe,
        VideoFile(write_video(Path(folder) / "camera.mp4", seconds), like=pipe, realtime=True) as camera,
    ):
        pipe(torch.zeros(1, 3, SIDE, SIDE))  # the workers are up before the camera starts
        ages: list[float] = []
        given, said = 0, time.monotonic()
        for result in pipe.stream(camera, records=True):  # a live source: on_overload="latest"
            given += 1
            ages.append(result.record.latency)
            now = time.monotonic()
            if now - said >= 0.5:
                oldest, middle = max(ages) * 1e3, sorted(ages)[len(ages) // 2] * 1e3
                print(
                    f"{len(ages) / (now - said):6.1f} results/s, age median {middle:5.1f} ms, oldest {oldest:5.1f} ms"
                )
                ages, said = [], now
        counts = pipe.counts
        print(f"{given} results of {int(seconds * RATE)} frames: {camera.skipped} were replaced by newer ones before")
        print(f"the pipeline had seen them, {counts.dropped} at its entrance, {counts.failed} failed")
    return 0 if given and counts.failed == 0 else 1


def write_video(path: Path, seconds: float) -> Path:
    """A photograph, seen by a camera that moves over it."""
    picture = np.asarray(astronaut())
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for i in range(int(seconds * RATE)):
            x, y = int(170 + 170 * np.sin(i / 90)), int(170 + 170 * np.cos(i / 130))
            crop = np.ascontiguousarray(picture[y : y + SIDE, x : x + SIDE])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    return path


if __name__ == "__main__":
    sys.exit(main())
