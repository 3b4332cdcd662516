"""Learn handwritten digits as they come, one by one, under every update rule, beside plain online SGD.

scikit-learn's 1,797 images of 8x8 are a stream: each is classified first, then learned from. The share
of right answers so far is the prequential accuracy. ``--hold 8`` shows each digit for eight samples in
a row, as a slow video would; only the first look at it counts.

    python examples/learn_digits.py [--seeds 5] [--stages 2 3 4] [--clocks 1f1b lockstep] [--hold 8]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "learn_digits"
RULES = ["sync", "weight_stashing", "2bw", "stale", "sideways"]
RATE, WINDOW = 0.01, 100
SGD = partial(torch.optim.SGD, lr=RATE)
LOSS = nn.CrossEntropyLoss()

Sample = tuple[Tensor, Tensor]
Way = tuple[str, int, str]  # rule, stages, clock


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rules", nargs="+", default=RULES, choices=RULES)
    parser.add_argument("--stages", nargs="+", type=int, default=[2])
    parser.add_argument("--clocks", nargs="+", default=["1f1b"], choices=["1f1b", "lockstep"])
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other weights and another order")
    parser.add_argument("--digits", type=int, default=1797, help="how many digits the stream has")
    parser.add_argument("--hold", type=int, default=1, help="for how many samples in a row each digit is shown")
    parser.add_argument("--executor", default="process", choices=["process", "inline"])
    options = parser.parse_args()
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    torch.set_num_threads(1)
    ways = [(rule, stages, clock) for rule in options.rules for stages in options.stages for clock in options.clocks]
    groups = sorted({1, *(group_size(*way) for way in ways)})

    plain: dict[int, list[list[bool]]] = {m: [] for m in groups}  # per size of group and seed: right or wrong
    right: dict[Way, list[list[bool]]] = {way: [] for way in ways}
    equal = True
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("plain SGD", total=options.seeds * (len(groups) + len(ways)))
        for seed in range(options.seeds):
            samples = stream(seed, options.digits, options.hold)
            for m in groups:
                plain[m].append(hits(plain_sgd(network(seed), samples, m), samples, options.hold))
                progress.advance(task)
            for way in ways:
                progress.update(task, description=f"{way[0]}, {way[1]} stages, {way[2]}")
                outputs = pipelined(network(seed), samples, way, options.executor)
                right[way].append(hits(outputs, samples, options.hold))
                if way[0] == "sync":
                    equal = equal and right[way][-1] == plain[1][-1]
                progress.advance(task)

    console.print(f"stream     {len(samples)} samples, {options.seeds} seeds, learning rate {RATE}")
    console.print(table(plain, right))
    if "sync" in options.rules:
        console.print("sync       " + ("answers as plain SGD does, every time" if equal else "differs from plain SGD"))
    curves = {"plain SGD": plain[1], **{named(way): found for way, found in right.items()}}
    console.print(f"plot       {draw(curves)}")
    return 0 if equal else 1


def group_size(rule: str, stages: int, clock: str) -> int:
    """Samples an update: more than one only where the rule asks for it."""
    if rule != "2bw" or stages == 1:
        return 1
    return max(stages, 2 * (stages - 1)) if clock == "lockstep" else stages


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = OrderedDict(
        conv0=nn.Conv2d(1, 8, 3, padding=1), relu0=nn.ReLU(),
        conv1=nn.Conv2d(8, 16, 3, padding=1), relu1=nn.ReLU(), pool=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 16, 3, padding=1), relu2=nn.ReLU(), flat=nn.Flatten(),
        hidden=nn.Linear(256, 64), relu3=nn.ReLU(), head=nn.Linear(64, 10),
    )  # fmt: skip
    for layer in layers.values():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if layer is not layers["head"] else "linear")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(layers)


def stream(seed: int, digits: int, hold: int) -> list[Sample]:
    """Images, normalised, and labels, in an order of this seed's."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:digits]
    return [(images[i][None, None], labels[i][None]) for i in order for _ in range(hold)]


