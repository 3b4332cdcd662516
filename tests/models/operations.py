"""Operators that are easily cut wrongly or sent wrongly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from models.registry import Built, case, positional


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layers[0](x).chunk(2, 0)
        c, d, e = torch.split(self.layers[1](b).transpose(0, 1), [2, 2, 4], 0)
        f = torch.cat([d, c, e], 0).T
        g = self.layers[2](a) + f[:, ::2].repeat(1, 2)
        h = self.layers[3](g).unfold(1, 4, 2)
        return self.layers[4](h.permute(0, 2, 1).reshape(h.shape[0], -1)[:, :8])


@case("views_across_layers", notes="chunk, split, transpose, strided slices, unfold")
def views() -> Built:
    return Views(), positional(lambda: torch.randn(4, 8))


class WriteThroughView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(4, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        left = h[:, :4]
        left.copy_(self.second(left.clone()))
        h[:, 6] = 1.5
        h[0].mul_(2)
        return self.third(h)


@case("writes_through_views")
def write_through() -> Built:
    return WriteThroughView(), positional(lambda: torch.randn(3, 8))


class WriteInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y.clamp_(min=0)
        y[:, 0] += 1
        return self.second(torch.relu_(self.first(y))).exp_()


@case("inplace_on_copies")
def write_input() -> Built:
    return WriteInput(), positional(lambda: torch.randn(3, 6))


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(30, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, keep: Tensor, small: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.where(keep[..., None], self.embed(ids), 0.0)
        h = self.body(h) + self.embed(small.long())
        return h, ids + 1, keep & (small > 3)


@case("integer_and_boolean_inputs", notes="int64, bool, uint8")
def integers() -> Built:
    return Integers(), positional(
        lambda: (
            torch.randint(0, 30, (2, 5)),
            torch.rand(2, 5) > 0.5,
            torch.randint(0, 30, (2, 5), dtype=torch.uint8),
        )
    )


class Argmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.head(torch.relu(self.body(x))).masked_fill(mask, float("-inf"))
        return scores.argmax(-1), scores.isinf(), scores


@case("argmax_with_mask", notes="integer, boolean and infinite results")
def argmax() -> Built:
    return Argmax(), positional(lambda: (torch.randn(4, 8), torch.rand(4, 5) > 0.6))


@case("bfloat16")
def bfloat16() -> Built:
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 4)
    )
    return model.bfloat16(), positional(lambda: torch.randn(4, 16, dtype=torch.bfloat16))


@case("float64")
def float64() -> Built:
    model = nn.Sequential(nn.Linear(6, 12), nn.Softplus(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 2)).double()
    return model, positional(lambda: torch.randn(3, 6, dtype=torch.float64))


@case("float16")
def float16() -> Built:
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.Linear(12, 2)).half()
    return model, positional(lambda: torch.randn(3, 6, dtype=torch.float16))


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x)[:, None].expand(-1, 4, -1)
        return h, self.second(h), torch.broadcast_to(x.sum(), (3, 2))


@case("expanded_outputs", notes="stride zero across stages and in results")
def expanded() -> Built:
    return Expanded(), positional(lambda: torch.randn(2, 6))


class NaNs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.log(self.first(x)))


@case("nan_outputs")
def nans() -> Built:
    return NaNs(), positional(lambda: torch.randn(3, 6))


@case("weight_norm")
def weight_norm() -> Built:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), parametrizations.weight_norm(nn.Linear(8, 4))
    )
    return model, positional(lambda: torch.randn(3, 6))


@case("spectral_and_orthogonal")
def spectral() -> Built:
    model = nn.Sequential(
        parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), parametrizations.orthogonal(nn.Linear(8, 8))
    )
    return model, positional(lambda: torch.randn(3, 6))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


@case("parametrized")
def parametrized() -> Built:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Softsign(), nn.Linear(6, 3)), positional(lambda: torch.randn(3, 6))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            self.register_parameter(f"w{i}", nn.Parameter(torch.randn(8, 8) / 3))
            self.register_parameter(f"b{i}", nn.Parameter(torch.randn(8) / 3))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(4):
            x = torch.relu(x @ self.get_parameter(f"w{i}") + self.get_parameter(f"b{i}"))
        return F.log_softmax(x, -1)


@case("functional_only", notes="no submodules: layers must come from ops")
def functional() -> Built:
    return Functional(), positional(lambda: torch.randn(3, 8))


class NoWeights(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (torch.sin(x) @ torch.cos(y).T).softmax(-1).cumsum(-1) + torch.linspace(0, 1, 3)


@case("no_weights")
def no_weights() -> Built:
    return NoWeights(), positional(lambda: (torch.randn(3, 8), torch.randn(3, 8)))


class Sorting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.first(x).cumsum(-1)
        values, order = h.sort(-1, descending=True)
        top, index = self.second(values).topk(3)
        return {"top": top, "index": index, "order": order, "gathered": x.gather(-1, order), "rank": order.argsort(-1)}


@case("cumsum_sort_topk", notes="ops with two results, one of them integer")
def sorting() -> Built:
    return Sorting(), positional(lambda: torch.randn(3, 8))


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.first(x)
        var, mean = torch.var_mean(h, -1, keepdim=True)
        low, high = torch.aminmax(h, dim=-1, keepdim=True)
        h = self.second((h - mean) / (var + 1e-5).sqrt() + (h - low) / (high - low))
        return h.median(-1).values, h.max(0).indices, h.norm(dim=-1), h.logsumexp(-1), h.quantile(0.3)


@case("statistics")
def statistics() -> Built:
    return Statistics(), positional(lambda: torch.randn(4, 8))


class Masks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            keep = torch.arange(x.shape[1])[None, :] < (lengths[:, None] - i)
            x = torch.where(keep[..., None], layer(x), x)
            x = x + torch.ones(x.shape[1], dtype=x.dtype).tril_(0) if x.dim() == 1 else x + torch.eye(6)[:5]
        return x


@case("arange_masks", notes="input-free nodes in every layer, one mask depends on an input")
def masks() -> Built:
    return Masks(), positional(lambda: (torch.randn(3, 5, 6), torch.randint(1, 6, (3,))))


class NoGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.body = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.frozen(x))
        return self.body(h.detach())


@case("no_grad_inside")
def no_grad() -> Built:
    return nn.Sequential(NoGrad(), nn.ReLU(), NoGrad()), positional(lambda: torch.randn(3, 6))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.second(torch.relu(h))
        return self.third(h.float())


@case("autocast_inside")
def autocast() -> Built:
    return Autocast(), positional(lambda: torch.randn(3, 16))


class Fourier(nn.Module):
    def __init__(self, width: int = 4, modes: int = 5) -> None:
        super().__init__()
        self.lift, self.project = nn.Linear(1, width), nn.Linear(width, 1)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(width, width, modes, dtype=torch.cfloat) / width) for _ in range(3)
        )
        self.skips = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x).transpose(1, 2)
        for weight, skip in zip(self.weights, self.skips, strict=True):
            spectrum = torch.fft.rfft(h)
            kept = torch.einsum("bim,iom->bom", spectrum[..., : weight.shape[-1]], weight)
            full = torch.zeros_like(spectrum)
            full[..., : weight.shape[-1]] = kept
            h = F.gelu(torch.fft.irfft(full, n=h.shape[-1]) + skip(h))
        return self.project(h.transpose(1, 2))


@case("complex_fft", notes="complex weights and values, a slice written")
def fourier() -> Built:
    return Fourier(), positional(lambda: torch.randn(2, 16, 1))


class ComplexOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.complex(self.first(x), self.second(x))
        return z.conj() * z, torch.fft.fft(z).imag


@case("complex_outputs", notes="conj() and .imag are lazy views")
def complex_out() -> Built:
    return ComplexOut(), positional(lambda: torch.randn(2, 8))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(30, 8, mode="mean")
        self.weighted = nn.EmbeddingBag(30, 8, mode="sum", padding_idx=0)
        self.head = nn.Linear(16, 3)

    def forward(self, ids: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
        return self.head(torch.cat([self.bag(ids, offsets), self.weighted(ids, offsets, weights)], -1))


@case("embedding_bag")
def bag() -> Built:
    return Bag(), positional(lambda: (torch.randint(0, 30, (9,)), torch.tensor([0, 4, 6]), torch.rand(9)))


class Conditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.small, self.large, self.out = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.into(x)
        h = torch.cond(h.sum() > 0, lambda t: self.small(t).relu(), lambda t: self.large(t).sin(), (h,))
        return self.out(h)


@case("cond", notes="torch.cond: branches are graphs of their own")
def conditional() -> Built:
    return Conditional(), positional(lambda: torch.randn(3, 6), 6)


class Scatter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.register_buffer("degree", torch.tensor([1.0, 2.0, 1.0, 2.0]))

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in self.layers:
            messages = layer(nodes)[edges[0]]
            gathered = torch.zeros_like(nodes).index_add_(0, edges[1], messages)
            nodes = torch.relu(gathered / self.degree[:, None])
        return nodes


@case("graph_network", notes="index, index_add_ into a fresh tensor")
def graph_network() -> Built:
    return Scatter(), positional(lambda: (torch.randn(4, 6), torch.randint(0, 4, (2, 6))))


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.plain = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x) * self.plain + torch.tensor([0.1, 0.2, 0.3, 0.4 * i]) + torch.full((4,), 2.0)
        return x


@case("constants", notes="a tensor attribute that is no buffer, literals in forward")
def constants() -> Built:
    return Constants(), positional(lambda: torch.randn(2, 4))


class Scalars(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, int, float, str]:
        return self.second(torch.relu(self.first(x))), x.shape[0], 0.5, "label"


@case("python_results", notes="an int, a float and a str among the results")
def scalars() -> Built:
    return Scalars(), positional(lambda: torch.randn(2, 4))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.alpha = nn.AlphaDropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha(self.body(x)) + F.dropout(x, 0.5, self.training)


@case("dropout_in_eval")
def checkpointed() -> Built:
    return nn.Sequential(Checkpointed(), Checkpointed()), positional(lambda: torch.randn(2, 4))


class LinearAlgebra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        spd = a @ a.mT + torch.eye(5)
        half = torch.linalg.cholesky(spd)
        return self.second(torch.linalg.solve_triangular(half, a, upper=False)) + torch.linalg.inv(spd)


@case("linear_algebra")
def linear_algebra() -> Built:
    return LinearAlgebra(), positional(lambda: torch.randn(2, 5, 5))


class ZeroSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return self.second(torch.cat([h, empty])), h[:0]


@case("empty_tensors", notes="an input and a result without elements; a result of zero dimensions elsewhere")
def zero_size() -> Built:
    return ZeroSize(), positional(lambda: (torch.randn(2, 4), torch.empty(0, 4)))


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = tuple(layer(part) for layer, part in zip(self.layers, x.unbind(0), strict=True))
        return *parts, torch.stack(parts).flip(0)


@case("independent_branches", notes="no path between the layers")
def split() -> Built:
    return Split(), positional(lambda: torch.randn(4, 2, 6))


@case("quantised_look", notes="fake quantisation: round and clamp")
def quantised() -> Built:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("scale", torch.tensor(0.05))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((x / self.scale).round().clamp(-128, 127).to(torch.int8).to(x.dtype) * self.scale)

    return nn.Sequential(Fake(), nn.ReLU6(), Fake(), nn.Hardtanh(), Fake()), positional(lambda: torch.randn(2, 6))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.inner, self.out = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        def positive(t: Tensor) -> Tensor:
            return torch.cond(t.max() > 1, lambda u: self.inner(u), lambda u: u - 1, (t,))

        h = self.into(x)
        return self.out(torch.cond(h.sum() > 0, positive, lambda t: t.cos(), (h,)))


@case("nested_cond", notes="a graph within a graph, both of the same name")
def nested_cond() -> Built:
    return Nested(), positional(lambda: torch.randn(2, 4), 8)


class AutocastInAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = self.first(x)
            with torch.autocast("cpu", enabled=False):
                high = self.second(low.float())
            low = self.third(low)
        return high, low


@case("autocast_in_autocast", notes="regions within a region, each a graph of its own")
def nested_autocast() -> Built:
    return AutocastInAutocast(), positional(lambda: torch.randn(2, 8))


class Conjugate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, dtype=torch.cfloat), nn.Linear(4, 4, dtype=torch.cfloat)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.first(x).conj()
        z = self.second(y)
        return z.mH, y.imag, (-z).conj()


@case("conjugate_views", notes="lazy conjugation crosses stages; operators whose names begin with an underscore")
def conjugate() -> Built:
    return Conjugate(), positional(lambda: torch.randn(3, 4, dtype=torch.cfloat))


class Numbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, list[float], torch.Size]:
        y = self.first(x)
        return self.second(y * y.max().item()), y[0, :3].tolist(), y.shape


@case("numbers_out_of_tensors", notes="item() crosses stages, tolist() and a torch.Size in the result")
def numbers() -> Built:
    return Numbers(), positional(lambda: torch.randn(2, 8))


class Kept(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.first(x)
        mask = torch.ones(h.shape)
        early = h * mask
        mask[:, :3] = 0
        chosen = mask.gather(1, h.argsort(1))
        scale = torch.zeros(6)
        scale[::2] = 2
        return self.second(early * chosen), chosen, scale


@case("constants_written_before_use", notes="a mask filled in place, read before and after, and one returned as it is")
def kept() -> Built:
    return Kept(), positional(lambda: torch.randn(4, 6))


@case("vmap", refused="a batched tensor has no memory of its own to look at")
def vmapped() -> Built:
    class Vmap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.vmap(self.layer)(x)

    return Vmap(), positional(lambda: torch.randn(3, 2, 4))


@case("result_of_unknown_size", refused="nonzero() gives as many rows as the values say")
def unknown_size() -> Built:
    class Found(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nonzero(self.layer(x) > 0)

    return Found(), positional(lambda: torch.randn(3, 4))


@case("sparse_buffer", refused="a sparse matrix has no strides")
def sparse() -> Built:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("matrix", torch.eye(4).to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.matrix, x)

    return Graph(), positional(lambda: torch.randn(4, 3))
