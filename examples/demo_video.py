"""Stream a real video through a ResNet-18 that was compiled ahead of time for two cores.

A photograph, panned and zoomed, is written to a video file and read back from it. The network
(transformers' ResNet-18, random weights with a fixed seed) is compiled, saved, and loaded again
without its source. Then the same frames go through plain PyTorch on one thread, on two, and through
the pipeline, in turns; two independent copies of the network, one on each core, show what the
machine itself can give (the control).

    python examples/demo_video.py [--frames 80] [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "demo"
SIZE, LENGTH = 224, 120
#: Longest time to measure, as far as the rounds before tell.
_PATIENCE_SECONDS = 100.0
MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=0, help="frames in each timed run (0: about 3 s of eager)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is timed, in turns")
    parser.add_argument("--copy", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.copy is not None:
        serve_copy(options.copy)
        return 0
    console = Console(soft_wrap=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:2]

    video = FOLDER / "flight.mp4"
    codec = write_video(video)
    frames = list(read_video(video))
    console.print(f"video      {len(frames)} frames of {SIZE}x{SIZE}, {codec}, {video.stat().st_size / 1e3:.0f} kB")

    model = resnet18()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    with torch.no_grad():
        expected = [model(frame)["logits"] for frame in frames]
    count = options.frames or min(240, max(30, int(3 * len(frames) / (time.perf_counter() - begin))))

    begin = time.perf_counter()
    target = FOLDER / "resnet18.pipe"
    with warnings.catch_warnings():
        warnings.simplefilter("always", pipecompile.PipecompileWarning)
        with pipecompile.compile(model, example_inputs=(frames[0],), devices=2) as made:
            made.save(target)
    console.print(f"compiled   in {time.perf_counter() - begin:.1f} s, saved to {relative(target)}")

    with pipecompile.load(target) as pipe:
        plan = pipe.plan
        for stage in plan.stages:
            first, last = plan.layer_names[stage.layers[0]], plan.layer_names[stage.layers[-1]]
            console.print(f"  stage {stage.index}  {stage.load * 1e3:5.1f} ms  {first} ... {last}", highlight=False)

        results = [result["logits"] for result in pipe.stream(read_video(video))]  # decoded while it streams
        equal = len(results) == len(expected) and all(map(torch.equal, results, expected))
        same_classes = histogram(results) == histogram(expected)
        console.print(
            f"checked    {len(results)} results from the file: "
            + ("bit-equal to eager" if equal else "[red]different from eager[/red]")
            + f", {len(histogram(results))} top-1 classes, histogram {'the same' if same_classes else 'different'}"
        )

        sample = (frames * (count // len(frames) + 1))[:count]

        def eager(threads: int) -> Callable[[], float]:
            def run() -> float:
                torch.set_num_threads(threads)
                with torch.no_grad():
                    return timed(model(frame) for frame in sample)

            return run

        with copies(cores) as ask:
            ways = {
                "eager, one thread": eager(1),
                "eager, two threads": eager(2),
                "pipeline, two cores": lambda: timed(pipe.stream(sample)),
                "one copy alone": lambda: ask(1, count),
                "two copies, one a core": lambda: ask(2, count) / 2,
            }
            seconds = measure(ways, options.rounds, console)
    report(console, seconds, count, plan.balance, plan.total / plan.slowest)
    return 0 if equal and same_classes else 1


def resnet18() -> nn.Module:
    """The ResNet-18 of transformers, a thousand classes, the same weights every time."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], embedding_size=64, num_labels=1000
    )
    return ResNetForImageClassification(config).eval()


def write_video(path: Path) -> str:
    """A photograph seen by a camera that circles over it and comes closer; returns the codec's name."""
    from skimage.data import astronaut

    picture = np.asarray(astronaut())
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        stream.bit_rate = 2_000_000
        for i in range(LENGTH):
            angle = 2 * np.pi * i / LENGTH
            side = int(330 + 120 * np.cos(angle))
            top = int((picture.shape[0] - side) * (0.5 + 0.5 * np.sin(angle)))
            left = int((picture.shape[1] - side) * (0.5 + 0.5 * np.cos(2 * angle)))
            crop = np.ascontiguousarray(picture[top : top + side, left : left + side])
            frame = av.VideoFrame.from_ndarray(crop, format="rgb24").reformat(SIZE, SIZE, format="yuv420p")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return codec


