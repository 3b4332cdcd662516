"""Train a small convolutional network on handwritten digits, pipelined over two cores, beside plain PyTorch.

scikit-learn's 1,797 images of 8x8 are split into training and test images. The pipeline trains in
worker processes, four micro-batches a step; then plain PyTorch trains the same network on the same
micro-batches. Both losses are drawn into one plot, and the largest difference between the two
curves is printed.

    python examples/train_digits.py [--epochs 15] [--schedule auto]
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "digits"
BATCH, PARTS = 64, 4
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--schedule", default="auto", help="auto, gpipe, 1f1b, interleaved, breadth_first, zb_h1, zb_v")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=0.2, random_state=0)
    model = network()
    twin = copy.deepcopy(model)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)  # one core: the devices share it
        pipe = pipecompile.compile(
            model, train_x[:BATCH], mode="train", loss_fn=nn.CrossEntropyLoss(), optimizer=SGD, devices=2,
            schedule=options.schedule, micro_batches=PARTS, example_targets=train_y[:BATCH], profile_seconds=0.5,
        )  # fmt: skip
    stages = " | ".join(", ".join(pipe.plan.layer_names[i] for i in stage.layers) for stage in pipe.plan.stages)
    console.print(f"schedule   {pipe.program.schedule}, {len(pipe.plan.stages)} stages: {stages}")
    with pipe:
        mine, seconds = run(console, "pipeline", options.epochs, train_x, train_y, pipe.train_step)
        accuracy = correct(pipe.eval(), test_x, test_y)
    console.print(f"pipeline   {seconds:.1f} s, test accuracy {accuracy:.2%}")

    optimizer, loss_fn = SGD(twin.parameters()), nn.CrossEntropyLoss()

    def eager_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part, target in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            loss = loss_fn(twin(part), target) / PARTS
            loss.backward()
            total += loss.detach()
        optimizer.step()
        return total

    wanted, seconds = run(console, "eager", options.epochs, train_x, train_y, eager_step)
    eager_accuracy = correct(twin.eval(), test_x, test_y)
    console.print(f"eager      {seconds:.1f} s, test accuracy {eager_accuracy:.2%}")
    apart = max(abs(a - b) for a, b in zip(mine, wanted, strict=True))
    console.print(f"curves     at most {apart:.1e} apart in {len(mine)} steps")
    path = draw(mine, wanted)
    console.print(f"plot       {path}")
    return 0 if accuracy >= 0.97 and apart < 1e-3 else 1


def network() -> nn.Module:
    def block(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def batches(epochs: int, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled anew each epoch, the same way every time; a last batch that is too small is left out."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield images[chosen], labels[chosen]


def run(
    console: Console, name: str, epochs: int, images: Tensor, labels: Tensor, step: object
) -> tuple[list[float], float]:
    assert callable(step)
    losses: list[float] = []
    steps = epochs * (len(images) // BATCH)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name:10}", total=steps)
        begin = time.perf_counter()
        for x, y in batches(epochs, images, labels):
            losses.append(float(step(x, y)))
            progress.update(task, advance=1, description=f"{name:10} loss {losses[-1]:.3f}")
        return losses, time.perf_counter() - begin


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def draw(mine: list[float], wanted: list[float]) -> Path:
    """Both losses over the steps, as an SVG: eager broad and pale, the pipeline thin on top of it."""
    width, height, top = 720, 320, max(*mine, *wanted)

    def line(losses: list[float], style: str) -> str:
        points = (f"{40 + (width - 60) * i / len(losses):.1f},{20 + (height - 60) * (1 - v / top):.1f}"
                  for i, v in enumerate(losses))  # fmt: skip
        return f'<polyline fill="none" {style} points="{" ".join(points)}"/>'

    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "loss.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
        '<rect width="100%" height="100%" fill="white"/>'
        + line(wanted, 'stroke="#f4b183" stroke-width="5"')
        + line(mine, 'stroke="#1f4e79" stroke-width="1.2"')
        + f'<text x="44" y="16">{top:.2f}</text><text x="44" y="{height - 44}">0</text>'
        f'<text x="{width / 2}" y="{height - 14}" text-anchor="middle">{len(mine)} steps; loss of the pipeline (thin) '
        "and of plain PyTorch (broad)</text></svg>\n"
    )
    return path


if __name__ == "__main__":
    raise SystemExit(main())
