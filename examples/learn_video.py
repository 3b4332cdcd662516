"""Learn from a video while it plays: predict the features of the next frame, one stage and two.

A photograph, panned and zoomed, is written to a video file and read back from it. From two frames a
convolutional network predicts the colours of the third in a grid of 12 x 12 cells; every frame is
predicted first, then learned from. Its loss stands beside that of "nothing will move", the frames a
second of two stages beside those of one; both are drawn over time.

    python examples/learn_video.py [--frames 600] [--updates sideways]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "learn_video"
SIZE, CELL = 96, 8  # pixels of a frame and of a cell
LAP, WINDOW = 120, 30  # frames until the camera is back, frames that curves are averaged over
RULES = ["sync", "weight_stashing", "2bw", "stale", "sideways"]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=600)
    parser.add_argument("--updates", default="weight_stashing", choices=RULES)
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2])
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    video = FOLDER / "flight.mp4"
    codec = write_video(video, options.frames + 2)
    with bar(console) as progress:
        task = progress.add_task("reading", total=options.frames)
        samples = list(progress.track(lessons(read_video(video)), task_id=task))
    console.print(
        f"video      {len(samples) + 2} frames of {SIZE}x{SIZE}, {codec}, {video.stat().st_size / 1e3:.0f} kB"
    )
    still = [float(nn.functional.mse_loss(now, then)) for (_, now), (_, then) in pairwise(samples)]

    losses: dict[str, list[float]] = {"nothing moves": [still[0], *still]}
    speeds: dict[str, list[float]] = {}
    complete = True
    for stages in options.stages:
        name = f"{stages} stage{'s' * (stages > 1)}"
        console.print(f"{name:10} ", end="")
        found, arrivals, balance = learn(console, name, samples, stages, options.updates)
        complete = complete and len(found) == len(samples)
        losses[name], speeds[name] = found, rates(arrivals)
        console.print(
            (f"balance {balance:.2f}, " if stages > 1 else "") + f"{statistics.median(speeds[name]):.1f} frames/s, "
            f"loss {statistics.fmean(found[:WINDOW]):.3f} at first, {statistics.fmean(found[-WINDOW:]):.3f} at last",
            highlight=False,
        )
    console.print(table(losses, speeds))
    console.print(f"plot       {draw(losses, speeds)}")
    learned = all(
        statistics.fmean(v[-WINDOW:]) < statistics.fmean(v[:WINDOW]) for n, v in losses.items() if n in speeds
    )
    return 0 if complete and learned else 1


def network() -> nn.Module:
    """Two frames in, features of the third out; strides take the picture down to the grid of cells."""

    def block(a: int, b: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.GroupNorm(4, b), nn.ReLU()]

    torch.manual_seed(0)
    widths = [(6, 24, 1), (24, 24, 1), (24, 32, 2), (32, 48, 2), (48, 64, 2), (64, 64, 1), (64, 64, 1)]
    return nn.Sequential(*(m for a, b, s in widths for m in block(a, b, s)), nn.Conv2d(64, 3, 1), nn.Flatten())


def learn(
    console: Console, name: str, samples: list[tuple[Tensor, Tensor]], stages: int, updates: str
) -> tuple[list[float], list[float], float]:
    """Losses, moments at which results arrived, and the balance of the cut."""
    x, y = samples[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)
        pipe = pipecompile.compile(
            network(), (x,), mode="learn", loss_fn=nn.functional.mse_loss, optimizer=partial(torch.optim.Adam, lr=2e-3),
            updates=updates, devices=stages, example_targets=y, profile_seconds=1.0,
        )  # fmt: skip
    losses, arrivals = list[float](), list[float]()
    with pipe, bar(console) as progress:
        task = progress.add_task(name, total=len(samples))
        for result in pipe.learn(samples):
            arrivals.append(time.perf_counter())
            losses.append(result.loss)
            progress.update(task, advance=1, description=f"{name}, loss {result.loss:.3f}")
        return losses, arrivals, pipe.plan.balance


def bar(console: Console) -> Progress:
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def write_video(path: Path, frames: int) -> str:
    """A photograph seen by a camera that circles over it and comes closer; returns the codec's name."""
    from skimage.data import astronaut

    picture = np.asarray(astronaut())
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.bit_rate = 1_000_000
        for i in range(frames):
            angle = 2 * np.pi * i / LAP
            side = int(330 + 120 * np.cos(angle))
            top = int((picture.shape[0] - side) * (0.5 + 0.5 * np.sin(angle)))
            left = int((picture.shape[1] - side) * (0.5 + 0.5 * np.cos(2 * angle)))
            crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
            frame = av.VideoFrame.from_ndarray(crop, format="rgb24").reformat(SIZE, SIZE, format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return codec


def read_video(path: Path) -> Iterator[Tensor]:
    """Frames as 1 x 3 x SIZE x SIZE floats from -0.5 to 0.5."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).float() / 255 - 0.5
            yield pixels.permute(2, 0, 1)[None].contiguous()


def lessons(frames: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Two frames, 1 x 6 x SIZE x SIZE, and the features of the next, 1 x (3 * cells)."""
    before, now = next(frames), next(frames)
    for after in frames:
        yield torch.cat([before, now], 1), features(after)
        before, now = now, after


def features(frame: Tensor) -> Tensor:
    """The mean colours of cells."""
    return nn.functional.avg_pool2d(frame, CELL).flatten(1)


def rates(arrivals: list[float]) -> list[float]:
    """Frames a second over the last WINDOW frames, at each frame."""
    return [(i - j) / (arrivals[i] - arrivals[j]) for i in range(1, len(arrivals)) for j in [max(0, i - WINDOW)]]


def running(values: list[float]) -> list[float]:
    """The mean of the last WINDOW values, at each."""
    return [statistics.fmean(values[max(0, i - WINDOW) : i]) for i in range(1, len(values) + 1)]


def table(losses: dict[str, list[float]], speeds: dict[str, list[float]]) -> Table:
    made = Table(title_justify="left")
    made.add_column("")
    for heading in ("frames/s", "against one stage", "loss, all", f"loss, last {LAP}"):
        made.add_column(heading, justify="right")
    base = statistics.median(speeds["1 stage"]) if "1 stage" in speeds else 0.0
    for name, values in losses.items():
        rate = statistics.median(speeds[name]) if name in speeds else 0.0
        cells = [f"{rate:.1f}" if rate else "", f"{rate / base:.2f}x" if rate and base else ""]
        made.add_row(name, *cells, f"{statistics.fmean(values):.4f}", f"{statistics.fmean(values[-LAP:]):.4f}")
    return made


def draw(losses: dict[str, list[float]], speeds: dict[str, list[float]]) -> Path:
    """Both over time, as a page."""
    from plotly.subplots import make_subplots

    titles = [f"loss, mean of {WINDOW} frames", f"frames a second, over {WINDOW} frames"]
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.08, subplot_titles=titles)
    for row, curves in enumerate((losses, speeds), 1):
        for name, values in curves.items():
            smooth = running(values) if row == 1 else values
            figure.add_scatter(y=smooth, name=f"{name}, {'loss' if row == 1 else 'frames/s'}", row=row, col=1)
    figure.update_xaxes(title_text="frame", row=2, col=1)
    figure.update_layout(template="plotly_white", height=720)
    path = FOLDER / "learning.html"
    figure.write_html(path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
