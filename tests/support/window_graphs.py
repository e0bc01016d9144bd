"""What tests of windowed families share: graphs with their blocks marked, walks by hand, errors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, fx, nn

import gtp_fx
from gtp_fx.analysis.branches import Branch
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise

from support.captured import captured
from support.reference_windows import ByHand
from support.window_families import Family

RECOVER = gtp_fx.GTP(branch="recover")


def tensors(output: Any) -> list[Tensor]:
    leaves = [output] if isinstance(output, Tensor) else list(output.values())
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def error(found: Any, wanted: Any) -> float:
    """Largest error over largest value, of the output that is furthest off."""
    pairs = list(zip(tensors(found), tensors(wanted), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def on(family: Family, model: nn.Module, blocks: dict[str, int], mean: float | None = None) -> ByHand:
    return ByHand(model, family.oracle(model), blocks, mean)


@cache
def marked(family: Family) -> fx.GraphModule:
    """Its graph, blocks marked, as the rewriting passes find it; they change copies."""
    gm = captured(family)
    for rewrite in (normalise, drop_trivial_masks, einsum_to_matmul, fuse_attention, mark_blocks):
        gm = rewrite(gm)
        propagate_shapes(gm, after=rewrite.__name__)
    return gm


def branches(gm: fx.GraphModule) -> list[Branch]:
    return [block.branch for block in typed_graph(gm.graph).blocks if block.branch is not None]


@dataclass(frozen=True)
class Skips:
    """What of a plan says how many tokens of each window skip, by block."""

    skipping: dict[int, int]
    strategy: gtp_fx.GTP
    by_activity: frozenset[int] = frozenset()
