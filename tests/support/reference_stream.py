"""A residual stream from which tokens leave, by hand: what the walks of `reference_families` have in common.

Token selection, token summarisation and proportional attention (arXiv 2311.03035) are `reference`'s; here they work on
a stream of any model, on a grid of any rank, and what a family indexes by position comes along: rotary tables, biases
between pairs of tokens. Everything is gathered image by image. Nothing of the product is used.

Letters in tensor names are those of `reference`: B images, H heads, D channels of a head, C channels, N tokens present
(prefix first, suffix last), L patches present, G patches of the whole grid, K kept, P propagated; R sides of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from support.reference import normalise, propagate, select, semantic, token_scores

Heads = tuple[Tensor, Tensor, Tensor]
"""q, k and v of all heads, each [B, H, N, D]."""

ALPHA = 0.4
NEIGHBORS = 8
SCORE = "mixed-max"
CLEAR = 1e-5
"""Scores nearer to one another than this (relative) could change places by rounding alone."""


@dataclass(frozen=True, eq=False)
class Removal:
    """One site. present: the patches that it had, as indices into the grid; kept, left: indices into those."""

    present_BL: Tensor
    kept_BK: Tensor
    removed_BP: Tensor


class Stream:
    """x_BNC is the stream as it is now; a walk computes with it and puts the result back."""

    def __init__(self, x_BNC: Tensor, grid: tuple[int, ...], prefix: int, places_GR: Tensor | None = None) -> None:
        """x_BNC: what enters the first block, prefix + G tokens and a suffix, G = product of `grid`.

        places_GR: where the G patches are; None where they are row-major.
        """
        patches_BGC = x_BNC[:, prefix : prefix + math.prod(grid)]
        self.x_BNC, self.prefix = x_BNC, prefix
        self.places_GR = torch.cartesian_prod(*map(torch.arange, grid)) if places_GR is None else places_GR
        self.weights_BGG = normalise(touching(self.places_GR) | semantic(patches_BGC, NEIGHBORS), x_BNC.dtype)
        self.scale_BN = torch.ones_like(x_BNC[..., 0])
        self.present_BL = torch.arange(math.prod(grid)).expand(len(x_BNC), -1)
        self.suffix_S = torch.arange(prefix + math.prod(grid), x_BNC.shape[1])
        self.removals: list[Removal] = []
        self.attn_BHNN: Tensor | None = None

    @property
    def key_bias_BN(self) -> Tensor:
        """log s_j, which every later attention adds to the logits of key j (proportional attention)."""
        return self.scale_BN.log()

    def attend(self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        """Self-attention's output with its heads merged, [B, N, HD]; the map is kept for the selection.

        bias: between the tokens present, see `pairs`.
        """
        out_BNC, self.attn_BHNN = attention(q_BHND, k_BHND, v_BHND, self.key_bias_BN, bias)
        return out_BNC

    def leave(self, count: int) -> None:
        """The `count` patches that the last attention scored lowest leave, and give themselves to their neighbours."""
        if count == 0:
            return
        assert self.attn_BHNN is not None
        present = self.present_BL.shape[1]
        score_BL = token_scores(self.attn_BHNN, self.prefix, SCORE)[:, :present]
        kept_BK, removed_BP, gap_B = select(score_BL, count)
        assert (gap_B > CLEAR).all(), "this choice is a matter of rounding: take other weights or inputs"
        moves = (kept_BK, removed_BP, self.present_BL, self.weights_BGG, ALPHA, self.prefix)
        both_BNC = torch.cat([self.x_BNC, self.scale_BN[..., None]], dim=-1)  # a scale moves as one more channel would
        suffix_BSC = both_BNC[:, self.prefix + present :]
        both_BNC = torch.cat([propagate(both_BNC[:, : self.prefix + present], *moves), suffix_BSC], dim=1)
        self.x_BNC, self.scale_BN = both_BNC[..., :-1], both_BNC[..., -1]
        self.removals.append(Removal(self.present_BL, kept_BK, removed_BP))
        self.present_BL = self.present_BL.gather(1, kept_BK)

    def rows(self, table_GD: Tensor) -> Tensor:
        """[B, …, L, D]: a table over the whole grid, [… , G, D], as each image's patches present have it."""
        return torch.stack([table_GD[..., present_L, :] for present_L in self.present_BL])

    def tokens(self, table_NC: Tensor) -> Tensor:
        """[B, N, C]: a table over all tokens that the model began with, as each image's present tokens have it."""
        return torch.stack([table_NC[tokens_N] for tokens_N in self._tokens_BN()])

    def pairs(self, bias_HNN: Tensor) -> Tensor:
        """[B, H, N, N]: a bias between all tokens that the model began with, between those present."""
        return torch.stack([bias_HNN[:, tokens_N][:, :, tokens_N] for tokens_N in self._tokens_BN()])

    def _tokens_BN(self) -> list[Tensor]:
        """Of each image, the tokens present as indices into those that the model began with."""
        prefix_p = torch.arange(self.prefix)
        return [torch.cat([prefix_p, self.prefix + present_L, self.suffix_S]) for present_L in self.present_BL]

    def recovered(self, x_BNC: Tensor) -> Tensor:
        """`x_BNC`, over the tokens present, over all tokens again: the last to leave come back first."""
        for removal in reversed(self.removals):
            x_BNC = torch.stack([self._put_back(x_NC, removal, image) for image, x_NC in enumerate(x_BNC)])
        return x_BNC

    def _put_back(self, x_NC: Tensor, removal: Removal, image: int) -> Tensor:
        """Restore a removed token as the mean of its receivers, each weighted by Â[kept, it] divided by their sum.

        One that nobody received is the kept token nearest on the grid, the first of several.
        """
        present_L, kept_K = removal.present_BL[image], removal.kept_BK[image]
        behind = self.prefix + len(kept_K)
        patch_KC = x_NC[self.prefix : behind]
        whole_LC = x_NC.new_empty(len(present_L), x_NC.shape[-1])
        whole_LC[kept_K] = patch_KC
        for left in removal.removed_BP[image].tolist():
            received_K = self.weights_BGG[image][present_L[kept_K], present_L[left]]
            if received_K.sum() > 0:
                whole_LC[left] = received_K @ patch_KC / received_K.sum()
            else:
                apart_KR = self.places_GR[present_L[kept_K]] - self.places_GR[present_L[left]]
                whole_LC[left] = patch_KC[apart_KR.square().sum(-1).argmin()]
        return torch.cat([x_NC[: self.prefix], whole_LC, x_NC[behind:]])


