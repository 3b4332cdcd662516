"""Recurrent models, and others that walk along a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.registry import Built, case, positional


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, state = self.lstm(self.embed(tokens))
        return self.head(out), state


@case("lstm", core=True, notes="returns the recurrent state too")
def lstm() -> Built:
    return Tagger(), positional(lambda: torch.randint(0, 50, (2, 9)))


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 12, bidirectional=True, num_layers=2)
        self.pool = nn.Linear(24, 1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor, start: Tensor) -> Tensor:
        out, _ = self.gru(x, start)
        return self.head((out * self.pool(out).softmax(0)).sum(0))


@case("gru_bidirectional")
def gru() -> Built:
    return Reader(), positional(lambda: (torch.randn(11, 3, 8), torch.randn(4, 3, 12)))


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.second = nn.RNNCell(6, 10), nn.LSTMCell(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[1], 10)
        a, b = torch.zeros_like(h), torch.zeros_like(h)
        made = []
        for step in x.unbind(0):
            h = self.cell(step, h)
            a, b = self.second(h, (a, b))
            made.append(self.head(a))
        return torch.stack(made)


@case("rnn_cells_unrolled", notes="the same weights in every step, so in several stages")
def loop() -> Built:
    return Loop(), positional(lambda: torch.randn(8, 2, 6))


@case("rnn_tanh")
def rnn() -> Built:
    return nn.RNN(5, 9, batch_first=True, num_layers=3), positional(lambda: torch.randn(2, 7, 5))


class Selective(nn.Module):
    def __init__(self, width: int = 8, size: int = 4) -> None:
        super().__init__()
        self.rate, self.into, self.out = nn.Linear(width, width), nn.Linear(width, size), nn.Linear(width, size)
        self.decay = nn.Parameter(torch.rand(width, size))

    def forward(self, x: Tensor) -> Tensor:
        rate = torch.nn.functional.softplus(self.rate(x))
        state = x.new_zeros(x.shape[0], x.shape[2], self.decay.shape[1])
        made = []
        for t in range(x.shape[1]):
            state = state * torch.exp(-rate[:, t, :, None] * self.decay) + (
                rate[:, t, :, None] * self.into(x[:, t])[:, None] * x[:, t, :, None]
            )
            made.append((state * self.out(x[:, t])[:, None]).sum(-1))
        return torch.stack(made, 1)


@case("selective_scan")
def selective() -> Built:
    return nn.Sequential(Selective(), nn.LayerNorm(8), Selective()), positional(lambda: torch.randn(2, 6, 8))