def plain_sgd(model: nn.Module, samples: Sequence[Sample], m: int) -> Iterator[Tensor]:
    """One sample after the other in plain PyTorch, with an update every ``m``."""
    optimizer = SGD(model.parameters())
    for k, (x, y) in enumerate(samples):
        output = model(x)
        (LOSS(output, y) / m).backward()
        if (k + 1) % m == 0:
            optimizer.step()
            optimizer.zero_grad()
        yield output.detach()


def pipelined(model: nn.Module, samples: Sequence[Sample], way: Way, executor: str) -> Iterator[Tensor]:
    """The same through a pipeline."""
    rule, stages, clock = way
    x, y = samples[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)  # stages share cores, or are too short to pay
        pipe = pipecompile.compile(
            model, (x,), mode="learn", loss_fn=LOSS, optimizer=SGD, updates=rule, clock=clock, devices=stages,
            accumulate=group_size(*way), example_targets=y, executor=executor, profile_seconds=0.2,
        )  # fmt: skip
    with pipe:
        for result in pipe.learn(samples):
            yield result.output


def hits(outputs: Iterator[Tensor], samples: Sequence[Sample], hold: int) -> list[bool]:
    """Right or wrong, at the first look at each digit."""
    found = [bool(output.argmax() == y) for output, (_, y) in zip(outputs, samples, strict=True)]
    return found[::hold]


def accuracy(runs: list[list[bool]], last: int = 0) -> list[float]:
    return [100 * statistics.fmean(run[-last:]) for run in runs]


def named(way: Way) -> str:
    return f"{way[0]}, {way[1]} stages, {way[2]}"


def table(plain: dict[int, list[list[bool]]], right: dict[Way, list[list[bool]]]) -> Table:
    made = Table(
        title="prequential accuracy in %, mean ± standard deviation over seeds; m samples an update",
        title_justify="left",
    )
    for heading in ("updates", "stages", "clock", "m"):
        made.add_column(heading)
    for heading in ("all", "last 500", "- SGD", "- SGD, same m"):
        made.add_column(heading, justify="right")

    def row(names: list[str], m: int, runs: list[list[bool]], *, peer: bool) -> None:
        whole, late = accuracy(runs), accuracy(runs, 500)
        spread = statistics.stdev(whole) if len(whole) > 1 else 0.0
        gaps = [statistics.fmean(whole) - statistics.fmean(accuracy(plain[size])) for size in (1, m)]
        cells = [f"{statistics.fmean(whole):.1f} ± {spread:.1f}", f"{statistics.fmean(late):.1f}"]
        made.add_row(*names, str(m), *cells, f"{gaps[0]:+.1f}", f"{gaps[1]:+.1f}" if peer else "")

    for m, runs in plain.items():
        row(["plain SGD", "", ""], m, runs, peer=False)
    for way, runs in right.items():
        row([way[0], str(way[1]), way[2]], group_size(*way), runs, peer=True)
    return made


def draw(curves: dict[str, list[list[bool]]]) -> Path:
    """Accuracy in a sliding window over the stream, mean over seeds, as a page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, runs in curves.items():
        mean = torch.tensor(runs, dtype=torch.float32).mean(0)
        sums = torch.cat([torch.zeros(1), mean.cumsum(0)])
        at = range(1, len(mean) + 1)
        share = [100 * float(sums[i] - sums[max(0, i - WINDOW)]) / min(i, WINDOW) for i in at]
        figure.add_scatter(x=list(at), y=share, name=name, line={"width": 3 if name == "plain SGD" else 1.5})
    figure.update_layout(
        xaxis_title="digits seen", yaxis_title=f"right among the last {WINDOW}, %", template="plotly_white"
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "accuracy.html"
    figure.write_html(path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
