"""More models to train, of kinds the zoo has not: towers, encoder and decoder, adapters, stages without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.training import BATCH, Job, classes


@dataclass(frozen=True)
class Case:
    """A job, how many devices it is for, and further options of compile()."""

    build: Callable[[], Job]
    devices: int = 2
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def make(self) -> Job:
        torch.manual_seed(3)
        job = self.build()
        return Job(job.model.double().train(), _double(job.inputs), _double(job.targets), job.loss_fn)


MORE: dict[str, Case] = {}


def more(name: str, devices: int = 2, **options: Any) -> Callable[[Callable[[], Job]], Callable[[], Job]]:
    def enter(build: Callable[[], Job]) -> Callable[[], Job]:
        MORE[name] = Case(build, devices, options)
        return build

    return enter


def _double(nest: Any) -> Any:
    if isinstance(nest, dict):
        return {key: _double(value) for key, value in nest.items()}
    if isinstance(nest, tuple):
        return tuple(_double(value) for value in nest)
    return nest.double() if nest.is_floating_point() else nest


def padding(length: int) -> torch.Tensor:
    return (torch.arange(length) < torch.randint(2, length + 1, (BATCH, 1))).long()


def of_logits(result: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(result.logits, targets)


def of_tokens(result: Any, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(result.logits.flatten(0, 1), targets.flatten())


@more("bert", devices=3)
def bert() -> Job:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    inputs = {"input_ids": classes(50, BATCH, 7), "attention_mask": padding(7), "token_type_ids": classes(2, BATCH, 7)}
    return Job(BertForSequenceClassification(config), inputs, classes(3), of_logits)


@more("t5")
def t5() -> Job:
    """One embedding for encoder, decoder and result."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, use_cache=False,
        decoder_start_token_id=0, dropout_rate=0.1,
    )  # fmt: skip
    tokens = classes(50, BATCH, 7)
    inputs = {"input_ids": tokens, "attention_mask": padding(7), "decoder_input_ids": classes(50, BATCH, 5)}
    return Job(T5ForConditionalGeneration(config), inputs, classes(50, BATCH, 5), of_tokens)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).logits.transpose(1, 2)


@more("distilbert")
def distilbert() -> Job:
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32, max_position_embeddings=16)
    targets = classes(50, BATCH, 7)
    targets[torch.rand(targets.shape) < 0.7] = -100
    inputs = {"input_ids": classes(50, BATCH, 7), "attention_mask": padding(7)}
    return Job(Logits(DistilBertForMaskedLM(config)), inputs, targets, nn.CrossEntropyLoss())


class TiedThrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(30, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.head, self.drop = nn.Linear(12, 30, bias=False), nn.Dropout(0.2)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a(self.drop(self.embed(ids))))
        mixed = F.linear(x, self.embed.weight).softmax(-1) @ self.embed.weight
        return self.head(torch.tanh(self.b(x + mixed))).transpose(1, 2)


@more("tied_thrice", devices=3)
def tied_thrice() -> Job:
    return Job(TiedThrice(), (classes(30, BATCH, 5),), classes(30, BATCH, 5), nn.CrossEntropyLoss(label_smoothing=0.1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 12)
        self.lstm = nn.LSTM(12, 12, 2, dropout=0.3, batch_first=True)
        self.gru, self.norm = nn.GRU(12, 12, batch_first=True), nn.LayerNorm(12)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden, (_, cell) = self.lstm(self.embed(ids))
        hidden, _ = self.gru(hidden)
        return {"out": F.linear(self.norm(hidden), self.embed.weight).transpose(1, 2), "cell": cell[-1]}


def recurrent_loss(result: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> torch.Tensor:
    return F.cross_entropy(result["out"], targets["out"]) + (result["cell"] - targets["cell"]).square().mean()


@more("recurrent")
def recurrent() -> Job:
    targets = {"out": classes(30, BATCH, 6), "cell": torch.randn(BATCH, 12)}
    return Job(Recurrent(), (classes(30, BATCH, 6),), targets, recurrent_loss)


class Adapter(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, layer.in_features) * 0.1)
        self.b = nn.Parameter(torch.randn(layer.out_features, 2) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + x @ self.a.t() @ self.b.t()


@more("adapters")
def adapters() -> Job:
    frozen = [nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 16).requires_grad_(False)]
    middle, last = Adapter(nn.Linear(16, 16)), Adapter(nn.Linear(16, 4))
    model = nn.Sequential(frozen[0], nn.ReLU(), middle, nn.ReLU(), frozen[1], nn.Tanh(), last)
    return Job(model, (torch.randn(BATCH, 8),), classes(4), nn.CrossEntropyLoss())


class Smooth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(6):
            x = F.avg_pool2d(x, 3, 1, 1).exp().log() + x.roll(1, -1) * 0.1
        return x


@more("no_weights", devices=3)
def no_weights() -> Job:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Smooth(), Smooth(), nn.Flatten(), nn.Linear(4 * 36, 3))
    return Job(model, (torch.randn(BATCH, 2, 8, 8),), classes(3), nn.CrossEntropyLoss())


