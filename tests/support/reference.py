"""GTP by hand on a timm VisionTransformer: what every compiled model is compared with.

Written from the paper (arXiv 2311.03035), sharing nothing with the product: attention maps are explicit,
the graph is a dense matrix, tokens are moved image by image. Slow and plain on purpose. It covers timm's
`Block` with its `Attention` (LayerScale, norms inside attention or before the blocks, registers,
distillation, every pooling, also by attention) and refuses anything else. Average pooling is the authors':
a plain mean of what is left.

Letters in tensor names: B images, H heads, D channels of a head, C channels, N tokens present (prefix first),
L patches present, G patches of the whole grid, K kept, P propagated, M semantic neighbours, V outputs.
A tensor of one image has no B.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers.attention import Attention
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

GRAPHS = ("spatial", "semantic", "mixed")
SCORES = tuple(f"{kind}-{over}" for kind in ("mixed", "cls", "broadcast", "regenerate") for over in ("max", "mean"))


@dataclass(frozen=True, eq=False)
class Entered:
    """The stream of L patches at a site.

    kept_BK, removed_BP: indices into the patches.
    where_BL: each patch's place on the grid.
    """

    stream_BNC: Tensor
    kept_BK: Tensor
    removed_BP: Tensor
    where_BL: Tensor


@dataclass(frozen=True, eq=False)
class Site:
    """One selection: which patches stayed (ascending indices into the whole grid), how clear the choice was.

    gap_B is the relative distance between the highest score that left and the lowest that stayed. Two
    implementations can be asked for the same tokens only where it is well above their rounding.
    """

    block: int
    kept_BK: Tensor
    gap_B: Tensor
    entered: Entered


@dataclass(frozen=True, eq=False)
class Reference:
    """What GTP computes: outputs, one Site for each block that propagates, the last token scales, the stream after the
    last block and those tokens after the norm; the graph's weights and the grid."""

    logits_BV: Tensor
    sites: tuple[Site, ...]
    scale_BN: Tensor
    tokens_BNC: Tensor
    stream_BNC: Tensor
    weights_BGG: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def gtp_reference(
    model: VisionTransformer,
    images_BCHW: Tensor,
    *,
    schedule: Sequence[int],
    alpha: float = 0.1,
    graph: str = "mixed",
    neighbors: int = 8,
    sparsity: float = 1.0,
    score: str = "mixed-max",
    token_scale: bool = True,
) -> Reference:
    """Run `model` with schedule[i] patch tokens propagated in block i (0: none).

    neighbors is M of the semantic graph and sparsity is θ (1 is off), as in the paper. ValueError for a bad
    argument, TypeError for a model this file does not know by hand.
    """
    _check(model, schedule, graph, score)
    prefix = model.num_prefix_tokens
    x_BNC = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images_BCHW))))
    grid = model.patch_embed.dynamic_feat_size(tuple(images_BCHW.shape[-2:]))
    weights_BGG = normalise(adjacency(x_BNC[:, prefix:], grid, graph, neighbors), x_BNC.dtype)
    how = (alpha, sparsity, score, token_scale)
    x_BNC, scale_BN, sites = through_blocks(model.blocks, x_BNC, weights_BGG, prefix, schedule, *how)

    key_bias_BN = scale_BN.log() if token_scale else torch.zeros_like(scale_BN)
    tokens_BNC = model.norm(x_BNC)
    logits_BV = head(model, tokens_BNC, key_bias_BN)
    return Reference(logits_BV, sites, scale_BN, tokens_BNC, x_BNC, weights_BGG, grid)


@torch.no_grad()
def row_reference(
    blocks: Iterable[Any], x_BNC: Tensor, schedule: Sequence[int], prefix: int, alpha: float, neighbors: int = 8
) -> Tensor:
    """What GTP makes of tokens on no grid that go through timm's blocks: [B, N, C], every token back in its place.

    They are a row: neighbours are similar tokens alone, and one that nobody received is closest to the next in the row.
    """
    patches_BGC = x_BNC[:, prefix:]
    weights_BGG = normalise(semantic(patches_BGC, neighbors), x_BNC.dtype)
    x_BNC, scale_BN, sites = through_blocks(
        blocks, x_BNC, weights_BGG, prefix, schedule, alpha, sparsity=1.0, score="mixed-max", token_scale=True
    )
    made = Reference(x_BNC, sites, scale_BN, x_BNC, x_BNC, weights_BGG, (1, patches_BGC.shape[1]))
    return with_everyone_back(made, prefix)


