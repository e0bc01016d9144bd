"""Checks of every kernel on this GPU against the operator it replaces, on random inputs and with poisoned outputs.

The nets' own sizes in bfloat16 come first. Tolerances are relative to the largest value. They cover the order of sums
in float32, and the rounding of weights and outputs in narrower dtypes (the kernels' docstrings argue them). The
references compute with the same numbers in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import gtp_fx, gtp_fx_kernels  # type: ignore[import-not-found]

from bench.gpu_check import STOCK_TOLERANCE, TOLERANCE, Check, Random, check_of, error_of, name_of, poisoned, randoms
from bench.gpu_stock import log_sum_exps
from gtp_fx.ops.token_graph import coordinates

_NEIGHBORS = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes to check.

    attention: (images, heads, tokens, features per head).
    sites: (images, side in patches, channels, removed tokens).
    windows: (images, windows per side, side of a window, channels, removed tokens).
    """

    attention: tuple[tuple[int, ...], ...]
    sites: tuple[tuple[int, ...], ...]
    windows: tuple[tuple[int, ...], ...] = ()


NETS = Sizes(
    attention=((256, 6, 197, 64), (64, 12, 197, 64), (16, 16, 577, 64), (8, 12, 1370, 64)),
    sites=((256, 14, 384, 16), (64, 14, 768, 16), (16, 24, 1024, 60), (8, 37, 768, 200)),
)
OTHERS = Sizes(
    attention=(
        (8, 6, 197, 64),
        (4, 12, 256, 32),
        (2, 16, 577, 64),
        (1, 12, 1370, 64),
        (64, 3, 49, 32),
        (1, 16, 730, 80),
    ),
    sites=((8, 14, 384, 16), (2, 24, 1024, 60), (1, 37, 768, 200)),
    windows=((4, 8, 7, 96, 12), (1, 1, 64, 768, 1000)),
)
DRY = Sizes(attention=((1, 2, 37, 32), (1, 1, 280, 16)), sites=((2, 5, 24, 4),), windows=((1, 2, 4, 16, 5),))


@dataclass(frozen=True)
class Case:
    """Checks of one size in one dtype.

    kernels: kernels that they call.
    size: one of `Sizes`.
    dtype: dtype of the operands.
    made: yields the checks, from a source of random numbers.
    """

    kernels: tuple[str, ...]
    size: tuple[int, ...]
    dtype: torch.dtype
    made: Callable[[Random, torch.dtype, tuple[int, ...]], Iterator[Check]]

    def checks(self, device: torch.device) -> Iterator[Check]:
        """Yield the checks; where one raises, a failed one instead of it and those after it."""
        try:
            yield from self.made(randoms(device, self.dtype), self.dtype, self.size)
        except Exception as error:  # of one case; the others go on
            why = f"{type(error).__name__}: {str(error).strip()[:300]}"
            yield Check(" or ".join(self.kernels), str(self.size), name_of(self.dtype), float("nan"), 0.0, why)


def cases(sizes: Sizes, dtypes: Iterable[torch.dtype] = tuple(TOLERANCE)) -> Iterator[Case]:
    """Yield the cases of `sizes` in each dtype. `gtp_fx.kernels.available.load_kernels` has to be called before."""
    for dtype in dtypes:
        made: list[tuple[tuple[str, ...], Any, tuple[int, ...]]] = [
            (("attend",), _attention, size) for size in sizes.attention
        ]
        made += [(("attention_scores",), _scores, size) for size in sizes.attention]
        made += [(("token_graph",), _graph, size) for size in sizes.sites]
        made += [(("select",), _ties, size) for size in sizes.sites]
        made += [(("select", "propagate", "recover"), _site, size) for size in sizes.sites]
        made += [(("select", "recover"), _windows, size) for size in sizes.windows]
        yield from (Case(kernels, size, dtype, check) for kernels, check, size in made)


