"""Models to train: each with one batch, its targets and a loss. Small, but of the real kinds."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

#: Samples in a batch.
BATCH = 8


@dataclass(frozen=True)
class Job:
    """What one training run needs. ``inputs`` is a tuple of arguments or a dict of keywords."""

    model: nn.Module
    inputs: Any
    targets: Any
    loss_fn: Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Training:
    """A named job. ``least`` is how many layers it has at the least, so how many stages fit."""

    name: str
    build: Callable[[], Job]
    notes: str = ""
    kinds: frozenset[str] = field(default_factory=frozenset)

    def make(self, dtype: torch.dtype = torch.float64) -> Job:
        """The same model and batch every time, in train mode, in the given dtype."""
        torch.manual_seed(zlib.crc32(self.name.encode()))
        job = self.build()
        cast = partial(_cast, dtype=dtype)
        loss_fn = job.loss_fn.to(dtype) if isinstance(job.loss_fn, nn.Module) else job.loss_fn
        return Job(_keep_modes(job.model.to(dtype)), cast(job.inputs), cast(job.targets), loss_fn)

    def __str__(self) -> str:
        return self.name


def _keep_modes(model: nn.Module) -> nn.Module:
    return model if model.training else model.train()


def _cast(nest: Any, dtype: torch.dtype) -> Any:
    if isinstance(nest, torch.Tensor):
        return nest.to(dtype) if nest.is_floating_point() else nest
    if isinstance(nest, dict):
        return {key: _cast(value, dtype) for key, value in nest.items()}
    return tuple(_cast(value, dtype) for value in nest) if isinstance(nest, tuple) else nest


TRAINING: dict[str, Training] = {}


def training(name: str, notes: str = "", *kinds: str) -> Callable[[Callable[[], Job]], Callable[[], Job]]:
    def enter(build: Callable[[], Job]) -> Callable[[], Job]:
        TRAINING[name] = Training(name, build, notes, frozenset(kinds))
        return build

    return enter


def classes(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(count, shape or (BATCH,))


@training("mlp", "an in-place activation among them")
def mlp() -> Job:
    sizes = [8, 16, 16, 16, 16, 5]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=i % 2 == 0)]
    return Job(nn.Sequential(*layers[:-1]), (torch.randn(BATCH, 8),), classes(5), nn.CrossEntropyLoss())


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x
        return F.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.Sequential(Block(8), Block(8), Block(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


@training("resnet", "residuals written in place, BatchNorm per micro-batch", "buffers")
def resnet() -> Job:
    return Job(ResNet(), (torch.randn(BATCH, 3, 9, 9),), classes(4), nn.CrossEntropyLoss())


class Net(nn.Module):
    """A U-Net: every level skips to its counterpart on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in [(1, 4), (4, 8), (8, 8)])
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList(nn.ConvTranspose2d(16, b, 2, stride=2) for b in [8, 8, 4])
        self.norm = nn.ModuleList(nn.GroupNorm(2, b) for b in [8, 8, 4])
        self.merge = nn.ModuleList([nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(12, 16, 3, padding=1)])
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for layer in self.down:
            x = F.relu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        x = self.norm[0](self.up[0](torch.cat([x, x], 1)))
        x = self.norm[1](self.up[1](torch.cat([x, skips.pop()], 1)))
        x = self.merge[0](torch.cat([x, skips.pop()], 1))
        x = self.norm[2](self.up[2](torch.cat([x, x], 1)))
        return self.out(x * skips.pop().sigmoid())


@training("unet", "skips over several stages, per-pixel classes, some ignored")
def unet() -> Job:
    targets = classes(3, BATCH, 8, 8)
    targets[torch.rand(targets.shape) < 0.2] = -100
    targets[2] = -100  # more ignored in one micro-batch than in another
    return Job(Net(), (torch.randn(BATCH, 1, 8, 8),), targets, nn.CrossEntropyLoss())


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 8), nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.mix, self.out = nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.lstm(self.embed(ids))
        return self.out(torch.tanh(self.mix(hidden))).transpose(1, 2)


@training("lstm", "a fused operator, which is not split; integer inputs")
def lstm() -> Job:
    return Job(Tagger(), (classes(20, BATCH, 5),), classes(6, BATCH, 5), nn.CrossEntropyLoss())


@training("dropout", "masks by seed, step, micro-batch and operator", "random")
def dropout() -> Job:
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(12, 12), nn.Dropout(0.3), nn.GELU()]
    return Job(nn.Sequential(*layers, nn.Linear(12, 3)), (torch.randn(BATCH, 12),), classes(3), nn.CrossEntropyLoss())


