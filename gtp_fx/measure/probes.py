"""Kernels to time for each kind of work: those of a small vision transformer, in several sizes.

Work that the compiler fuses is timed compiled, since that is how it will run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtp_fx.kernels.available import has_kernels
from gtp_fx.measure.site_probes import propagation, scored_attention, selection, similar_tokens, stream_pass
from gtp_fx.strategies import GTP
from gtp_fx.strategies.sites import SiteShape
from gtp_fx.targets.work import Work

_WIDTH, _HEAD = 384, 64
"""Channels and head size of the probes: a small ViT's."""
CALL, SHORT_CHAIN, LONG_CHAIN, CHAIN = "a call", "one small product", "a chain of small products", 21
"""Names of the probes for the fixed cost of a compiled call and of each kernel in it; and the long chain's products."""


@dataclass(frozen=True)
class Probe:
    """A kernel to time.

    name: unique name.
    kind: kind of work, a name in KINDS; "" for a probe of fixed costs.
    amount: amount of work, by which the kind's curve is indexed.
    work: FLOPs or bytes of the kernel.
    run: runs the kernel once.
    less: names of the probes whose time is subtracted, since it isn't part of this kind's work.
    """

    name: str
    kind: str
    amount: float
    work: Work
    run: Callable[[], object]
    less: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Where:
    """What probes are made for: a device and a dtype; `random` draws the same inputs each time.

    images: in a batch; it takes many to keep a GPU busy.
    """

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def images(self) -> int:
        return 4 if self.device.type == "cpu" else 64

    @property
    def name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def kernels(self) -> bool:
        return has_kernels(self.device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)


def probes(device: torch.device, dtype: torch.dtype) -> Iterator[Probe]:
    """Yield the probes of every kind of work that `device` does, with inputs in `dtype` on it."""
    where = _Where(device, dtype)
    for of_a_kind in (_fixed_costs, _products, _convolutions, _attention, _streams, _sites, _token_graphs):
        yield from of_a_kind(where)


def _fixed_costs(where: _Where) -> Iterator[Probe]:
    """Yield probes of a call, and of the launches in it."""
    tiny = where.random(8, 8)
    yield Probe(CALL, "", 0, Work("stream"), _compiled(lambda x: x + 1, tiny[0]))
    yield Probe(SHORT_CHAIN, "", 0, Work("stream"), _compiled(lambda x: _chain(x, 1), tiny))
    yield Probe(LONG_CHAIN, "", 0, Work("stream"), _compiled(lambda x: _chain(x, CHAIN), tiny))


