"""Train a small GPT-2 on the Python reference, character by character, pipelined over two cores, beside plain PyTorch.

The text is the language reference that comes with every Python (what ``help("with")`` shows). The model is
that of transformers, made from a configuration, without dropout; its learning rate rises and falls after
torch's own ``OneCycleLR``. The pipeline trains in worker processes, then plain PyTorch trains the same model
on the same micro-batches. Both losses are drawn into one plot, and the largest difference is printed.

    python examples/train_gpt.py [--steps 300] [--schedule auto]
"""

from __future__ import annotations

import argparse
import copy
import math
import pydoc_data.topics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import GPT2Config, GPT2LMHeadModel

import pipecompile

FOLDER = Path(__file__).resolve().parent.parent / "build" / "train_gpt"
BATCH, PARTS, LENGTH, RATE = 32, 4, 64, 3e-3
ADAMW = partial(torch.optim.AdamW, lr=RATE, weight_decay=0.01)

Step = Callable[[Tensor, Tensor], Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--schedule", default="auto", help="auto, gpipe, 1f1b, interleaved, breadth_first, zb_h1, zb_v")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    topics = sorted(pydoc_data.topics.topics.items())
    # Topics quote each other: every paragraph once, so that the held-out ones are not in the training text.
    text = "\n\n".join(dict.fromkeys(part for _, topic in topics for part in topic.split("\n\n")))
    letters = sorted(set(text))
    codes = torch.tensor([letters.index(letter) for letter in text])
    train, held_out = codes[: -len(codes) // 10], codes[-len(codes) // 10 :]
    shares = [count / len(text) for count in Counter(text).values()]
    blind = -sum(share * math.log(share) for share in shares)
    console.print(f"text       {len(text)} characters, {len(letters)} different ones")
    model = gpt(len(letters), options.layers, options.width)
    twin = copy.deepcopy(model)

    x, y = batch(train, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pipecompile.PipecompileWarning)  # one core: the devices share it
        pipe = pipecompile.compile(
            model, x, mode="train", loss_fn=next_letter, optimizer=ADAMW, devices=2, schedule=options.schedule,
            micro_batches=PARTS, example_targets=y, profile_seconds=0.5,
        )  # fmt: skip
    stages = " | ".join(f"{len(stage.layers)} layers" for stage in pipe.plan.stages)
    console.print(f"schedule   {pipe.program.schedule}, {len(pipe.plan.stages)} stages: {stages}")

    # A scheduler wants a torch optimizer: this one has no weights and carries the learning rate to the pipeline.
    rates = ADAMW([torch.zeros(0)])
    scheduler = OneCycleLR(rates, max_lr=RATE, total_steps=options.steps + 1, cycle_momentum=False)

    def pipeline_step(x: Tensor, y: Tensor) -> Tensor:
        pipe.set_optimizer(lr=scheduler.get_last_lr()[0])
        loss = pipe.train_step(x, y)
        rates.step()
        scheduler.step()
        return loss

    with pipe:
        mine, seconds = run(console, "pipeline", options.steps, train, pipeline_step)
        reached = loss_of(model, held_out)
    console.print(f"pipeline   {seconds:.1f} s, loss of held-out text {reached:.3f}")

    optimizer = ADAMW(twin.parameters())
    twin_scheduler = OneCycleLR(optimizer, max_lr=RATE, total_steps=options.steps + 1, cycle_momentum=False)

    def eager_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part, target in zip(x.chunk(PARTS), y.chunk(PARTS), strict=True):
            loss = next_letter(twin(part), target) / PARTS
            loss.backward()
            total += loss.detach()
        optimizer.step()
        twin_scheduler.step()
        return total

    wanted, seconds = run(console, "eager", options.steps, train, eager_step)
    console.print(f"eager      {seconds:.1f} s, loss of held-out text {loss_of(twin, held_out):.3f}")
    console.print(f"blind      a loss of {blind:.3f}, from how frequent each character is")
    apart = max(abs(a - b) for a, b in zip(mine, wanted, strict=True))
    console.print(f"curves     at most {apart:.1e} apart in {len(mine)} steps, from {mine[0]:.3f} to {mine[-1]:.3f}")
    console.print(f"plot       {draw(mine, wanted, blind)}")
    return 0 if mine[-1] < mine[0] and apart < 1e-2 else 1


def gpt(letters: int, layers: int, width: int) -> nn.Module:
    """Without dropout: the masks of a pipeline are its own, so the curves could not be compared."""
    config = GPT2Config(
        vocab_size=letters, n_positions=LENGTH, n_embd=width, n_layer=layers, n_head=4, use_cache=False,
        bos_token_id=0, eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def next_letter(result: object, targets: Tensor) -> Tensor:
    logits = getattr(result, "logits")  # noqa: B009
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch(codes: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Passages and the same one character later, each (BATCH, LENGTH); chosen by the number of the step."""
    generator = torch.Generator().manual_seed(step)
    begins = torch.randint(len(codes) - LENGTH, (BATCH, 1), generator=generator)
    at = begins + torch.arange(LENGTH)
    return codes[at], codes[at + 1]


def run(console: Console, name: str, steps: int, codes: Tensor, step: Step) -> tuple[list[float], float]:
    losses: list[float] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"{name:10}", total=steps)
        begin = time.perf_counter()
        for i in range(steps):
            losses.append(float(step(*batch(codes, i))))
            progress.update(task, advance=1, description=f"{name:10} loss {losses[-1]:.3f}")
        return losses, time.perf_counter() - begin


def loss_of(model: nn.Module, codes: Tensor) -> float:
    """Mean over eight batches of the text, the same ones every time."""
    with torch.no_grad():
        return sum(float(next_letter(model(x), y)) for x, y in (batch(codes, i) for i in range(8))) / 8


def draw(mine: list[float], wanted: list[float], blind: float) -> Path:
    """Both losses over the steps, as a page: eager broad and pale, the pipeline thin on top of it."""
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_scatter(y=wanted, name="plain PyTorch", line={"width": 6, "color": "#f4b183"})
    figure.add_scatter(y=mine, name="pipeline", line={"width": 1.5, "color": "#1f4e79"})
    figure.add_hline(y=blind, line_dash="dot", annotation_text="by frequency alone")
    figure.update_layout(xaxis_title="steps", yaxis_title="loss, nats a character", template="plotly_white")
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "loss.html"
    figure.write_html(path)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