def through_blocks(
    blocks: Iterable[Any],
    x_BNC: Tensor,
    weights_BGG: Tensor,
    prefix: int,
    schedule: Sequence[int],
    alpha: float,
    sparsity: float,
    score: str,
    token_scale: bool,
) -> tuple[Tensor, Tensor, tuple[Site, ...]]:
    """The stream after timm's blocks, the token scales, and what each site chose."""
    scale_BN = torch.ones_like(x_BNC[..., 0])
    # The patches present, as indices into the grid.
    where_BL = torch.arange(weights_BGG.shape[1], device=x_BNC.device).expand(x_BNC.shape[0], -1)
    sites = []

    for index, (block, propagated) in enumerate(zip(blocks, schedule, strict=True)):
        key_bias_BN = scale_BN.log() if token_scale else torch.zeros_like(scale_BN)
        branch_BNC, attn_BHNN = attention(block.attn, block.norm1(x_BNC), key_bias_BN, sparsity)
        x_BNC = x_BNC + block.ls1(branch_BNC)

        if propagated > 0:  # an explicit test: the authors' [:, :-P] keeps nothing when P is 0
            score_BL = token_scores(attn_BHNN, prefix, score)
            kept_BK, propagated_BP, gap_B = select(score_BL, propagated)
            entered = Entered(x_BNC, kept_BK, propagated_BP, where_BL)
            moves = (kept_BK, propagated_BP, where_BL, weights_BGG, alpha, prefix)
            x_BNC = propagate(x_BNC, *moves)
            scale_BN = propagate(scale_BN[..., None], *moves)[..., 0]  # as one more channel would
            where_BL = where_BL.gather(1, kept_BK)
            sites.append(Site(index, where_BL, gap_B, entered))

        # This block's MLP sees the short sequence already.
        x_BNC = x_BNC + block.ls2(block.mlp(block.norm2(x_BNC)))
    return x_BNC, scale_BN, tuple(sites)


@torch.no_grad()
def with_everyone_back(made: Reference, prefix: int) -> Tensor:
    """Restore every token, [B, prefix + G, C], site by site from the last one, in loops.

    A removed token is as it was at the site, plus the change since then of those that received it, weighted by how much
    they received; where nobody received it, the change of the nearest kept token.
    """
    whole_BNC = made.stream_BNC
    for site in reversed(made.sites):
        then = site.entered
        images = []
        for b, before_NC in enumerate(then.stream_BNC):
            kept, left, where = (index[b].tolist() for index in (then.kept_BK, then.removed_BP, then.where_BL))
            now_NC = before_NC.clone()
            now_NC[:prefix] = whole_BNC[b, :prefix]
            for i, k in enumerate(kept):
                now_NC[prefix + k] = whole_BNC[b, prefix + i]
            for p in left:
                shares = [float(made.weights_BGG[b, where[k], where[p]]) for k in kept]
                if not any(shares):
                    apart = [_apart(where[k], where[p], made.grid[1]) for k in kept]
                    shares = [float(i == apart.index(min(apart))) for i in range(len(kept))]
                for k, share in zip(kept, shares, strict=True):
                    now_NC[prefix + p] += share / sum(shares) * (now_NC[prefix + k] - before_NC[prefix + k])
            images.append(now_NC)
        whole_BNC = torch.stack(images)
    return whole_BNC