def next_token(result: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(result.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@training("gpt2", "embedding tied to the last layer; attention with dropout", "tied", "random")
def gpt2() -> Job:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=48, n_positions=16, n_embd=16, n_layer=3, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    ids = classes(48, BATCH, 7)
    return Job(GPT2LMHeadModel(config), {"input_ids": ids}, ids, next_token)


def of_logits(result: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(result.logits, targets)


@training("vit", "patches, class token, many views")
def vit() -> Job:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        num_labels=4,
    )  # fmt: skip
    return Job(ViTForImageClassification(config), (torch.randn(BATCH, 3, 8, 8),), classes(4), of_logits)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(self.embed(ids), src_key_padding_mask=mask == 0)
        return self.out((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


@training("masked", "an integer mask read by many stages; keyword inputs", "random")
def masked() -> Job:
    mask = (torch.arange(6) < torch.randint(2, 7, (BATCH, 1))).long()
    return Job(Masked(), {"ids": classes(30, BATCH, 6), "mask": mask}, classes(2), nn.CrossEntropyLoss())


@training("frozen", "a front without gradients, and a frozen BatchNorm in eval mode", "buffers")
def frozen() -> Job:
    front = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8))
    front.requires_grad_(False)
    back = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    model = nn.Sequential(front, back)
    model.train()
    model.get_submodule("0.1").eval()
    return Job(model, (torch.randn(BATCH, 8),), classes(3), nn.CrossEntropyLoss())


class TwoHeads(nn.Module):
    """An early and a late result, a shared input, and a result that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.early = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        first = torch.tanh(self.a(x))
        early = self.early(first)
        hidden = torch.tanh(self.b(first)) + x
        return {"early": early, "late": self.d(torch.tanh(self.c(hidden)) * weight), "weight": weight}


def both(result: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    late = ((result["late"] - targets["late"]) ** 2 * result["weight"]).mean()
    return F.cross_entropy(result["early"], targets["early"]) + late


@training("two_heads", "two losses, a nest of targets, an early result, an input handed through")
def two_heads() -> Job:
    inputs = (torch.randn(BATCH, 6), torch.rand(BATCH, 1))
    return Job(TwoHeads(), inputs, {"early": classes(3), "late": torch.randn(BATCH, 2)}, both)


class Autoencoder(nn.Module):
    """The decoder uses the encoder's weights transposed, and one weight three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(10, 6), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        for _ in range(3):
            hidden = torch.tanh(self.middle(hidden))
        return F.linear(hidden, self.first.weight.t(), self.bias)


@training("autoencoder", "weights tied between stages and used several times", "tied")
def autoencoder() -> Job:
    x = torch.randn(BATCH, 10)
    return Job(Autoencoder(), (x,), x, nn.MSELoss())


@training("weight_norm", "a weight computed from parameters, in every stage that uses it")
def weight_norm() -> Job:
    norm = nn.utils.parametrizations.weight_norm
    layers = [nn.Conv1d(4, 6, 3), nn.Tanh(), norm(nn.Conv1d(6, 6, 3)), nn.Tanh(), norm(nn.Conv1d(6, 2, 3))]
    return Job(nn.Sequential(*layers, nn.Flatten()), (torch.randn(BATCH, 4, 12),), torch.randn(BATCH, 12), nn.L1Loss())


class Statistics(nn.Module):
    """Buffers written under no_grad, a detached branch, a sum as loss."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 2)
        self.register_buffer("mean", torch.zeros(7))
        self.mean: torch.Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            self.calls += 1
        hidden = torch.tanh(self.b(hidden - self.mean)) * hidden.detach().abs()
        return self.c(hidden)


@training("statistics", "moving averages under no_grad, a detached branch, a sum as loss", "buffers")
def statistics() -> Job:
    return Job(Statistics(), (torch.randn(BATCH, 7),), torch.randn(BATCH, 2), nn.MSELoss(reduction="sum"))


class Attention(nn.Module):
    """Attention written out, with a projection shared by queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.share, self.value, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k = self.share(y), self.share(y * 0.5)
        y = torch.softmax(q @ k.transpose(1, 2) * self.scale, -1) @ self.value(y)
        return self.out(self.norm(x + y)).mean(1)


@training("attention", "weights used twice in a stage, a scalar parameter, class weights in the loss")
def attention() -> Job:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64), label_smoothing=0.1)
    return Job(Attention(), (torch.randn(BATCH, 4, 8),), classes(4), loss)


class HandedThrough(nn.Module):
    """Gradients that are the very tensors that came in: sums of equal shapes, views, and a loss made by the model."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.shift = nn.ParameterList(nn.Parameter(torch.randn(2, 6)) for _ in range(4))  # of a micro-batch's shape

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.a(x) + self.shift[0]
        hidden = hidden + self.b(hidden) + self.shift[1]
        hidden = (hidden.view(2, 2, 3) * 1.0).view(2, 6) + self.shift[2]
        hidden = hidden + self.shift[3]
        out = self.d(torch.tanh(self.c(hidden)))
        return {"loss": (out - y).square().mean(), "out": out + 1}


def own_loss(result: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
    return result["loss"]


@training("handed_through", "gradients that alias a message, a loss computed in the model")
def handed_through() -> Job:
    return Job(HandedThrough(), (torch.randn(BATCH, 6), torch.randn(BATCH, 6)), torch.zeros(BATCH), own_loss)


__all__ = ["BATCH", "TRAINING", "Job", "Training"]
