"""Divergence: how far a model's outputs have moved, without labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


def divergence(found: Any, wanted: Any) -> float:
    """Return how far `found` is from `wanted`, outputs on the same images: a mean over images, 0 where they are equal.

    Class scores [B, V] (a tensor, or what an output names "logits"): the Kullback-Leibler divergence of the original's
    distribution from the other's, in nats. Anything else (features, maps): |found - wanted|² / |wanted|², averaged over
    the output tensors.
    """
    mine, theirs = scores_of(found), scores_of(wanted)
    if mine is not None and theirs is not None:
        log_mine_BV, log_theirs_BV = (F.log_softmax(t.double(), dim=-1) for t in (mine, theirs))
        return float(F.kl_div(log_mine_BV, log_theirs_BV, reduction="batchmean", log_target=True).clamp(min=0))
    pairs = list(zip(_tensors(found), _tensors(wanted), strict=True))
    return sum(_relative(a, b) for a, b in pairs) / max(len(pairs), 1)


def scores_of(output: Any) -> Tensor | None:
    """Return the class scores [B, V] among a model's outputs, or None where there are none."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    return output if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1 else None


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted|² / |wanted|² of two tensors [B, ...], as a mean over images."""
    a, b = found.double().flatten(1), wanted.double().flatten(1)
    return float(((a - b).square().sum(1) / b.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)).mean())
