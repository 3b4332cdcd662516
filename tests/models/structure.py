"""Shapes of models: how values go in, across and out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.registry import Built, case, keywords, positional


def dense(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()] if i < len(widths) - 2 else [nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


@case("mlp", core=True)
def mlp() -> Built:
    return dense(16, 32, 32, 32, 32, 10), positional(lambda: torch.randn(4, 16), 4)


@case("sixty_linear", notes="many more layers than stages")
def sixty() -> Built:
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(60)))
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model, positional(lambda: torch.randn(2, 12))


@case("single_layer", notes="fewer layers than stages")
def single() -> Built:
    return nn.Linear(5, 3), positional(lambda: torch.randn(2, 5))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = dense(8, 16, 8), dense(6, 16, 8), dense(16, 16, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.join(torch.cat([self.left(left), self.right(right)], -1))


@case("two_inputs", core=True)
def two_inputs() -> Built:
    return TwoInputs(), positional(lambda: (torch.randn(3, 8), torch.randn(3, 6)))


class LateInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = dense(8, 16, 16, 8), dense(8, 8, 4)

    def forward(self, x: Tensor, scale: Tensor, *, shift: Tensor) -> Tensor:
        return self.head(self.body(x)) * scale + shift


@case("late_inputs", notes="an input and a keyword used only by the last layers")
def late_inputs() -> Built:
    calls = [((torch.randn(3, 8), torch.rand(3, 1)), {"shift": torch.randn(4)}) for _ in range(3)]
    return LateInput(), calls


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = dense(8, 16, 16)
        self.heads = nn.ModuleDict({"boxes": nn.Linear(16, 4), "scores": nn.Linear(16, 3)})

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.body(x)
        made = {name: head(h) for name, head in self.heads.items()}
        return {**made, "more": {"features": h, "pair": (h.sum(), h.amax(-1))}}


@case("dict_outputs", core=True)
def dict_outputs() -> Built:
    return Heads(), positional(lambda: torch.randn(3, 8))


@dataclass
class Detection:
    """A result class torch and transformers have never heard of."""

    boxes: Tensor
    scores: Tensor
    note: str = "two heads"
    masks: Tensor | None = None


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.scores = dense(8, 16, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Detection:
        h = self.body(x)
        return Detection(self.boxes(h), self.scores(h).softmax(-1))


@case("dataclass_output")
def dataclass_output() -> Built:
    return Detector(), positional(lambda: torch.randn(3, 8))


class Pair(NamedTuple):
    """A result with names, and with nothing in one place."""

    value: Tensor
    nothing: None
    parts: list[Tensor | None]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = dense(8, 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Pair:
        h = self.body(x)
        return Pair(self.head(h), None, [h if mask is None else h * mask, None])


@case("namedtuple_and_none")
def namedtuple_output() -> Built:
    return Named(), positional(lambda: torch.randn(3, 8))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text, self.join = dense(8, 16, 8), dense(6, 8), dense(24, 16, 5)

    def forward(self, batch: dict[str, Any], scale: float = 1.0, *, bias: Tensor) -> dict[str, Tensor]:
        (left, right), words = batch["pair"], batch["words"][0]
        out = self.join(torch.cat([self.image(left), self.image(right), self.text(words)], -1))
        return {"scaled": out * scale + bias, "left": left}


@case("nested_inputs", notes="a dict of tuples and lists, a Python number, a keyword; one input returned as it came")
def nested_inputs() -> Built:
    def call() -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = {"pair": (torch.randn(2, 8), torch.randn(2, 8)), "words": [torch.randn(2, 6)]}
        return (batch, 0.5), {"bias": torch.randn(5)}

    return Nested(), [call() for _ in range(3)]


class KeywordOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), dense(8, 16, 6)

    def forward(self, ids: Tensor, mask: Tensor, flag: bool = False) -> Tensor:
        h = self.embed(ids) * mask[..., None]
        return self.body(h.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


@case("keyword_inputs", notes="integers and booleans by keyword")
def keyword_inputs() -> Built:
    return KeywordOnly(), keywords(
        lambda: {"ids": torch.randint(0, 20, (2, 6)), "mask": torch.rand(2, 6) > 0.3, "flag": True}
    )


class FirstToLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.body = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)))
        self.last = nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(x)
        return self.last(start, self.body(start))


@case("first_feeds_last", core=True, notes="a skip over every stage")
def first_to_last() -> Built:
    return FirstToLast(), positional(lambda: torch.randn(3, 8), 5)


class SharedWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 10) / 3)
        self.middle = dense(10, 12, 12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.middle(torch.tanh(x @ self.weight))) @ self.weight.T


@case("parameter_in_two_stages")
def shared_weight() -> Built:
    return SharedWeight(), positional(lambda: torch.randn(3, 10))


class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.norms = nn.Linear(10, 10), nn.ModuleList(nn.LayerNorm(10) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = x + torch.relu(self.block(norm(x)))
        return x


@case("module_called_four_times")
def shared_module() -> Built:
    return SharedModule(), positional(lambda: torch.randn(3, 10))


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@case("returns_input", notes="no op at all")
def returns_input() -> Built:
    return Same(), positional(lambda: torch.randn(3, 4))


class WithParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = dense(6, 8, 4)
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.body(x) / self.temperature, self.temperature, x


@case("returns_parameter", notes="and its input")
def returns_parameter() -> Built:
    return WithParameter(), positional(lambda: torch.randn(3, 6))


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = dense(6, 8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.body(x)
        return y, y, y[:, 1:3]


@case("same_value_returned_twice", notes="and a view of it")
def repeated() -> Built:
    return Repeated(), positional(lambda: torch.randn(3, 6))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.more = dense(6, 8, 6), dense(6, 8, 6)
        self.unused = nn.Linear(1000, 3)

    def forward(self, x: Tensor, ignored: Tensor) -> Tensor:
        return self.more(self.body(x))


@case("unused_input_and_weights")
def branches() -> Built:
    return Branches(), positional(lambda: (torch.randn(3, 6), torch.randn(2)))


class Deep(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.inner = Deep(depth - 1) if depth else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.sigmoid(self.inner(self.layer(x))))


@case("recursive_modules", notes="each module's weight is used before and after everything inside it")
def recursive() -> Built:
    return Deep(), positional(lambda: torch.randn(2, 7))


class PassThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = dense(6, 8, 4)

    def forward(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        return {"same": x, "made": self.body(x), "other": other}


@case("returns_inputs_too", notes="two inputs among the results, one of them used by nothing")
def pass_through() -> Built:
    return PassThrough(), positional(lambda: (torch.randn(3, 6), torch.randint(0, 9, (2,))))


class Names(nn.Module):
    """Arguments and modules called what generated code calls its own things."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("torch", "aten", "link", "state", "message", "sample", "stage_0", "len"):
            self.add_module(name, nn.Linear(4, 4))
        self.register_buffer("p_torch_weight_", torch.randn(4))

    def forward(
        self, state: Tensor, message: Tensor, run: Tensor, stage_1: Tensor, from_host: Tensor, **others: Tensor
    ) -> tuple[Tensor, ...]:
        y = state + message + run + stage_1 + from_host + sum(others.values())
        for layer in self.children():
            y = layer(y)
        return y + self.p_torch_weight_ + state, message * 2, from_host + 1, stage_1 - others["class"]


@case("names_of_generated_code")
def names() -> Built:
    others = ("state_", "count", "class", "a b", "_x", "v_x", "to_host")
    arguments = ("state", "message", "run", "stage_1", "from_host", *others)
    return Names(), keywords(lambda: {name: torch.randn(2, 4) for name in arguments})


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.second(self.first(x) + y)


@case("one_tensor_for_two_inputs", notes="only in the example: later calls give two")
def twice() -> Built:
    same = torch.randn(2, 4)
    return Sum(), [((same, same), {}), *positional(lambda: (torch.randn(2, 4), torch.randn(2, 4)), 2)]


@case("result_hooks", notes="a hook keeps a result where forward reads it")
def hooked() -> Built:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.kept: list[Tensor] = []
            self.first.register_forward_hook(lambda _module, _inputs, result: self.kept.append(result))

        def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
            self.kept.clear()
            return self.second(self.first(x)), list(self.kept)

    return Hooked(), positional(lambda: torch.randn(2, 4))
