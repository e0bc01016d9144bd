"""Attention that scores its tokens (arXiv 2311.03035, token selection), and the bias for what each key stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator

SCORES = {
    "mixed-max": "regeneration difficulty x broadcasting ability, each from its largest head (the paper's choice)",
    "mixed-mean": "the same, each averaged over heads",
    "broadcast-max": "broadcasting ability alone: the attention that a token receives, largest head",
    "broadcast-mean": "the same, averaged over heads",
    "regenerate-max": "regeneration difficulty alone: the attention that a token pays itself, largest head",
    "regenerate-mean": "the same, averaged over heads",
    "cls-max": "the attention that the first prefix token pays, largest head",
    "cls-mean": "the same, averaged over heads",
}
"""Scores that attention may give tokens; those of low score are removed first."""


def _attention_shapes(q, k, v, bias, scale, sparsity, score, prefix, suffix, before=0, after=0):  # type: ignore[no-untyped-def]
    batch, heads, tokens, _ = q.shape
    ranked = 0 if score == "none" else tokens - prefix - suffix
    return v.new_empty(batch, heads, tokens, v.shape[-1]), q.new_empty(batch, ranked, dtype=torch.float32)


def _key_bias_shapes(scale_BN, prefix, suffix, bias, like):  # type: ignore[no-untyped-def]
    shape = (scale_BN.shape[0], 1, 1, prefix + scale_BN.shape[1] + suffix)
    return like.new_empty(shape if bias is None else torch.broadcast_shapes(shape, bias.shape))


@operator(_attention_shapes)
def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | None,
    sparsity: float,
    score: str,
    prefix: int,
    suffix: int,
    before: int = 0,
    after: int = 0,
) -> tuple[Tensor, Tensor]:
    """Scaled dot-product self-attention that also scores each patch token; tokens of low score are removed first.

    q, k, v: [B, H, N, D]; k and v [B, H, before + N + after, D].
    bias: additive, broadcasts to [B, H, N, before + N + after]; None for none.
    scale: factor of the logits; None for D**-0.5.
    sparsity: the paper's theta in (0, 1]. In each head's N x N map the int(N^2 (1 - theta)) smallest entries become 0
        after softmax, without renormalising (attention sparsification); 1 keeps all.
    score: a name in `SCORES`, or "none" for no scores.
    prefix, suffix: tokens before and after the n patches, N in all.
    before, after: keys before and after the tokens' own that are no tokens. They take part in the softmax, and scores
        don't count what they get.

    Returns the output [B, H, N, D] and the scores [B, n] ([B, 0] for "none") in float32. Softmax and scores are
    computed in float32, as in fused attention, so bfloat16 ranks tokens by the same numbers up to the rounding of q and
    k.
    """
    exp_BHNN, inverse_BHN1 = attention_map(q, k, bias, scale)
    # Sparsification comes before the product with v, and scores read the sparse map too.
    if sparsity < 1.0 and (dropped := entries_dropped(q.shape[-2] * k.shape[-2], sparsity)):
        exp_BHNN = above(exp_BHNN, inverse_BHN1, smallest_kept(exp_BHNN, inverse_BHN1, dropped))
    if v.dtype == torch.float16:  # sums of many tokens before the division may be beyond its range
        out = torch.matmul((exp_BHNN * inverse_BHN1).to(v.dtype), v)
    else:
        out = torch.matmul(exp_BHNN.to(v.dtype), v) * inverse_BHN1.to(v.dtype)
    exp_BHNN = exp_BHNN[..., before : exp_BHNN.shape[-1] - after]
    return out, _scores(exp_BHNN, inverse_BHN1, score, prefix, exp_BHNN.shape[-1] - suffix)


@operator(
    lambda map_BHNN, score, prefix, suffix: map_BHNN.new_empty(
        map_BHNN.shape[0], map_BHNN.shape[-1] - prefix - suffix, dtype=torch.float32
    )
)
def scores_of_map(map_BHNN: Tensor, score: str, prefix: int, suffix: int) -> Tensor:
    """Score each patch token by an attention map that is in memory, as `attention_with_scores` does by its own.

    map_BHNN: [B, H, N, N], a row for each query.
    score: a name in `SCORES`.
    prefix, suffix: tokens before and after the n patches, N in all.

    Returns the scores [B, n] in float32; tokens of low score are removed first.
    """
    map_BHNN = map_BHNN.float()
    return _scores(map_BHNN, torch.ones_like(map_BHNN[..., :1]), score, prefix, map_BHNN.shape[-1] - suffix)


@operator(_key_bias_shapes)
def key_bias(scale_BN: Tensor, prefix: int, suffix: int, bias: Tensor | None, like: Tensor) -> Tensor:
    """Build the bias log s_j on the logits of key j (arXiv 2311.03035, proportional attention).

    scale_BN: [B, n] token scales of the patches, float32; tokens that are no patches get a bias of 0.
    prefix, suffix: tokens before and after the patches.
    bias: the attention's own additive mask, to which it is added; None for none.
    like: a tensor of the dtype to return: the query's, which attention needs its mask in.

    Returns [B, 1, 1, prefix + n + suffix], broadcast to the bias's shape where there is one.
    """
    # Not F.pad: under a symbolic batch it would specialise the graph to one batch size.
    before, after = (scale_BN.new_zeros(scale_BN.shape[0], count) for count in (prefix, suffix))
    whole_BN = torch.cat([before, scale_BN.log(), *([after] if suffix else [])], dim=1)
    scale_bias = whole_BN[:, None, None, :]
    if bias is not None:
        scale_bias = scale_bias + _additive(bias)
    return scale_bias.to(like.dtype)


def attention_map(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Return the attention map in float32 as two factors: exponentials [B, H, N, M] and 1 / row sum [B, H, N, 1].

    Products with the map are divided after they are multiplied, which saves a pass over N x M each time.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Queries are scaled before the product, as in fused attention: float16 may not hold q·kᵀ itself.
    logits_BHNM = torch.matmul(q * scale, k.transpose(-2, -1)).float()
    if bias is not None:
        logits_BHNM = logits_BHNM + _additive(bias)
    exp_BHNM = (logits_BHNM - logits_BHNM.detach().amax(dim=-1, keepdim=True)).exp()
    return exp_BHNM, exp_BHNM.sum(dim=-1, keepdim=True).reciprocal()


def over_heads(values_BHN: Tensor, how: str) -> Tensor:
    """Reduce [B, H, N] over heads, by their maximum where `how` is "max", else by their mean."""
    return values_BHN.amax(dim=1) if how == "max" else values_BHN.mean(dim=1)


def _additive(bias: Tensor) -> Tensor:
    """Convert a boolean mask (True: attend) to an additive bias; return any other bias as it is."""
    if bias.dtype != torch.bool:
        return bias
    return torch.zeros((), device=bias.device).masked_fill(~bias, float("-inf"))


def entries_dropped(entries: int, sparsity: float) -> int:
    """Return k = int(N^2 (1 - theta)), for the N^2 entries of one head's map."""
    return int(entries * (1.0 - sparsity))


