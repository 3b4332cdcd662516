"""Learn handwritten digits as they come, one by one, under every update rule, beside plain online SGD.

scikit-learn's 1,797 images of 8x8 are a stream: each is classified first, then learned from. The share
of right answers so far is the prequential accuracy. ``--hold 8`` shows each digit for eight samples in
a row, as a slow video would; only the first look at it counts. ``--passes 10 --shift`` makes a longer
stream in which hardly a sample comes twice: each digit is moved by a pixel at random. With several
``--rates`` every rule learns at each of them, and is compared at its best.

    python examples/learn_digits.py [--seeds 5] [--stages 2 3 4] [--clocks 1f1b lockstep] [--hold 8]
    python examples/learn_digits.py --rates 0.01 0.02 0.04 --passes 10 --shift
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "learn_digits"
RULES = ["sync", "weight_stashing", "2bw", "stale", "sideways"]
WINDOW = 100
LOSS = nn.CrossEntropyLoss()

Sample = tuple[Tensor, Tensor]
Way = tuple[str, int, str]  # rule, stages, clock; a rule "plain SGD" has samples an update in place of stages
Runs = dict[Way, dict[float, list[list[bool]]]]  # per learning rate and seed: right or wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES)
    parser.add_argument("--stages", nargs="+", type=int, default=[2])
    parser.add_argument("--clocks", nargs="+", default=["1f1b"], choices=["1f1b", "lockstep"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01], help="learning rates")
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other weights and another order")
    parser.add_argument("--digits", type=int, default=1797, help="how many digits a pass has")
    parser.add_argument("--passes", type=int, default=1, help="how often each digit comes, in a new order")
    parser.add_argument("--shift", action="store_true", help="move each digit by a pixel or none, at random")
    parser.add_argument("--hold", type=int, default=1, help="for how many samples in a row each digit is shown")
    parser.add_argument("--executor", default="process", choices=["process", "inline"])
    options = parser.parse_args()
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 110)
    torch.set_num_threads(1)
    ways = [(rule, stages, clock) for rule in options.rules for stages in options.stages for clock in options.clocks]
    plain = [("plain SGD", m, "") for m in sorted({1, *(group_size(*way) for way in ways)})]
    right: Runs = {way: {rate: [] for rate in options.rates} for way in (*plain, *ways)}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=options.seeds * len(options.rates) * len(right))
        for seed in range(options.seeds):
            samples = stream(seed, options.digits, options.passes, options.shift, options.hold)
            for way, rate in product(right, options.rates):
                progress.update(task, description=f"{named(way)}, learning rate {rate:g}")
                sgd = partial(torch.optim.SGD, lr=rate, momentum=options.momentum)
                outputs = (
                    plain_sgd(network(seed), samples, way[1], sgd)
                    if way in plain
                    else pipelined(network(seed), samples, way, sgd, options.executor)
                )
                right[way][rate].append(hits(outputs, samples, options.hold))
                progress.advance(task)

    rates = ", ".join(f"{rate:g}" for rate in options.rates)
    console.print(f"stream     {len(samples)} samples, {options.seeds} seeds, learning rate {rates}")
    console.print(table(right))
    if len(options.rates) > 1:
        console.print(grid(right))
    equal = all(right[way] == right[plain[0]] for way in ways if way[0] == "sync")
    if "sync" in options.rules:
        console.print("sync       " + ("answers as plain SGD does, every time" if equal else "differs from plain SGD"))
    console.print(f"plot       {draw({named(way): runs[best(runs)] for way, runs in right.items()})}")
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


def stream(seed: int, digits: int, passes: int, shift: bool, hold: int) -> list[Sample]:
    """Images, normalised, and labels, in an order of this seed's."""
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32), torch.tensor(data.target)
    images = (images - images.mean()) / images.std()
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(labels), generator=generator)[:digits] for _ in range(passes)])
    shown = images[order]
    if shift:
        moves = torch.randint(-1, 2, (len(order), 2), generator=generator).tolist()
        dark = nn.functional.pad(shown, (1, 1, 1, 1), value=float(images.min()))
        shown = torch.stack([image[1 - y : 9 - y, 1 - x : 9 - x] for image, (y, x) in zip(dark, moves, strict=True)])
    pairs = zip(shown, labels[order], strict=True)
    return [(image[None, None], label[None]) for image, label in pairs for _ in range(hold)]


def plain_sgd(model: nn.Module, samples: Sequence[Sample], m: int, sgd: Any) -> Iterator[Tensor]:
    """One sample after the other in plain PyTorch, with an update every ``m``."""
    optimizer = sgd(model.parameters())
    for k, (x, y) in enumerate(samples):
        output = model(x)
        (LOSS(output, y) / m).backward()
        if (k + 1) % m == 0:
            optimizer.step()
            optimizer.zero_grad()
        yield output.detach()


def pipelined(model: nn.Module, samples: Sequence[Sample], way: Way, sgd: Any, executor: str) -> Iterator[Tensor]:
    """The same through a pipeline."""
    rule, stages, clock = way
    x, y = samples[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)  # stages share cores, or are too short to pay
        pipe = pipecompile.compile(
            model, (x,), mode="learn", loss_fn=LOSS, optimizer=sgd, updates=rule, clock=clock, devices=stages,
            accumulate=group_size(*way), example_targets=y, executor=executor, profile_seconds=0.2,
            on_nonfinite="skip",
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


def best(runs: dict[float, list[list[bool]]]) -> float:
    """The learning rate with the most right answers."""
    return max(runs, key=lambda rate: statistics.fmean(accuracy(runs[rate])))


def samples_an_update(way: Way) -> int:
    return way[1] if way[0] == "plain SGD" else group_size(*way)


def named(way: Way) -> str:
    rule, count, clock = way
    return f"plain SGD, m = {count}" if not clock else f"{rule}, {count} stages, {clock}"


def spread(values: list[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.1f} ± {deviation:.1f}"


def table(right: Runs) -> Table:
    """Every way at its best learning rate."""
    made = Table(
        title="prequential accuracy in %, mean ± standard deviation over seeds; m samples an update",
        title_justify="left",
    )
    for heading in ("updates", "m", "rate"):
        made.add_column(heading)
    for heading in ("all", "last 500", "- SGD", "- SGD, same m"):
        made.add_column(heading, justify="right")

    def gap(way: Way, m: int) -> str:
        peer = right["plain SGD", m, ""]
        pairs = zip(accuracy(right[way][best(right[way])]), accuracy(peer[best(peer)]), strict=True)
        return spread([one - other for one, other in pairs], "+")

    for way, runs in right.items():
        m, rate = samples_an_update(way), best(runs)
        cells = [named(way), str(m), f"{rate:g}", spread(accuracy(runs[rate]))]
        late = statistics.fmean(accuracy(runs[rate], 500))
        made.add_row(*cells, f"{late:.1f}", gap(way, 1), gap(way, m) if way[2] else "")
    return made


def grid(right: Runs) -> Table:
    """Every way at every learning rate."""
    rates = list(next(iter(right.values())))
    made = Table("updates", *(f"{rate:g}" for rate in rates), title="by learning rate", title_justify="left")
    for way, runs in right.items():
        made.add_row(named(way), *(spread(accuracy(runs[rate])) for rate in rates))
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
        figure.add_scatter(x=list(at), y=share, name=name, line={"width": 3 if name.startswith("plain") else 1.5})
    figure.update_layout(
        xaxis_title="digits seen", yaxis_title=f"right among the last {WINDOW}, %", template="plotly_white"
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "accuracy.html"
    figure.write_html(path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
