"""Models that keep something from one sample to the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.registry import Built, case, positional


class MovingAverage(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.second(h - self.mean)


@case("state_moving_average", core=True, notes="a buffer written in place")
def moving_average() -> Built:
    model = nn.Sequential(nn.Linear(8, 8), MovingAverage(), nn.ReLU(), MovingAverage(), nn.Linear(8, 3))
    return model, positional(lambda: torch.randn(4, 8), 5)


class Counter(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(2 * width, width)
        self.register_buffer("state", torch.zeros(2, width))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.count = self.count + 1
        self.state = torch.tanh(self.second(torch.cat([self.first(x), self.state], -1)))
        return self.state / self.count, self.count


@case("state_reassigned", notes="self.buffer = ...; a recurrence across samples; the buffer itself returned")
def reassigned() -> Built:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Counter())
    return model, positional(lambda: torch.randn(2, 6), 5)


class Ring(nn.Module):
    def __init__(self, width: int = 5, length: int = 3) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)
        self.register_buffer("ring", torch.zeros(length, width))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64))
        self.out = nn.Linear(width * length, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.ring.index_copy_(0, self.place, self.into(x))
        self.place.add_(1).remainder_(self.ring.shape[0])
        return self.out(self.ring.flatten())


@case("state_ring_index_copy")
def ring() -> Built:
    return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), Ring()), positional(lambda: torch.randn(1, 5), 5)


class Shift(nn.Module):
    def __init__(self, width: int = 5, length: int = 4) -> None:
        super().__init__()
        self.register_buffer("past", torch.zeros(length, width))
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        self.past[:-1] = self.past[1:].clone()
        self.past[-1] = x[0]
        return self.mix(self.past).sum(0, keepdim=True)


@case("state_shift_register", notes="slice assignment into a buffer, twice")
def shift() -> Built:
    model = nn.Sequential(nn.Linear(5, 5), Shift(), nn.ReLU(), Shift(), nn.Linear(5, 2))
    return model, positional(lambda: torch.randn(1, 5), 6)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        self.total.add_(x.sum(0))
        x = self.layers[2](torch.relu(self.layers[1](x)))
        self.total.mul_(0.5)
        return self.layers[3](x) + self.total


@case("state_written_early_read_late", notes="one buffer written by two layers far apart")
def shared() -> Built:
    return Shared(), positional(lambda: torch.randn(3, 6), 5)


class RunningNorm(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.into = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 3)

    def train(self, mode: bool = True) -> RunningNorm:
        super().train(mode)
        self.norm.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.into(x)))


@case("state_batchnorm_kept_in_training", notes="running statistics move in eval, as in test-time adaptation")
def running_norm() -> Built:
    return RunningNorm(), positional(lambda: torch.randn(8, 6) * 2 + 1, 5)


class Cached(nn.Module):
    def __init__(self, width: int = 8, length: int = 6) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("keys", torch.zeros(length, width))
        self.register_buffer("values", torch.zeros(length, width))
        self.register_buffer("position", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        self.keys.index_copy_(0, self.position, k)
        self.values.index_copy_(0, self.position, v)
        seen = torch.arange(self.keys.shape[0]) <= self.position
        scores = (q @ self.keys.T).masked_fill(~seen, float("-inf"))
        self.position += 1
        return x + self.out(scores.softmax(-1) @ self.values)


@case("state_key_value_cache", notes="one token a sample, attention over all before it")
def cached() -> Built:
    return nn.Sequential(nn.Linear(8, 8), Cached(), Cached(), Cached()), positional(lambda: torch.randn(1, 8), 5)


class Attribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.total = torch.zeros(6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.total += h.mean(0)
        return self.second(h) * self.total


@case("state_in_a_plain_tensor", notes="written in place though it is no buffer; tracing must not move it")
def plain_tensor() -> Built:
    return Attribute(), positional(lambda: torch.randn(2, 6), 4)


class Decaying(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.mul_(0.9)
        return self.second(self.first(x))


@case("state_in_a_parameter", notes="a weight written in forward; tracing must not move it")
def written_parameter() -> Built:
    return Decaying(), positional(lambda: torch.randn(2, 6), 4)


class Switching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.norm.train()
        y = self.norm(self.layer(x))
        self.norm.eval()
        return self.out(y)


@case("state_batchnorm_trained_in_forward", notes="an operator that writes to its statistics without declaring it")
def switching() -> Built:
    return Switching(), positional(lambda: torch.randn(5, 6), 4)


class Previous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        changed = y if self.last is None else y - self.last
        self.last = y
        return changed


@case("state_in_an_attribute", refused="the last result is kept where capture takes it for a constant")
def previous() -> Built:
    return Previous(), positional(lambda: torch.randn(2, 6), 4)