def _attention(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check `attend` with token scales and scores, with token scales only, and with a bias."""
    images, heads, tokens, head = size
    q, k, v = random(images, tokens, 3, heads, head).permute(2, 0, 3, 1, 4)
    scales = random(images, tokens - 1, whole=True).exp()
    wide = [x.float() for x in (q, k, v)]
    for name, score, bias in (
        ("", "mixed-max", None),
        (", told alone", "none", None),
        (", bias", "mixed-max", random(1, heads, tokens, tokens)),
    ):
        with poisoned():
            out, scores = gtp_fx_kernels.attend(q, k, v, bias, scales, None, score, 1, 0, [])
        scale_bias = gtp_fx.key_bias(scales, 1, 0, None if bias is None else bias.float(), wide[0])
        wanted, ranks = gtp_fx.attention_with_scores(*wide, scale_bias, None, 1.0, score, 1, 0)
        yield check_of("attend", f"{size}{name}", dtype, out, wanted)
        if score != "none":
            yield check_of("attend's scores", f"{size}{name}", torch.float32, scores, ranks)


def _scores(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check scores from an exact log-sum-exp, with and without scales, and from that of torch's own attention."""
    images, heads, tokens, head = size
    q, k, v = random(images, tokens, 3, heads, head).permute(2, 0, 3, 1, 4)
    wide = [x.float() for x in (q, k, v)]
    told = random(images, tokens - 1, whole=True).exp()
    ranks = None
    for name, scales in ((", told", told), ("", None)):
        bias = None if scales is None else gtp_fx.key_bias(scales, 1, 0, None, wide[0])
        logits = wide[0] @ wide[1].transpose(-2, -1) * head**-0.5
        lse = (logits if bias is None else logits + bias).logsumexp(-1)
        del logits
        with poisoned():
            found = gtp_fx_kernels.attention_scores(q, k, lse, None, "mixed-max", 1, 0, scales)
        _, ranks = gtp_fx.attention_with_scores(*wide, bias, None, 1.0, "mixed-max", 1, 0)
        yield check_of("attention_scores", f"{size}{name}", torch.float32, found, ranks)
    if dtype != torch.float32:
        for kind, run in log_sum_exps(q, k, v).items():
            found = gtp_fx_kernels.attention_scores(q, k, run()[1], None, "mixed-max", 1, 0, None)
            error = error_of(found, ranks)  # type: ignore[arg-type]
            yield Check("attention_scores", f"{size}, after {kind}", name_of(dtype), error, STOCK_TOLERANCE)


def _graph(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check that the neighbours are as similar as the reference's, and that the degrees fit them.

    The neighbours themselves may differ, where several are equally similar.
    """
    images, side, channels, _ = size
    cells, grid = side * side, [side, side]
    x = random(images, 1 + cells, channels)
    with poisoned():
        near, degree = gtp_fx_kernels.token_graph(x, grid, 1, "mixed", _NEIGHBORS)
    wanted, _ = gtp_fx.token_graph(x.float(), grid, 1, "mixed", _NEIGHBORS)
    ordered, itself = near.long().sort(dim=-1).values, torch.arange(cells, device=x.device)[:, None]
    wrong = (ordered[..., 1:] == ordered[..., :-1]).sum() + (ordered == itself).sum()
    wrong = wrong + ((ordered < 0) | (ordered >= cells)).sum()
    yield Check("token_graph", str(size), "int32", float(wrong), 0.0)
    if wrong:
        return
    unit = F.normalize(x[:, 1:].float(), dim=-1)
    alike, best = (_similarities(unit, which.long()).sort(dim=-1).values for which in (near, wanted))
    yield check_of("token_graph's neighbours", str(size), torch.float32, alike, best)
    here = coordinates(grid, x.device)
    beside = (here[:, None] - here[near.long()]).abs().amax(dim=-1) <= 1
    spatial = (here[:, None] - here[None]).abs().amax(dim=-1).eq(1).sum(dim=-1)
    edges = spatial + _NEIGHBORS - beside.sum(dim=-1)
    yield check_of("token_graph's degrees", str(size), torch.float32, degree, edges.float().rsqrt())


def _similarities(unit_BGC: Tensor, near_BGM: Tensor) -> Tensor:
    """Return each token's similarity to its neighbours, [B, G, M].

    It takes one neighbour at a time, since all at once would need the memory of M streams.
    """
    each = [
        (unit_BGC * unit_BGC.gather(1, near_BGM[..., place, None].expand_as(unit_BGC))).sum(-1)
        for place in range(near_BGM.shape[-1])
    ]
    return torch.stack(each, dim=-1)


def _ties(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check selection among many equal scores. There are five values, among them both zeros and NaN."""
    images, side, _, _ = size
    cells = side * side
    values = torch.tensor([float("-inf"), -0.0, 0.0, 1.0, float("nan")], device=random(1).device)
    score = values[(random(images, cells, whole=True) * 1.5 + 2).round().clamp(0, 4).long()]
    for count in sorted({1, cells // 4, cells // 2, cells - 1}):
        with poisoned():
            *chosen, _ = gtp_fx_kernels.select(score, None, count, cells)
        kept, removed = gtp_fx.select(score, count)
        yield _selected(f"{(images, cells, count)}, ties", chosen, (kept, removed, kept, removed))


def _selected(case: str, chosen: list[Tensor], wanted: tuple[Tensor, ...]) -> Check:
    """Check that a selection is exactly the wanted one."""
    wrong = sum(int((found != right).sum()) for found, right in zip(chosen, wanted, strict=True))
    return Check("select", case, "int64", float(wrong), 0.0)


def _site(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check two sites in a row. The second runs on the first one's result, with LayerScale and int32 neighbours."""
    images, side, channels, count = size
    cells, grid = side * side, [side, side]
    x, weight, bias = random(images, 1 + cells, channels), random(channels), random(channels)
    near, degree = gtp_fx.token_graph(x, grid, 1, "mixed", _NEIGHBORS)
    index = torch.arange(cells, device=x.device).expand(images, cells)
    place = scales = None
    for gain in (None, random(channels)):
        score = random(images, index.shape[1], whole=True)
        score[:, ::3] = score[:, :1]  # ties
        with poisoned():
            *chosen, place = gtp_fx_kernels.select(score, place, count, cells)
        kept, removed = gtp_fx.select(score, count)
        wanted = (kept, removed, index.gather(1, kept), index.gather(1, removed))
        yield _selected(str(size), chosen, wanted)
        branch = random(*x.shape)
        fixed: Any = (scales, weight, bias, grid, "mixed", 0.3, 1, 1e-6, True, [], gain)
        listed = near if gain is None else near.int()
        with poisoned():
            shorter, moved, normed = gtp_fx_kernels.propagate(x, branch, listed, degree, *chosen, place, *fixed)
        weights = gtp_fx.propagation_weights(near, degree, *wanted[2:], grid, "mixed")
        before = torch.ones_like(score) if scales is None else scales
        after = gtp_fx.propagate(before[..., None], weights, kept, removed, 0.3, 0)[..., 0]
        stream = x + (branch if gain is None else branch * gain)
        right = gtp_fx.propagate(stream.float(), weights, kept, removed, 0.3, 1)
        norm = F.layer_norm(shorter.float(), (channels,), weight.float(), bias.float(), 1e-6)
        yield check_of("propagate", str(size), dtype, shorter, right)
        yield check_of("propagate's scales", str(size), torch.float32, moved, after)
        yield check_of("propagate's norm", str(size), dtype, normed, norm)
        shares = gtp_fx.recovery_weights(weights, *wanted[2:], grid)
        residual = random(*x.shape)
        with poisoned():
            whole = gtp_fx_kernels.recover(shorter, shares, None, residual, kept, removed, 1, 0)
        back = gtp_fx.recover(shorter.float(), shares, kept, removed, 0, 1, 1, 0) + residual.float()
        yield check_of("recover", str(size), dtype, whole, back)
        x, index, scales = shorter, wanted[2], moved


def _windows(random: Random, dtype: torch.dtype, size: tuple[int, ...]) -> Iterator[Check]:
    """Check recovery within windows."""
    images, across, side, channels, fewer = size
    places = gtp_fx.grid_places([across * side, across * side], random(1))[0]
    places = places.reshape(across, side, across, side, 2).transpose(1, 2).reshape(across**2, side**2, 2)
    count = images * across**2
    with poisoned():
        kept, removed, *_ = gtp_fx_kernels.select(random(count, side**2, whole=True), None, fewer, side**2)
    x = random(count, side**2 - fewer, channels)
    with poisoned():
        found = gtp_fx_kernels.recover(x, None, places, None, kept, removed, 0, 0)
    wanted = gtp_fx.recover(x.float(), gtp_fx.region_shares(places, kept, removed), kept, removed, 0, 1, 0, 0)
    yield check_of("recover in windows", str(size), dtype, found, wanted)