def touching(places_GR: Tensor) -> Tensor:
    """[G, G]: patches that touch, corners included: 8 on a plane, 26 in a volume, fewer at the border; never itself."""
    steps_GG = (places_GR[:, None] - places_GR[None, :]).abs().amax(dim=-1)
    return steps_GG.eq(1)


def attention(
    q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, key_bias_BN: Tensor, bias: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q·kᵀ/√D + bias + log s)·v with heads merged, [B, queries, HD], and the map."""
    logits_BHNN = q_BHND @ k_BHND.transpose(-2, -1) * q_BHND.shape[-1] ** -0.5
    attn_BHNN = (logits_BHNN + bias + key_bias_BN[:, None, None, :]).softmax(dim=-1)
    return (attn_BHNN @ v_BHND).transpose(1, 2).flatten(2), attn_BHNN


def split(qkv: Sequence[Tensor], heads: int) -> Heads:
    """q, k, v from [B, N, HD] to [B, H, N, D] each."""
    q_BHND, k_BHND, v_BHND = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
    return q_BHND, k_BHND, v_BHND


def rotated(x_BHND: Tensor, sin: Tensor, cos: Tensor, prefix: int, halves: bool) -> Tensor:
    """Rotary position embedding of the patches; prefix tokens have no position.

    Channels turn in pairs: of neighbours (0, 1), (2, 3), … or, with `halves`, of halves (0, D/2), (1, D/2 + 1), …
    sin, cos: of each channel's angle, broadcast to [B, H, L, D].
    """
    patch_BHLD = x_BHND[:, :, prefix:]
    if halves:
        first, second = patch_BHLD.chunk(2, dim=-1)
        turned_BHLD = torch.cat([-second, first], dim=-1)
    else:
        turned_BHLD = torch.stack([-patch_BHLD[..., 1::2], patch_BHLD[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([x_BHND[:, :, :prefix], patch_BHLD * cos + turned_BHLD * sin], dim=2)