def _products(where: _Where) -> Iterator[Probe]:
    """Yield products in the shapes of a ViT's projections and MLP."""
    for few in (64, 256, 1024, 4096):
        for inner, columns in ((_WIDTH, 4 * _WIDTH), (4 * _WIDTH, _WIDTH), (2 * _WIDTH, 2 * _WIDTH)):
            rows = few * (where.images // 4)
            x, weight, bias = where.random(rows, inner), where.random(columns, inner), where.random(columns)
            flops = 2 * rows * inner * columns
            work = Work("product", flops, dtype=where.name)
            yield Probe(f"product {few}x{inner}x{columns}", "product", flops, work, _bound(F.linear, x, weight, bias))


def _convolutions(where: _Where) -> Iterator[Probe]:
    """Yield two convolutions of a stem, and a patch embedding."""
    for side, channels, out, kernel in ((56, 64, 64, 3), (28, 128, 256, 3), (224, 3, _WIDTH, 16)):
        x, weight = where.random(where.images, channels, side, side), where.random(out, channels, kernel, kernel)
        stride = kernel if kernel > 3 else 1
        y = F.conv2d(x, weight, stride=stride, padding=0)
        flops = 2 * y.numel() * channels * kernel * kernel
        work = Work("convolution", flops, dtype=where.name)
        run = _bound(F.conv2d, x, weight, None, stride)
        yield Probe(f"convolution {side} {channels} {out}", "convolution", flops, work, run)


def _attention(where: _Where) -> Iterator[Probe]:
    """Yield attention alone, and in some sizes with scores, whose cost is what the scores add to it."""
    for tokens in (49, 98, 197, 394, 785):
        q = where.random(where.images, 6, tokens, _HEAD)
        flops = 4 * q.numel() * tokens
        plain = f"attention {tokens}"
        work = Work("attention", flops, dtype=where.name)
        yield Probe(plain, "attention", tokens, work, _bound(F.scaled_dot_product_attention, q, q, q))
        if tokens in (49, 197, 394):
            shape = SiteShape(tokens, tokens, 0, 6 * _HEAD, 6, where.images, where.name, _HEAD, kernels=where.kernels)
            work = _of_kind("scores", GTP().site_works(shape, scales_read=False))
            scored = _compiled(*scored_attention(q))
            yield Probe(f"scores {tokens}", "scores", work.bytes, work, scored, less=(plain, CALL))


def _streams(where: _Where) -> Iterator[Probe]:
    """Yield what a block does to the residual stream: an add and a layer norm."""
    for rows in (200, 800, 6400):
        x = where.random(rows * (where.images // 4), _WIDTH)
        moved = 3 * x.numel() * where.dtype.itemsize
        run = _compiled(_norm_of_sum, x, x.clone())
        yield Probe(f"stream {rows}", "stream", moved, Work("stream", bytes=moved), run, (CALL,))


def _sites(where: _Where) -> Iterator[Probe]:
    """Yield a site's propagation and the selection of its tokens."""
    for tokens in (98, 392):
        x = where.random(where.images, tokens, _WIDTH)
        removed = tokens // 12
        # The cost model prices a site's add and norm as any block's, so they are timed without a site and subtracted.
        plain, passed = f"stream of {tokens}", 4 * x.numel() * where.dtype.itemsize
        whole = _compiled(*stream_pass(x))
        yield Probe(plain, "stream", passed, Work("stream", bytes=passed), whole, (CALL,))
        shape = SiteShape(
            tokens, tokens - removed, 0, _WIDTH, 6, where.images, where.name, _HEAD, kernels=where.kernels
        )
        work = _of_kind("gather", GTP().site_works(shape, scales_read=True))
        yield Probe(f"gather {tokens}", "gather", work.bytes, work, _compiled(*propagation(x, removed)), (plain,))
        scores = where.random(where.images, tokens).float()
        ranked = 4 * scores.numel()
        run = _compiled(*selection(scores, removed))
        yield Probe(f"sort {tokens}", "sort", ranked, Work("sort", bytes=ranked), run, (CALL,))


def _token_graphs(where: _Where) -> Iterator[Probe]:
    """Yield the token graph: one kernel where there are kernels, else a ranking of all pairs."""
    for side in (14, 24) if where.kernels else ():
        x = where.random(where.images, side * side, _WIDTH)
        works = GTP().start_works((side, side), _WIDTH, where.images, where.name, kernels=True)
        work, graph = _of_kind("neighbors", works), _compiled(*similar_tokens(x, [side, side]))
        yield Probe(f"neighbors {side}", "neighbors", work.bytes, work, graph, (CALL,))
    for tokens in () if where.kernels else (49, 196):
        pairs = where.random(where.images, tokens, tokens).float()
        ranked = 4 * pairs.numel()
        run = _compiled(_nearest, pairs)
        yield Probe(f"sort pairs {tokens}", "sort", ranked, Work("sort", bytes=ranked), run, (CALL,))


def _of_kind(kind: str, works: Sequence[Work]) -> Work:
    """Return the entry of a site's works with this kind, so that curves are fitted to the amounts they are read at."""
    return next(work for work in works if work.kind == kind)


def _nearest(similarity_BGG: Tensor) -> Tensor:
    """Return each token's 8 most similar tokens, ranked as the token graph ranks all pairs, once per stream."""
    return similarity_BGG.topk(8, dim=-1, sorted=False).indices


def _chain(x: Tensor, length: int) -> Tensor:
    """Return the result of `length` dependent products."""
    y = x
    for _ in range(length):
        y = y @ x
    return y


def _norm_of_sum(x: Tensor, y: Tensor) -> Any:
    total = x + y
    return F.layer_norm(total, total.shape[-1:]) * total


def _bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: function(*arguments)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    compiled: Any = torch.compile(function, dynamic=False)
    return lambda: compiled(*arguments)
