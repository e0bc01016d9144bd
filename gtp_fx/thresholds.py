"""Attention sparsification without ranking maps: below which entry each head drops, measured once on unlabelled images.

The paper drops the int(N^2 (1 - theta)) smallest entries of each image's map (arXiv 2311.03035, attention sparsification), for which
the map has to be in memory. Where the smallest entry that stays varies little between images, its mean over some does as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError
from gtp_fx.graphs import call, returning
from gtp_fx.ops.attention import attention_map, entries_dropped, smallest_kept

Thresholds = tuple[tuple[float, ...], ...]
"""A row for each attention block, in order, of a number for each of its heads: what `GTP(thresholds=…)` takes."""


def mean_thresholds(gm: fx.GraphModule, calls: Iterable[tuple[tuple[Any, ...], dict[str, Any]]]) -> Thresholds:
    """Over the images of `calls`, eager. gm: in which a strategy with theta below 1 ranks the map of every attention.

    Raises OptionError where it ranks none.
    """
    lowest_of = _lowest_runner(gm)
    with torch.no_grad():
        batches = [lowest_of(*args, **kwargs) for args, kwargs in calls]
    return tuple(tuple(torch.cat(rows).mean(dim=0).tolist()) for rows in zip(*batches, strict=True))


def _lowest_runner(gm: fx.GraphModule) -> Callable[..., list[Tensor]]:
    """A function of the model's inputs: for each attention that ranks its map the smallest entry that stays, [B, H]."""

    def lowest(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        found = []
        for node in copies.values():
            if node.target is gtp_fx.attention_with_scores.default:
                q, k, _, bias, scale, sparsity, *_ = node.args
                if sparsity < 1.0:  # type: ignore[operator]
                    with node.graph.inserting_before(node):
                        found.append(call(node.graph, _lowest, q, k, bias, scale, sparsity, like=node))
        if not found:
            raise OptionError(
                "this model ranks no attention map: ask one that was optimised with "
                "strategy=gtp_fx.GTP(attention_sparsity=0.8), say, for its thresholds"
            )
        return found

    return returning(gm, lowest)


def _lowest(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None, sparsity: float) -> Tensor:
    dropped = entries_dropped(q.shape[-2] * k.shape[-2], sparsity)
    if not dropped:
        return q.new_zeros(q.shape[:2], dtype=torch.float32)
    return smallest_kept(*attention_map(q, k, bias, scale), dropped)[..., 0, 0]
