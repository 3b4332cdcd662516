"""Transformers written by hand or from torch.nn."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.registry import Built, case, keywords, positional


@case("transformer_encoder", core=True)
def encoder() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), positional(lambda: torch.randn(2, 7, 16))


@case("transformer_encoder_masked")
def encoder_masked() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(16), enable_nested_tensor=False)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.zeros(2, 7)
    padding[1, 5:] = float("-inf")

    def call() -> dict[str, Any]:
        return {"src": torch.randn(2, 7, 16), "mask": causal, "is_causal": False, "src_key_padding_mask": padding}

    return model, keywords(call)


@case("transformer_encoder_mask_detected", refused="torch compares the mask with a causal one to choose a kernel")
def encoder_mask_detected() -> Built:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return model, keywords(lambda: {"src": torch.randn(2, 7, 16), "mask": mask})


@case("transformer_full")
def full() -> Built:
    model = nn.Transformer(16, 2, 2, 2, 32, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    calls = [
        ((torch.randn(2, 7, 16), torch.randn(2, 5, 16)), {"tgt_mask": mask, "tgt_is_causal": True}) for _ in range(3)
    ]
    return model, calls


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True, add_bias_kv=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, query: Tensor, memory: Tensor, ignore: Tensor) -> tuple[Tensor, Tensor]:
        out, weights = self.attend(query, memory, memory, key_padding_mask=ignore)
        return self.head(self.norm(query + out)), weights


@case("multihead_attention", notes="three inputs, one of them boolean; weights returned")
def cross_attention() -> Built:
    def inputs() -> tuple[Tensor, ...]:
        ignore = torch.rand(2, 6) < 0.3
        ignore[:, 0] = False
        return torch.randn(2, 4, 16), torch.randn(2, 6, 12), ignore

    return CrossAttention(), positional(inputs)


class EinsumAttention(nn.Module):
    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return x + self.out(out.flatten(2))


@case("einsum_attention")
def einsum_attention() -> Built:
    return nn.Sequential(*(EinsumAttention() for _ in range(3))), positional(lambda: torch.randn(2, 6, 16))


class CausalBlock(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        keep = torch.arange(length)[:, None] >= torch.arange(length)[None]
        q, k, v = (t.view(batch, length, 2, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(width, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * value)


class TinyGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(40, 16), nn.Embedding(32, 16)
        self.blocks = nn.ModuleList(CausalBlock() for _ in range(3))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for each in self.blocks:
            x = each(x)
        return self.head(x)


@case("tied_weights", core=True, notes="embedding = output head; masks from arange in every block")
def tied() -> Built:
    return TinyGPT(), positional(lambda: torch.randint(0, 40, (2, 8)))


class Rotary(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.register_buffer("freq", 1.0 / 100 ** (torch.arange(0, width, 2) / width), persistent=False)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float32), self.freq)
        cos, sin = angle.cos(), angle.sin()
        for layer in self.layers:
            even, odd = layer(x).unflatten(-1, (-1, 2)).unbind(-1)
            x = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        return x


@case("rotary_buffer_not_persistent", notes="one table, computed from a buffer, read by every stage")
def rotary() -> Built:
    return Rotary(), positional(lambda: torch.randn(2, 6, 16))


class Relative(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(15, 2)
        self.layers = nn.ModuleList(nn.Linear(8, 24) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        bias = self.bias(distance.clamp(-7, 7) + 7).permute(2, 0, 1)
        for layer in self.layers:
            q, k, v = layer(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
            x = x + (((q @ k.mT) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


@case("relative_bias", notes="a weight-only value shared by all layers")
def relative() -> Built:
    return Relative(), positional(lambda: torch.randn(2, 6, 8))


class Mixture(nn.Module):
    def __init__(self, width: int = 12, experts: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, chosen = self.gate(x).softmax(-1).topk(2)
        weights = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, chosen, scores)
        return sum(weights[..., i, None] * expert(x) for i, expert in enumerate(self.experts)), chosen


@case("mixture_of_experts", notes="dense: every expert sees every token")
def mixture() -> Built:
    return Mixture(), positional(lambda: torch.randn(2, 5, 12))
