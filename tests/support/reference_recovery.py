"""Every token back in its place, by hand, on a timm VisionTransformer whose patches were pooled at inputs of blocks.

Site by site from the last one, in loops over tokens: what a patch was as it entered the site, plus the change since
then of what stayed, each by its share. Letters as in `reference_strategies`, whose walk records the sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Left:
    """One site: its block, the tokens [prefix + n, C] before and [prefix + K, C] after it, and who stays and is made of
    whom among the n."""

    block: Any
    before_NC: Tensor
    after_MC: Tensor
    made_of: list[tuple[int, dict[int, float]]]


def everyone_back(x_MC: Tensor, sites: Sequence[Left], prefix: int, attends: bool) -> Tensor:
    """attends: the shares of those that stayed are the attention that the patch pays them, the mean over heads;
    otherwise all of it is its own cell's."""
    for site in reversed(sites):
        keepers = [keeper for keeper, _ in site.made_of]
        change_KC = x_MC[prefix:] - site.before_NC[prefix:][keepers]
        whole_NC = site.before_NC.clone()
        whole_NC[:prefix] = x_MC[:prefix]
        for i in range(len(site.before_NC) - prefix):
            if i in keepers:
                shares = [float(keeper == i) for keeper in keepers]
            elif attends:
                shares = _attention(site, prefix + i, prefix)
            else:
                shares = [float(i in made) for _, made in site.made_of]
            whole_NC[prefix + i] += torch.tensor(shares, dtype=change_KC.dtype) @ change_KC
        x_MC = whole_NC
    return x_MC


def _attention(site: Left, row: int, prefix: int) -> list[float]:
    layer, norm = site.block.attn, site.block.norm1
    wide = site.before_NC.shape[1]
    q_C = layer.qkv(norm(site.before_NC[row]))[:wide]
    k_KC = layer.qkv(norm(site.after_MC[prefix:]))[:, wide : 2 * wide]
    mean_K = torch.zeros(len(k_KC), dtype=q_C.dtype)
    features = wide // layer.num_heads
    for head in range(layer.num_heads):
        of = slice(head * features, (head + 1) * features)
        logits_K = torch.stack([layer.q_norm(q_C[of]) @ layer.k_norm(k_C[of]) for k_C in k_KC]) * features**-0.5
        mean_K += logits_K.softmax(0) / layer.num_heads
    return mean_K.tolist()  # type: ignore[no-any-return]