def smallest_kept(exp_BHNN: Tensor, inverse_BHN1: Tensor, dropped: int) -> Tensor:
    """Return the `dropped`-th smallest entry of each head's map, [B, H, 1, 1]; entries below it are dropped."""
    map_BHNN = (exp_BHNN * inverse_BHN1).detach()
    return map_BHNN.flatten(-2).kthvalue(dropped, dim=-1).values[..., None, None]


def above(exp_BHNN: Tensor, inverse_BHN1: Tensor, threshold_BH11: Tensor) -> Tensor:
    """Return `exp_BHNN` with 0 where the map is below a threshold."""
    return torch.where((exp_BHNN * inverse_BHN1).detach() >= threshold_BH11, exp_BHNN, 0.0)


def _scores(exp_BHNN: Tensor, inverse_BHN1: Tensor, score: str, start: int, stop: int) -> Tensor:
    """Score the tokens from `start` to `stop`, which are the patches."""
    if score == "none":
        return exp_BHNN.new_empty(exp_BHNN.shape[0], 0)
    kind, _, how = score.partition("-")
    if kind == "cls":
        return over_heads((exp_BHNN[:, :, 0] * inverse_BHN1[:, :, 0])[..., start:stop], how)
    parts = []
    if kind in ("regenerate", "mixed"):
        itself_BHN = exp_BHNN.diagonal(dim1=-2, dim2=-1) * inverse_BHN1[..., 0]
        parts.append(over_heads(itself_BHN[..., start:stop], how))
    if kind in ("broadcast", "mixed"):
        with without_autocast(exp_BHNN):
            received_BH1N = torch.matmul(inverse_BHN1.transpose(-2, -1), exp_BHNN)  # column sums of the map
        parts.append(over_heads(received_BH1N[:, :, 0, start:stop], how))
    return math.prod(parts[1:], start=parts[0])
