"""Every kernel against the operator it stands for, in Triton's interpreter where there is no GPU.

Tolerances are the kernels' own, argued in their docstrings. Outputs' memory is filled with NaN before a kernel runs, so
that what it doesn't write shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from gtp_fx.kernels import token_graph, tuned
from gtp_fx.kernels.available import load_kernels
from gtp_fx.kernels.tiles import ROW_FITS, AttentionTile, GraphTile, attention_tiles
from gtp_fx.measure import site_probes, tune_kernels
from gtp_fx.measure.timing import Run, Timings
from gtp_fx.ops.attention import SCORES

from support.checkout import ROOT
from support.compiled_kernels import CAPABILITIES, Compiled
from support.zoo import in_tiers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
load_kernels()
kernels, ops = torch.ops.gtp_fx_kernels, torch.ops.gtp_fx
B, H = 2, 3
WITHIN = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of the largest value: the order of sums, or the rounding of weights and outputs."""
FITS, TILED = [16, 32, 4, 1], [16, 16, 4, 1]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `empty` makes
    yield
    torch.use_deterministic_algorithms(deterministic)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    assert found.shape == wanted.shape
    apart = (found.float() - wanted.float()).abs().max()
    assert apart <= WITHIN[dtype] * wanted.float().abs().max(), apart  # False for NaN