def _apart(one: int, other: int, columns: int) -> int:
    return (one // columns - other // columns) ** 2 + (one % columns - other % columns) ** 2


def attention(layer: Attention, x_BNC: Tensor, key_bias_BN: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """The output [B, N, C] and the map [B, H, N, N], both after the scale bias and the sparsification."""
    B, N, _ = x_BNC.shape
    qkv = layer.qkv(x_BNC).reshape(B, N, 3, layer.num_heads, layer.head_dim)
    q_BHND, k_BHND, v_BHND = (part.transpose(1, 2) for part in qkv.unbind(2))
    q_BHND, k_BHND = layer.q_norm(q_BHND), layer.k_norm(k_BHND)

    logits_BHNN = q_BHND @ k_BHND.transpose(-2, -1) * layer.scale + key_bias_BN[:, None, None, :]
    attn_BHNN = sparsify(logits_BHNN.softmax(dim=-1), sparsity)

    out_BNC = (attn_BHNN @ v_BHND).transpose(1, 2).reshape(B, N, layer.attn_dim)
    return layer.proj(layer.norm(out_BNC)), attn_BHNN


def sparsify(attn_BHNN: Tensor, sparsity: float) -> Tensor:
    """Zero what is below the k-th smallest of an image's and head's whole map; rows are not renormalised."""
    N = attn_BHNN.shape[-1]
    k = int(N * N * (1 - sparsity))
    if k < 1:
        return attn_BHNN
    kth_BH = attn_BHNN.flatten(2).kthvalue(k, dim=-1).values
    return attn_BHNN.masked_fill(attn_BHNN < kth_BH[..., None, None], 0.0)


def token_scores(attn_BHNN: Tensor, prefix: int, score: str) -> Tensor:
    """Scores of the patch tokens, [B, L]; the lowest are propagated."""
    kind, over = score.split("-")
    over_heads = torch.amax if over == "max" else torch.mean
    regenerate_BN = over_heads(attn_BHNN.diagonal(dim1=-2, dim2=-1), dim=1)
    broadcast_BN = over_heads(attn_BHNN.sum(dim=-2), dim=1)  # over all queries, the prefix included
    score_BN = {
        "mixed": regenerate_BN * broadcast_BN,
        "regenerate": regenerate_BN,
        "broadcast": broadcast_BN,
        "cls": over_heads(attn_BHNN[:, :, 0, :], dim=1),
    }[kind]
    return score_BN[:, prefix:]


def select(score_BL: Tensor, propagated: int) -> tuple[Tensor, Tensor, Tensor]:
    """kept [B, K] and propagated [B, P], ascending indices into the L patches present, and the gap [B].

    The method leaves equal scores open; here the later token leaves.
    """
    order_BL = score_BL.argsort(dim=1, descending=True, stable=True)
    K = score_BL.shape[1] - propagated
    lowest_kept_B = score_BL.gather(1, order_BL[:, K - 1 : K])[:, 0]
    highest_left_B = score_BL.gather(1, order_BL[:, K : K + 1])[:, 0]
    # Two zeros (sparsification makes them) are a tie, not 0/0.
    gap_B = (lowest_kept_B - highest_left_B) / lowest_kept_B.clamp(min=torch.finfo(score_BL.dtype).tiny)
    return order_BL[:, :K].sort(dim=1).values, order_BL[:, K:].sort(dim=1).values, gap_B


def propagate(
    x_BNC: Tensor,
    kept_BK: Tensor,
    propagated_BP: Tensor,
    where_BL: Tensor,
    weights_BGG: Tensor,
    alpha: float,
    prefix: int,
) -> Tensor:
    """x_kept += α·Â[kept, propagated]·x_propagated, image by image; [B, prefix + K, C].

    kept and propagated index the patches present; where_BL says which patch of the grid each of those is.
    """
    images = []
    for x_NC, kept_K, left_P, where_L, weights_GG in zip(
        x_BNC, kept_BK, propagated_BP, where_BL, weights_BGG, strict=True
    ):
        patch_LC = x_NC[prefix:]
        weights_KP = weights_GG[where_L[kept_K]][:, where_L[left_P]]
        patch_KC = patch_LC[kept_K] + alpha * weights_KP @ patch_LC[left_P]
        images.append(torch.cat([x_NC[:prefix], patch_KC]))
    return torch.stack(images)


def adjacency(patch_BGC: Tensor, grid: tuple[int, int], graph: str, neighbors: int) -> Tensor:
    """[B, G, G], bool: is j a neighbour of i? Never of itself."""
    B, G, _ = patch_BGC.shape
    spatial_BGG = spatial(grid).to(patch_BGC.device).expand(B, G, G)
    if graph == "spatial":
        return spatial_BGG
    semantic_BGG = semantic(patch_BGC, neighbors)
    return semantic_BGG if graph == "semantic" else spatial_BGG | semantic_BGG


def spatial(grid: tuple[int, int]) -> Tensor:
    """[G, G]: the 8 neighbours on an h×w grid in row-major order, fewer at its border."""
    rows, columns = (place.flatten() for place in torch.meshgrid(*map(torch.arange, grid), indexing="ij"))
    down_GG = (rows[:, None] - rows[None, :]).abs()
    right_GG = (columns[:, None] - columns[None, :]).abs()
    return torch.maximum(down_GG, right_GG) == 1  # a king's move: never 0, so no self loop


def semantic(patch_BGC: Tensor, neighbors: int) -> Tensor:
    """[B, G, G]: row i marks the M others most cosine-similar to i. Directed."""
    unit_BGC = patch_BGC / patch_BGC.norm(dim=-1, keepdim=True)
    cosine_BGG = unit_BGC @ unit_BGC.transpose(1, 2)
    cosine_BGG.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest_BGM = cosine_BGG.topk(min(neighbors, cosine_BGG.shape[-1] - 1), dim=-1).indices
    return torch.zeros_like(cosine_BGG, dtype=torch.bool).scatter(2, nearest_BGM, True)


def normalise(adjacency_BGG: Tensor, dtype: torch.dtype) -> Tensor:
    """Â = D^-½ A D^-½ with row degrees on both sides. A node of degree 0 keeps a row of zeros, not inf."""
    degree_BG = adjacency_BGG.sum(dim=-1).clamp(min=1).to(dtype)
    return adjacency_BGG.to(dtype) / (degree_BG[:, :, None] * degree_BG[:, None, :]).sqrt()


def head(model: VisionTransformer, x_BNC: Tensor, key_bias_BN: Tensor) -> Tensor:
    """The model's own head. Attention pooling is a later attention like any other: it sees the scales."""
    if model.attn_pool is None:
        logits_BV: Tensor = model.forward_head(x_BNC)
        return logits_BV
    start = 0 if model.pool_include_prefix else model.num_prefix_tokens
    pooled_BC = attention_pool(model.attn_pool, x_BNC[:, start:], key_bias_BN[:, start:])
    logits_BV = model.head(model.head_drop(model.fc_norm(pooled_BC)))
    return logits_BV


def attention_pool(pool: AttentionPoolLatent, x_BNC: Tensor, key_bias_BN: Tensor) -> Tensor:
    """timm's latent query (one, as a token) over the tokens, then its MLP."""
    B, N, _ = x_BNC.shape
    q_H1D = pool.q(pool.latent)[0].reshape(1, pool.num_heads, pool.head_dim).transpose(0, 1)
    kv = pool.kv(x_BNC).reshape(B, N, 2, pool.num_heads, pool.head_dim)
    k_BHND, v_BHND = (part.transpose(1, 2) for part in kv.unbind(2))
    q_H1D, k_BHND = pool.q_norm(q_H1D), pool.k_norm(k_BHND)
    logits_BH1N = q_H1D @ k_BHND.transpose(-2, -1) * pool.scale + key_bias_BN[:, None, None, :]
    pooled_BC: Tensor = pool.proj((logits_BH1N.softmax(dim=-1) @ v_BHND).flatten(1))
    pooled_BC = pooled_BC + pool.mlp(pool.norm(pooled_BC))
    return pooled_BC


def _check(model: VisionTransformer, schedule: Sequence[int], graph: str, score: str) -> None:
    """A reference that quietly computes something else is worse than none."""
    if not isinstance(model, VisionTransformer) or model.training:
        raise TypeError("the reference runs a timm VisionTransformer in eval mode")
    for block in model.blocks:
        if type(block) is not Block or type(block.attn) is not Attention or block.attn.gate is not None:
            raise TypeError(f"the reference knows timm's Block with Attention, not {type(block).__name__}")
    pool = model.attn_pool
    if pool is not None:
        known = isinstance(pool, AttentionPoolLatent) and pool.latent_len == 1 and pool.pool == "token"
        if not known or pool.pos_embed is not None or pool.mlp is None:
            raise TypeError("the reference knows AttentionPoolLatent with one latent, an MLP and no positions")
    if graph not in GRAPHS:
        raise ValueError(f"graph {graph!r} is not one of {GRAPHS}")
    if score not in SCORES or (score.startswith("cls") and not model.has_class_token):
        raise ValueError(f"score {score!r} is not one of {SCORES}, or this model has no class token")
    blocks, patches = len(model.blocks), model.patch_embed.num_patches
    if len(schedule) != blocks or min(schedule) < 0 or sum(schedule) >= patches:
        raise ValueError(f"schedule {list(schedule)}: give {blocks} counts ≥ 0 that leave one of {patches} patches")