@more("mobilenet", deferred_batch_norm=True)
def mobilenet() -> Job:
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(
        image_size=32, depth_multiplier=0.1, min_depth=4, num_labels=3, classifier_dropout_prob=0.0
    )
    inputs = {"pixel_values": torch.randn(BATCH, 3, 32, 32)}
    return Job(MobileNetV2ForImageClassification(config), inputs, classes(3), of_logits)


def contrast(result: Any, _: Any) -> torch.Tensor:
    text, image = result.logits_per_text, result.logits_per_image
    right = torch.arange(len(text))
    return F.cross_entropy(text, right) + F.cross_entropy(image, right)


@more("clip")
def clip() -> Job:
    """Two towers, a scale, and samples that are compared within a micro-batch."""
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={**tower, **text}, vision_config={**tower, "image_size": 8, "patch_size": 4}, projection_dim=8
    )
    inputs = {
        "input_ids": classes(50, BATCH, 7),
        "pixel_values": torch.randn(BATCH, 3, 8, 8),
        "attention_mask": torch.ones(BATCH, 7).long(),
    }
    return Job(CLIPModel(config), inputs, torch.zeros(BATCH, 1), contrast)


def next_token(result: Any, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(result.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@more("llama", devices=3)
def llama() -> Job:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=16, use_cache=False, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    ids = classes(50, BATCH, 6)
    return Job(LlamaForCausalLM(config), {"input_ids": ids, "attention_mask": padding(6)}, ids, next_token)


class Noisy(nn.Module):
    """Every kind of dropout, and an activation that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList(nn.Linear(10, 10) for _ in range(6)), nn.Linear(10, 2)
        kinds = [nn.Dropout, nn.AlphaDropout, nn.Dropout1d, nn.Dropout, nn.FeatureAlphaDropout, nn.Dropout]
        self.drops = nn.ModuleList(kind(0.2) for kind in kinds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, drop in zip(self.layers, self.drops, strict=True):
            x = x + drop(F.rrelu(layer(x), training=True))
        return self.out(x)


@more("noisy")
def noisy() -> Job:
    return Job(Noisy(), (torch.randn(BATCH, 10),), torch.randn(BATCH, 2), nn.SmoothL1Loss())


class Variational(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.mean, self.log = nn.Linear(12, 10), nn.Linear(10, 4), nn.Linear(10, 4)
        self.decode = nn.Sequential(nn.Linear(4, 10), nn.SELU(), nn.Linear(10, 12))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = torch.relu(self.encode(x))
        mean, log = self.mean(hidden), self.log(hidden)
        return self.decode(mean + torch.randn_like(mean) * (log / 2).exp()), mean, log


def variational_loss(result: tuple[torch.Tensor, torch.Tensor, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    made, mean, log = result
    return F.mse_loss(made, x) - 0.5 * (1 + log - mean**2 - log.exp()).mean()


@more("variational", devices=3)
def variational() -> Job:
    x = torch.randn(BATCH, 12)
    return Job(Variational(), (x,), x, variational_loss)


__all__ = ["MORE", "Case"]