def operands(tokens: int, head: int, values: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k [B, H, N, D], v [B, H, N, E] as models make them: views of one projection's output."""
    whole = random(B, tokens, H * (2 * head + values), dtype=dtype, seed=tokens)
    parts = whole.split([H * head, H * head, H * values], dim=-1)
    return [part.unflatten(-1, (H, -1)).transpose(1, 2) for part in parts]


def dense_map(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    logits = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None and bias.dtype == torch.bool:
        return logits.masked_fill(~bias, float("-inf")).softmax(-1)
    return (logits if bias is None else logits + bias.float()).softmax(-1)


@pytest.mark.parametrize("tile", in_tiers([FITS, TILED], TILED), ids=["row-fits", "tiled"])
@pytest.mark.parametrize("score", [*SCORES, "none"])
def test_attention_ranks_as_the_operator_does(score: str, tile: list[int]) -> None:
    """Of 21 tokens, one before and two behind the patches, under token scales and a bias a head."""
    q, k, v = operands(21, 16, 24, torch.float32)
    scales, bias = random(B, 18, seed=1).exp(), random(1, H, 21, 21, seed=2)
    out, scores = kernels.attend(q, k, v, bias, scales, None, score, 1, 2, tile)
    told = ops.key_bias(scales, 1, 2, bias, q)
    wanted, ranks = ops.attention_with_scores(q, k, v, told, None, 1.0, score, 1, 2)
    close(out, wanted)
    if score == "none":
        assert scores.shape == (B, 0)
    else:
        close(scores, ranks)
        assert torch.equal(scores.argsort(dim=1), ranks.argsort(dim=1))


@pytest.mark.parametrize("tile", [FITS, TILED], ids=["row-fits", "tiled"])
@pytest.mark.parametrize("dtype", list(WITHIN), ids=str)
def test_attention_in_every_dtype(dtype: torch.dtype, tile: list[int]) -> None:
    q, k, v = operands(20, 48, 32, dtype)
    out, scores = kernels.attend(q, k, v, None, None, 0.3, "mixed-max", 1, 0, tile)
    wanted, ranks = ops.attention_with_scores(q.float(), k.float(), v.float(), None, 0.3, 1.0, "mixed-max", 1, 0)
    assert out.dtype == dtype
    close(out, wanted, dtype)
    close(scores, ranks)


@pytest.mark.parametrize("tile", [FITS, TILED], ids=["row-fits", "tiled"])
def test_attention_of_fewer_queries_and_of_a_row_that_sees_nothing(tile: list[int]) -> None:
    """Dead tokens ask nothing; a query whose keys are all masked gets zeros, as from torch's attention."""
    q, k, v = operands(18, 16, 16, torch.float32)
    q, scales = q[:, :, :3], random(B, 17, seed=1).exp()
    mask = torch.ones(B, 1, 3, 18, dtype=torch.bool, device=DEVICE)
    mask[0, :, 1] = False
    out, _ = kernels.attend(q, k, v, mask, scales, None, "none", 1, 0, tile)
    wanted = dense_map(q, k, torch.where(mask, ops.key_bias(scales, 1, 0, None, q), float("-inf"))) @ v
    close(out, wanted.nan_to_num(0.0))


@pytest.mark.filterwarnings("ignore:overflow")  # a hidden key beside one that is seen
@pytest.mark.parametrize("tile", [FITS, TILED], ids=["row-fits", "tiled"])
@pytest.mark.parametrize("dtype", in_tiers([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
@pytest.mark.parametrize("told", [False, True], ids=["", "told"])
def test_a_row_that_a_mask_hides_by_the_least_number_is_a_mean(told: bool, dtype: torch.dtype, tile: list[int]) -> None:
    """All keys of such a row are equal, in the operator and in torch's attention: no logit shows beside the mask.

    Other rows see some keys.
    """
    q, k, v = operands(21, 16, 24, dtype)
    mask = torch.zeros(B, 1, 21, 21, dtype=dtype, device=DEVICE)
    mask[:, :, 4:7, :17] = mask[0, :, 9] = torch.finfo(dtype).min
    scales = random(B, 20, seed=1).exp() if told else None
    out, scores = kernels.attend(q, k, v, mask, scales, None, "mixed-mean", 1, 0, tile)
    single = (q.float(), k.float(), v.float())
    bias = ops.key_bias(scales, 1, 0, mask.float(), single[0]) if told else mask.float()
    wanted, ranks = ops.attention_with_scores(*single, bias, None, 1.0, "mixed-mean", 1, 0)
    close(out, wanted, dtype)
    close(scores, ranks)
    close(out[0, :, 9], v[0].float().mean(dim=1), dtype)
    if not told:
        close(out, F.scaled_dot_product_attention(q, k, v, mask), dtype)


@pytest.mark.parametrize(("tokens", "plain"), [(17, True), (48, True), (17, False), (32, False)])
@pytest.mark.parametrize("dtype", in_tiers([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_the_last_tile_of_keys_may_be_whole_or_of_one(dtype: torch.dtype, tokens: int, plain: bool) -> None:
    """Tiles of 16 keys; zeros of either sign; tokens that tie. Not plain: some queries don't see one tile, one query
    sees no key, and there are scales."""
    q, k, v = (x.contiguous() for x in operands(tokens, 16, 24, dtype))
    q[:, :, 3], k[:, :, 5] = -0.0, -0.0
    for x in (q, k):
        x[:, :, 9] = x[:, :, 12]
    seen = torch.ones(B, 1, tokens, tokens, dtype=torch.bool, device=DEVICE)
    scales = torch.ones(B, tokens - 1, device=DEVICE)
    if not plain:
        seen[:, :, 4:8, :16] = seen[:, :, 14] = False
        scales = random(B, tokens - 1, seed=1).exp()
        scales[:, 8] = scales[:, 11]
    given = (None, None) if plain else (seen, scales)
    out, scores = kernels.attend(q, k, v, *given, None, "broadcast-max", 1, 0, TILED)
    told = ops.key_bias(scales, 1, 0, None, scales)
    whole = dense_map(q, k, torch.where(seen, told, float("-inf"))).nan_to_num(0.0)
    assert (out.float() - whole @ v.float()).abs().max() <= WITHIN[dtype] * v.float().abs().max()
    close(scores, whole.sum(dim=2).amax(dim=1)[:, 1:])
    assert torch.equal(scores[:, 8], scores[:, 11])


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(
    ("dtype", "tile"), [*((dtype, tile) for dtype in WITHIN for tile in (FITS, TILED)), (torch.bfloat16, [])], ids=str
)
def test_attention_is_told_scales_however_far_apart(dtype: torch.dtype, tile: list[int]) -> None:
    """Scales from 2^-80 to 2^80, on logits that compensate them, and scale 0 on by far the largest logit.

    No exponential may be multiplied by its scale before all have one size, and nothing of the scale of 0 may remain.
    Logits up to 64 are rounded to 2^-19, and few roundings add up.
    """
    tokens = 21 if tile else 130
    q, k, v = (x.contiguous() for x in operands(tokens, 16, 16, dtype))
    scales = 2.0 ** (torch.arange(tokens - 3, device=DEVICE).remainder(5) - 2.0).mul(40).expand(B, -1).contiguous()
    q[..., 0], k[..., 0], k[:, :, 1:-2, 0] = 4.0, 0.0, -scales.log().round()[:, None].to(dtype)
    scales[:, 7], k[:, :, 8, 0] = 0.0, 256.0
    out, scores = kernels.attend(q, k, v, None, scales, None, "mixed-mean", 1, 2, tile)
    single = (q.float(), k.float(), v.float())
    told = ops.key_bias(scales, 1, 2, None, scales)
    wanted, ranks = ops.attention_with_scores(*single, told, None, 1.0, "mixed-mean", 1, 2)
    rounding = 2**-15
    assert (out.float() - wanted).abs().max() <= max(WITHIN[dtype], rounding) * wanted.abs().max()
    assert (scores - ranks).abs().max() <= 2 * rounding * ranks.max()
    assert (scores[:, 7] == 0).all()


def test_attention_to_a_single_key_is_its_value() -> None:
    q, k, v = operands(18, 16, 24, torch.bfloat16)
    for tile in (FITS, []):
        out, _ = kernels.attend(q, k[:, :, :1], v[:, :, :1], None, None, None, "none", 1, 0, tile)
        assert torch.equal(out, v[:, :, :1].expand_as(out))


def test_attention_has_the_gradients_of_the_operator() -> None:
    q, k, v = (x.detach().requires_grad_() for x in operands(18, 16, 16, torch.float32))
    scales = random(B, 17, seed=1).exp().requires_grad_()
    bias = random(1, H, 18, 18, seed=2).requires_grad_()
    inputs = [q, k, v, scales, bias]
    out, _ = kernels.attend(q, k, v, bias, scales, None, "mixed-max", 1, 0, FITS)
    told = ops.key_bias(scales, 1, 0, bias, q)
    wanted, _ = ops.attention_with_scores(q, k, v, told, None, 1.0, "mixed-max", 1, 0)
    upstream = random(*out.shape, seed=3)
    pairs = zip(torch.autograd.grad(out, inputs, upstream), torch.autograd.grad(wanted, inputs, upstream), strict=True)
    for found, expected in pairs:
        close(found, expected)


@pytest.mark.parametrize("score", in_tiers(SCORES, *(score for score in SCORES if score.endswith("max"))))
def test_scores_of_a_log_sum_exp_are_the_operators(score: str) -> None:
    """40 tokens, one before and two after the patches, with and without scales: over a tile of keys and of queries."""
    q, k, v = operands(40, 24, 16, torch.float32)
    scales = random(B, 37, seed=1).exp()
    for told in (None, scales):
        bias = None if told is None else ops.key_bias(told, 1, 2, None, q)
        logits = 0.3 * q @ k.transpose(-2, -1) + (0.0 if bias is None else bias)
        found = kernels.attention_scores(q, k, logits.logsumexp(-1), 0.3, score, 1, 2, told)
        _, wanted = ops.attention_with_scores(q, k, v, bias, 0.3, 1.0, score, 1, 2)
        close(found, wanted)
        assert torch.equal(found.argsort(dim=1), wanted.argsort(dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scores_in_half_precision_are_those_of_the_same_operands_in_float32(dtype: torch.dtype) -> None:
    """With a log-sum-exp by token first, as torch's attention on a CPU leaves it; and it has no gradient."""
    q, k, v = (x.detach().requires_grad_() for x in operands(70, 16, 16, dtype))
    lse = (q.float() @ k.float().transpose(-2, -1) / 4).logsumexp(-1).transpose(1, 2).contiguous().transpose(1, 2)
    found = kernels.attention_scores(q, k, lse, None, "mixed-max", 1, 0, None)
    _, wanted = ops.attention_with_scores(q.float(), k.float(), v.float(), None, None, 1.0, "mixed-max", 1, 0)
    close(found, wanted)
    assert torch.autograd.grad(found.sum(), [q, k, lse], allow_unused=True) == (None, None, None)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's stock attention is bench.gpu's to check")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["mask", "channel"])
def test_stock_attention_told_scales_ranks_as_the_operator_does(form: str, dtype: torch.dtype) -> None:
    """Rounding of log s, at most 3 here, in bfloat16: to 2^-9 in a mask and to 2^-16 in two channels. An entry is as
    far off, and a product of two entries twice as far."""
    q, k, v = operands(40, 16, 16, dtype)
    scales = random(B, 39, seed=1).clamp(-3, 3).exp()
    if form == "mask":
        out, lse = ops.attention_with_lse(q, k, v, ops.key_bias(scales, 1, 0, None, q), 0.25, "cpu")
    else:
        wide = F.pad(v, (0, 8))
        out, lse = ops.attention_with_lse(*ops.scale_channels(q, k, scales, 1, 0, 0.25), wide, None, 0.25, "cpu")
    found = kernels.attention_scores(q, k, lse, 0.25, "mixed-max", 1, 0, scales)
    told = ops.key_bias(scales, 1, 0, None, scales)
    single = (q.float(), k.float(), v.float())
    wanted, ranks = ops.attention_with_scores(*single, told, None, 1.0, "mixed-max", 1, 0)
    close(out[..., :16], wanted, dtype)
    rounding = {torch.float32: 2**-20, torch.bfloat16: 2**-9 if form == "mask" else 2**-16}[dtype]
    assert ((found - ranks).abs() / ranks).max() < 2 * 3 * rounding


SCORES_THAT_TIE = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.5, 1.5, 1e-40, -2.0]


@pytest.mark.parametrize("propagated", [0, 1, 7, 20])
def test_select_takes_the_same_tokens_whatever_the_scores(propagated: int) -> None:
    score = random(B, 2, 23)[:, 1]
    score[0] = torch.tensor(SCORES_THAT_TIE, device=DEVICE).repeat(3)[:23]
    score[1, ::2] = score[1, 0]
    kept, removed, *_ = kernels.select(score, None, propagated, 23)
    for found, wanted in zip((kept, removed), ops.select(score, propagated), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("grid", "kind", "prefix", "suffix"),
    [((5, 6), "mixed", 1, 0), ((5, 6), "spatial", 1, 2), ((29,), "semantic", 0, 0), ((2, 3, 4), "mixed", 2, 1)],
)
@pytest.mark.parametrize("dtype", in_tiers([torch.float32, torch.bfloat16], torch.bfloat16), ids=str)
def test_sites_in_a_row(grid: tuple[int, ...], kind: str, prefix: int, suffix: int, dtype: torch.dtype) -> None:
    """Three sites, each on the output of the one before: selection with cells, propagation, scales, norm, recovery."""
    side, cells, channels = list(grid), torch.Size(grid).numel(), 20
    near, degree = ops.token_graph(random(B, prefix + cells + suffix, channels), side, prefix, kind, 4)
    x = random(B, prefix + cells + suffix, channels, dtype=dtype)
    weight, bias = random(channels, seed=5, dtype=dtype), random(channels, seed=6, dtype=dtype)
    index = place = scales = None
    for site, propagated in enumerate((6, 9, 1)):
        left = cells if index is None else index.shape[1]
        score = random(B, left, seed=site)
        found = kernels.select(score, place, propagated, cells)
        kept, removed = ops.select(score, propagated)
        on_grid = [part if index is None else index.gather(1, part) for part in (kept, removed)]
        for one, other in zip(found[:4], (kept, removed, *on_grid), strict=True):
            assert torch.equal(one, other)
        *indices, place = found
        norm = (weight, bias) if site else (None, None)
        told = (near, degree, *indices, place, scales, *norm, side, kind, 0.3, prefix, 1e-6, True, [])
        shorter, moved, normed = kernels.propagate(x, None, *told)
        weights = ops.propagation_weights(near, degree, *on_grid, side, kind)
        wanted = ops.propagate(x.float(), weights, kept, removed, 0.3, prefix)
        before = torch.ones(B, left, device=DEVICE) if scales is None else scales
        close(shorter, wanted, dtype)
        close(moved, ops.propagate(before[..., None], weights, kept, removed, 0.3, 0)[..., 0])
        close(
            normed,
            F.layer_norm(shorter.float(), (channels,), *(n if n is None else n.float() for n in norm), 1e-6),
            dtype,
        )
        assert not torch.equal(shorter.float(), ops.propagate(x.float(), weights, kept, removed, 0.0, prefix))
        shares = ops.recovery_weights(weights, *on_grid, side)
        residual = random(*x.shape, seed=9, dtype=dtype)
        whole = kernels.recover(shorter, shares, None, residual, kept, removed, prefix, suffix)
        back = ops.recover(shorter.float(), shares, kept, removed, 0, 1, prefix, suffix)
        close(whole, back + residual.float(), dtype)
        x, index, scales = shorter, on_grid[0], moved


def test_propagation_without_norm_or_scales_leaves_theirs_out() -> None:
    near, degree = ops.token_graph(random(B, 12, 16), [4, 3], 0, "spatial", 1)
    chosen = kernels.select(random(B, 12), None, 5, 12)
    told = (None, None, None, [4, 3], "spatial", 0.3, 0, -1.0, False, [])
    shorter, moved, normed = kernels.propagate(random(B, 12, 16), None, near, degree, *chosen, *told)
    assert (shorter.shape, moved.numel(), normed.numel()) == ((B, 7, 16), 0, 0)


@pytest.mark.parametrize("dtype", in_tiers(WITHIN, torch.float16), ids=str)
def test_propagation_adds_the_residual_as_the_operators_do(dtype: torch.dtype) -> None:
    """The same bits as of a stream that was added before, in any tile and with LayerScale; not in float32 scaled."""
    x, residual = random(B, 13, 20, dtype=dtype), random(B, 20, 13, seed=1, dtype=dtype).transpose(1, 2)
    gain, weight = (random(20, seed=seed, dtype=dtype) for seed in (2, 3))
    near, degree = ops.token_graph(x, [3, 4], 1, "mixed", 3)
    chosen = kernels.select(random(B, 12), None, 5, 12)
    told = (near, degree, *chosen, None, weight, None, [3, 4], "mixed", 0.3, 1, 1e-6, True)
    added, scaled = (kernels.propagate(stream, None, *told, [8, 4]) for stream in (x + residual, x + residual * gain))
    assert not torch.equal(added[0], scaled[0])
    truncates = DEVICE == "cpu" and dtype == torch.bfloat16  # Triton's interpreter rounds to bfloat16 towards 0
    for tile in ([1, 1], [16, 1]):
        pairs = zip(kernels.propagate(x, residual, *told, tile), added, strict=True)
        for found, wanted in pairs:
            assert torch.equal(found, wanted) or truncates
            close(found, wanted, dtype)
    for found, wanted in zip(kernels.propagate(x, residual, *told, [16, 1], gain), scaled, strict=True):
        assert torch.equal(found, wanted) or truncates or dtype == torch.float32
        close(found, wanted, dtype)


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows, columns and channels in a grid of twenty cells."""
    monkeypatch.setattr(token_graph, "graph_tile", lambda *sizes: GraphTile(16, 16, 16, 4, 2))


def same_neighbors(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.int32 and torch.equal(found.long().sort(dim=-1).values, wanted.sort(dim=-1).values)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize(
    ("grid", "prefix", "suffix", "channels", "neighbors", "kind", "dtype"),
    [
        ([4, 5], 1, 2, 20, 3, "mixed", torch.float32),
        ([6, 6], 0, 1, 32, 8, "mixed", torch.bfloat16),
        ([3, 2, 4], 2, 0, 40, 16, "mixed", torch.float16),
        ([19], 1, 0, 16, 1, "semantic", torch.bfloat16),
    ],
    ids=str,
)
def test_the_token_graph_is_the_operators(
    grid: list[int], prefix: int, suffix: int, channels: int, neighbors: int, kind: str, dtype: torch.dtype
) -> None:
    """Of random tokens, whose similarities are far apart beside what the order of sums changes."""
    tokens = prefix + torch.Size(grid).numel() + suffix
    x = random(tokens, B, channels, dtype=dtype).transpose(0, 1) * random(B, tokens, 1, seed=1, dtype=dtype).exp()
    near, degree = kernels.token_graph(x, grid, prefix, kind, neighbors)
    wanted, degrees = ops.token_graph(x.float(), grid, prefix, kind, neighbors)
    same_neighbors(near, wanted)
    close(degree, degrees)


def test_the_token_graph_with_the_tiles_that_it_chooses() -> None:
    x = random(B, 81, 72).requires_grad_()
    near, degree = kernels.token_graph(x, [8, 10], 1, "mixed", 4)
    wanted, degrees = ops.token_graph(x, [8, 10], 1, "mixed", 4)
    same_neighbors(near, wanted)
    close(degree, degrees)
    assert not degree.requires_grad


@pytest.mark.usefixtures("_small_tiles")
def test_of_equally_similar_tokens_the_first_are_neighbors() -> None:
    """Similarities of 1, 0 and -1 without rounding: each token is zero, or plus or minus one of four directions, of
    some length."""
    kinds = torch.randint(9, (B, 36), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    length = 2.0 ** (torch.arange(36, device=DEVICE) % 3)
    directions = torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(1, 4)]).to(DEVICE)
    x = torch.cat([directions[kinds] * length[:, None], torch.zeros(B, 36, 12, device=DEVICE)], dim=-1)
    near, _ = kernels.token_graph(x, [6, 6], 0, "mixed", 8)
    similar = (directions[kinds] @ directions[kinds].transpose(1, 2)).masked_fill(torch.eye(36).bool().to(DEVICE), -2.0)
    same_neighbors(near, similar.sort(dim=-1, descending=True, stable=True).indices[..., :8])


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero)")
def test_tokens_that_are_no_numbers_have_neighbors_on_the_grid() -> None:
    """NaN is the most similar, as in topk; a row of nothing else, or of -inf, still names other cells, each once."""
    x = random(3, 20, 16)
    x[0, 2, 3], x[0, 17, 5], x[1] = float("nan"), float("inf"), float("nan")
    x[2, 0], x[2, 1:] = 1e30, -1e10
    near, degree = kernels.token_graph(x, [4, 5], 0, "mixed", 3)
    assert ((near >= 0) & (near < 20) & (near != torch.arange(20, device=DEVICE)[:, None])).all()
    assert (near.sort(dim=-1).values.diff(dim=-1) > 0).all() and degree.isfinite().all()
    numbers = [cell for cell in range(20) if cell not in (2, 17)]
    wanted, degrees = ops.token_graph(x, [4, 5], 0, "mixed", 3)
    same_neighbors(near[0, numbers], wanted[0, numbers])
    close(degree[0, numbers], degrees[0, numbers])


def rolled_windows() -> Tensor:
    """[4, 16, 2]: places of 4 x 4 windows on an 8 x 8 map rolled by two, so that some have both ends of it."""
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).roll((-2, -2), (0, 1))
    return places.reshape(2, 4, 2, 4, 2).transpose(1, 2).reshape(4, 16, 2).to(DEVICE)


@pytest.mark.parametrize("removed", in_tiers([3, 12, 15], 12))
def test_recovery_within_windows(removed: int) -> None:
    """Shares from coordinates, in the kernel; where most have left, from the nearest that stayed."""
    places, x = rolled_windows(), random(3 * 4, 16 - removed, 24)
    kept, left, *_ = kernels.select(random(3 * 4, 16), None, removed, 16)
    shares = ops.region_shares(places, kept, left)
    wanted = ops.recover(x, shares, kept, left, 0, 1, 0, 0)
    close(kernels.recover(x, None, places, None, kept, left, 0, 0), wanted)


def test_propagation_and_recovery_have_the_gradients_of_the_operators() -> None:
    x, weight, gain = (value.requires_grad_() for value in (random(B, 31, 20), random(20, seed=1), random(20, seed=7)))
    branch = random(B, 31, 20, seed=5).requires_grad_()
    scales = random(B, 30, seed=2).exp().requires_grad_()
    near, degree = ops.token_graph(x.detach(), [5, 6], 1, "mixed", 3)
    kept, removed, *rest = kernels.select(random(B, 30), None, 8, 30)
    weights = ops.propagation_weights(near, degree, kept, removed, [5, 6], "mixed")
    shares = ops.recovery_weights(weights, kept, removed, [5, 6])
    told = (kept, removed, *rest, scales, weight, None, [5, 6], "mixed", 0.3, 1, 1e-6, True, [], gain)
    _, moved, normed = kernels.propagate(x, branch, near, degree, *told)
    found = kernels.recover(normed, shares, None, x, kept, removed, 1, 0)
    wanted = ops.propagate(x + branch * gain, weights, kept, removed, 0.3, 1)
    wanted = ops.recover(F.layer_norm(wanted, (20,), weight, None, 1e-6), shares, kept, removed, 0, 1, 1, 0) + x
    scaled = ops.propagate(scales[..., None], weights, kept, removed, 0.3, 0)[..., 0]
    inputs = [x, branch, gain, weight, scales]
    upstream = [random(*found.shape, seed=3), random(*moved.shape, seed=4)]
    mine = torch.autograd.grad([found, moved], inputs, upstream)
    for one, other in zip(mine, torch.autograd.grad([wanted, scaled], inputs, upstream), strict=True):
        close(one, other)


@pytest.mark.parametrize("keys", [16, 49, 197, 256, 577, 4096])
def test_tiles_hold_a_row_where_it_fits(keys: int) -> None:
    for head in (32, 64, 80, 128):
        for dtype in WITHIN:
            tiles = attention_tiles(keys, head, dtype)
            assert all(AttentionTile(*tile.arguments) == tile for tile in tiles)
            if dtype != torch.float32 and head <= 64:
                assert (tiles[0].columns >= keys) == (keys <= ROW_FITS)


RESIDENT = {
    # A tile of 4 warps fits a multiprocessor three times with at most 168 registers, else twice. Hopper's products read
    # shared memory.
    "attend 127-scored": (2, 2, 2),
    "attend 127-told": (2, 2, 3),
    "attend 127-both": (2, 2, 2),
    "attend 197-scored": (2, 2, 3),
    "attend 197-told": (2, 2, 3),
    "attend 197-both": (2, 2, 3),
    "attend 577-scored": (2, 2, 3),
    "attend 577-told": (2, 2, 3),
    "attend 577-both": (2, 2, 3),
    # Sums stay with the thread that made their entries: 4 warps, at most 168 registers, and at most 128 on Hopper.
    # Scales take some more.
    "scores 197-scored": (3, 3, 4),
    "scores 197-both": (2, 2, 4),
    "scores 577-scored": (3, 3, 4),
    "scores 577-both": (2, 2, 4),
    "scores 197": (2, 2, 4),
    "scores 577": (3, 3, 4),
    "scores 1370": (3, 3, 4),
    # 4 warps, and 8 where cells are many; Hopper's products leave registers free. Ada's 100 KiB hold two blocks of 32.
    "token_graph 14-384": (3, 2, 3),
    "token_graph 24-1024": (1, 1, 2),
    "token_graph 37-768": (1, 1, 2),
    # An image is a program: 256 of them on 108 multiprocessors and more are at most three on each.
    "select 196-whole": (3, 3, 3),
    "select 196": (3, 3, 3),
    "select 576": (3, 3, 3),
    "select 1369": (2, 2, 2),
    # A row is a warp, which waits for some five loads one after the other, two of them of rows. An H100 brings a
    # multiprocessor 25 bytes/ns; if that takes 0.7 us, 18 KB are under way: 12 rows of 2 x 768 bytes or 6 of twice
    # that, and as two loads of five are rows, 30 or 15 warps. Ada has room for 24 blocks.
    "propagate 384-mixed": (24, 24, 24),
    "propagate 384-spatial": (24, 24, 24),
    "propagate 384-gain": (24, 24, 24),
    "propagate 768-mixed": (16, 16, 16),
    "propagate 768-spatial": (16, 16, 16),
    "propagate 768-gain": (16, 16, 16),
    # 4 warps, at most 168 registers.
    "recover image": (3, 3, 3),
}
"""Least number of resident blocks per multiprocessor of compute capability 8.0, 8.9 and 9.0, for the nets' launches.

Holds with both tested Triton versions. Fewer blocks wait more, so this finds a compiler or a change that takes more
registers."""


def compiled_elsewhere(family: str) -> tuple[list[Compiled], list[dict[str, Any]]]:
    """Return kernels compiled for GPUs that aren't here, and the remaining rows.

    Fails where a kernel needs more than the GPU has, or spills registers in half precision.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled_kernels", family],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    compiled = [Compiled(**line) for line in lines if "name" in line]
    for kernel in compiled:
        assert kernel.shared <= 99 * 1024, kernel
        assert kernel.stack <= (512 if "float32" in kernel.name else 0), kernel
    return compiled, [line for line in lines if "name" not in line]


@pytest.mark.nightly
def test_every_launch_of_the_nets_compiles_and_fills_gpus_that_are_not_here() -> None:
    """For Ampere, Ada and Hopper; and a compiler that traces them sees what they write."""
    compiled, traced = compiled_elsewhere("nets")
    assert {(kernel.name, kernel.capability) for kernel in compiled} == {
        (name, capability) for name in RESIDENT for capability in CAPABILITIES
    }
    for kernel in compiled:
        assert kernel.resident >= RESIDENT[kernel.name][CAPABILITIES.index(kernel.capability)], kernel
    written: dict[str, set[str]] = {}
    for line in traced:
        written.setdefault(line["kernel"], set()).update(line["written"])
    assert written == {
        "attend_kernel": {"out_ptr", "lse_ptr"},
        "scores_kernel": {"received_ptr", "own_ptr"},
        "token_graph_kernel": {"near_ptr", "degree_ptr"},
        "select_kernel": {"kept_ptr", "removed_ptr", "kept_cell_ptr", "removed_cell_ptr", "place_ptr"},
        "propagate_kernel": {"out_ptr", "moved_ptr", "normed_ptr"},
        "recover_kernel": {"out_ptr"},
    }


@pytest.mark.nightly
def test_awkward_launches_compile_for_gpus_that_are_not_here() -> None:
    compiled, _ = compiled_elsewhere("awkward")
    assert {kernel.name.split()[0] for kernel in compiled} == {
        "attend",
        "scores",
        "token_graph",
        "select",
        "propagate",
        "recover",
    }


def test_tiles_are_timed_kept_and_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The clock decides; another size's file, or a broken one, counts as none."""
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path))

    def slow_first(runs: dict[Any, Run], **how: Any) -> Timings:
        for run in runs.values():
            run()
        return Timings({name: (1 / place,) for place, name in enumerate(runs, start=1)})

    monkeypatch.setattr(tune_kernels, "interleave", slow_first)
    found = tune_kernels.tune_tiles(torch.device(DEVICE), torch.float16, sizes=[(20, 16)])
    candidates = attention_tiles(20, 16, torch.float16)
    assert found == {f"32 16 {torch.float16}": candidates[-1]} and len(candidates) == 4
    assert tuned.measured_tiles("a GPU") == {}
    file = tuned.save_tiles("a GPU", found)
    assert tuned.measured_tiles("a GPU") == found
    file.write_text('{"version": 2, "tiles": {"32 16 torch.float16": [3, 3, 3, 3]}}')
    tuned.measured_tiles.cache_clear()
    assert tuned.measured_tiles("a GPU") == {}


def test_probes_time_the_kernels_for_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A site costs what its kernels take: the same work on the same numbers."""
    x, scores, q = random(B, 24, 16), random(B, 24), random(B, H, 20, 16)
    made = []
    for kernels_too in (False, True):
        monkeypatch.setattr(site_probes, "has_kernels", lambda device, answer=kernels_too: answer)
        calls = (site_probes.propagation(x, 5), site_probes.selection(scores, 5), site_probes.scored_attention(q))
        made.append([function(*arguments) for function, *arguments in calls])
    (moved, chosen, attended), (fast_moved, fast_chosen, fast_attended) = made
    for one, other in zip(fast_moved, moved, strict=True):
        close(one, other)
    assert (moved[2] > 1).float().mean() > 0.5, "a site at which hardly any token receives costs nothing"
    assert all(torch.equal(one, other) for one, other in zip(chosen, fast_chosen[:2], strict=True))
    for one, other in zip(fast_attended, attended, strict=True):
        close(one, other)
