"""The models that are timed, at realistic sizes, batch 1, random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Example = tuple[nn.Module, tuple[Any, ...]]


class _Conv(nn.Module):
    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(layers - 1):
            blocks += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class _UNet(nn.Module):
    """Three levels, skips across the middle."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()

        def block(a: int, b: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
            )  # fmt: skip

        w = width
        self.down = nn.ModuleList([block(3, w), block(w, 2 * w), block(2 * w, 4 * w)])
        self.middle = block(4 * w, 8 * w)
        self.up = nn.ModuleList([block(12 * w, 4 * w), block(6 * w, 2 * w), block(3 * w, w)])
        self.head = nn.Conv2d(w, 2, 1)
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips: list[torch.Tensor] = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up in self.up:
            x = up(torch.cat([self.grow(x), skips.pop()], 1))
        return self.head(x)


def _mlp(layers: int, width: int) -> Example:
    body = [m for _ in range(layers) for m in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*body), (torch.randn(1, width),)


def _resnet() -> Example:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512], embedding_size=64, return_dict=False
    )
    return ResNetForImageClassification(config), (torch.randn(1, 3, 224, 224),)


def _bert() -> Example:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, return_dict=False
    )
    return BertModel(config), (torch.randint(0, 30000, (1, 128)),)


def _gpt2() -> Example:
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(n_layer=6, n_embd=512, n_head=8, use_cache=False, return_dict=False)
    return GPT2Model(config), (torch.randint(0, 50000, (1, 64)),)


def _vit() -> Example:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, return_dict=False
    )
    return ViTModel(config), (torch.randn(1, 3, 224, 224),)


#: The six of realistic size, then three that stress the runtime: stages of about 1 ms (the first with weights that
#: fit a core's own cache, the second with weights that fit the shared one only while one stage runs) and 0.1 ms.
MODELS: dict[str, Callable[[], Example]] = {
    "resnet18 224px": _resnet,
    "bert 6x384 seq128": _bert,
    "gpt2 6x512 seq64": _gpt2,
    "vit-tiny 224px": _vit,
    "unet 128px": lambda: (_UNet(), (torch.randn(1, 3, 128, 128),)),
    "conv chain 30": lambda: (_Conv(30, 32), (torch.randn(1, 3, 64, 64),)),
    "conv chain 30 20px": lambda: (_Conv(30, 32), (torch.randn(1, 3, 20, 20),)),
    "mlp 16x1024": lambda: _mlp(16, 1024),
    "mlp 16x256": lambda: _mlp(16, 256),
}


def build(name: str) -> Example:
    """The model in eval mode with fixed random weights, and one example."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    return model.eval(), example