def read_video(path: Path) -> Iterator[Tensor]:
    """The frames as normalised float tensors, 1 x 3 x 224 x 224."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            pixels = torch.from_numpy(frame.to_ndarray(format="rgb24")).float().div_(255)
            yield ((pixels - MEAN) / DEVIATION).permute(2, 0, 1)[None].contiguous()


def histogram(results: list[Tensor]) -> Counter[int]:
    """How often each class came first."""
    return Counter(int(result.argmax()) for result in results)


def timed(results: Iterable[object]) -> float:
    """Seconds it takes to use up ``results``."""
    begin = time.perf_counter()
    for _ in results:
        pass
    return time.perf_counter() - begin


def measure(ways: dict[str, Callable[[], float]], rounds: int, console: Console) -> dict[str, list[float]]:
    """Time every way once a round, in turns, so that a slow minute of the machine hits all alike.

    On a machine that is busy otherwise there are fewer rounds, so that it ends within minutes.
    """
    begin = time.monotonic()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("measuring", total=rounds * len(ways))
        for done in range(rounds):
            if done and (done + 1) / done * (time.monotonic() - begin) > _PATIENCE_SECONDS:
                break
            for name, run in ways.items():
                bar.update(task, description=name)
                seconds[name].append(run())
                bar.advance(task)
    torch.set_num_threads(1)
    return seconds


def report(console: Console, seconds: dict[str, list[float]], frames: int, balance: float, limit: float) -> None:
    """Frames a second of each way, and the pipeline against what this machine and this cut allow."""
    one, two = seconds["one copy alone"], seconds.pop("two copies, one a core")
    control = statistics.median(a / b for a, b in zip(one, two, strict=True))
    base = seconds["eager, one thread"]
    table = Table(title=f"medians of {len(base)} rounds of {frames} frames", title_justify="left")
    table.add_column("")
    table.add_column("frames/s", justify="right")
    table.add_column("against eager on one thread", justify="right")
    del seconds["one copy alone"]
    ratio = 1.0
    for name, taken in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(base, taken, strict=True))
        table.add_row(name, f"{frames / statistics.median(taken):.1f}", f"{ratio:.2f}x")
    table.add_row(
        "control: two copies, a core each", f"{frames / statistics.median(two):.1f}", f"{control:.2f}x (of one copy)"
    )
    console.print(table)
    console.print(
        f"the cut allows {limit:.2f}x (balance {balance:.2f}), two cores gave {control:.2f}x to independent copies:\n"
        f"the pipeline reached {ratio / (control * balance):.0%} of control x balance",
        highlight=False,
    )


@contextlib.contextmanager
def copies(cores: list[int]) -> Iterator[Callable[[int, int], float]]:
    """Processes with a copy of the network each, pinned. Yields ask(how many at once, frames) -> seconds."""
    words = [sys.executable, __file__, "--copy"]
    workers = [
        subprocess.Popen([*words, str(core)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for core in (cores * 2)[:2]
    ]

    def ask(count: int, frames: int) -> float:
        for worker in workers[:count]:
            assert worker.stdin is not None
            print(frames, file=worker.stdin, flush=True)
        answers: list[float] = []
        for worker in workers[:count]:
            assert worker.stdout is not None
            line = worker.stdout.readline()  # ends at once, empty, when the process dies
            if not line:
                raise RuntimeError("a process of the control has died; its message is above")
            answers.append(float(line))
        return max(answers)

    try:
        ask(2, 2)  # wait until both are warm
        yield ask
    finally:
        for worker in workers:
            with contextlib.suppress(BrokenPipeError):
                worker.communicate(timeout=20)


def serve_copy(core: int) -> None:
    """A copy's side: read a number of frames, run that many, answer with the seconds."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    model, frames = resnet18(), list(read_video(FOLDER / "flight.mp4"))[:16]
    with torch.no_grad():
        for line in sys.stdin:
            print(timed(model(frames[i % len(frames)]) for i in range(int(line))), flush=True)


def relative(path: Path) -> Path:
    """The path as seen from here, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
