"""`keys_apart` on graphs made by hand: the same numbers and FLOPs, and queries that read an input of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.ops import aten

from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.keys_apart import keys_apart
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.strategies.sites import OWN_QUERIES

from support.graphs_by_hand import node, patches, traced

Attend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Queries, keys and values [B, H, N, D] of tokens [B, N, 8] and weights [24, 8]."""


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = (numbers(2, 3, 8, 6, seed=0), 0.3 * numbers(8, 3, 2, 2, seed=1), numbers(24, 8, seed=2), numbers(8, 8, seed=3))


def joint(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = F.linear(F.layer_norm(x, (8,)), weight).reshape(2, -1, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def keys_first(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, q, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2) for part in F.linear(F.layer_norm(x, (8,)), weight).chunk(3, -1)
    )
    return q, k, v


def separate(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    normed = F.layer_norm(x, (8,))
    q, k, v = (F.linear(normed, weight[8 * i : 8 * i + 8]).unflatten(-1, (2, 4)).transpose(1, 2) for i in range(3))
    return q, k, v


def one_for_both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries that are their own keys: rows of the projection are for both."""
    q = F.linear(F.layer_norm(x, (8,)), weight[:8]).unflatten(-1, (2, 4)).transpose(1, 2)
    return q, q, F.linear(x, weight[8:16]).unflatten(-1, (2, 4)).transpose(1, 2)


def marked(attend: Attend) -> fx.GraphModule:
    def model(image: Tensor, embed: Tensor, weight: Tensor, after: Tensor) -> Tensor:
        x = patches(image, embed)
        for _ in range(2):
            out = F.scaled_dot_product_attention(*attend(x, weight)).transpose(1, 2).reshape(2, -1, 8)
            x = x + F.linear(out, after)
            x = x + F.linear(x, after).tanh()
        return x.mean(dim=1)

    return mark_blocks(normalise(traced(model, *INPUTS)))


@torch.no_grad()
@pytest.mark.parametrize("attend", [joint, keys_first, separate])
def test_queries_get_an_input_of_their_own(attend: Attend) -> None:
    gm = marked(attend)
    apart = keys_apart(gm, shortens_queries=True)
    propagate_shapes(apart, "keys_apart")
    torch.testing.assert_close(apart(*INPUTS), gm(*INPUTS), rtol=0, atol=1e-5)
    assert count_flops(apart.graph) == count_flops(gm.graph), "no row is computed twice"
    for number, block in enumerate(typed_graph(apart.graph).blocks):
        q, k, v = node(apart, aten.scaled_dot_product_attention.default, number).args[:3]
        own = block.stream
        assert own is not None and own.target is aten.alias.default and OWN_QUERIES in own.meta
        assert own in ancestors(q) and own not in ancestors(k) | ancestors(v) and own.args[0] in ancestors(k)
        assert own in block.site.all_input_nodes  # type: ignore[union-attr]


def test_what_is_for_both_stays_together() -> None:
    gm = marked(one_for_both)
    assert keys_apart(gm, shortens_queries=True) is gm


def test_nothing_is_taken_apart_unasked() -> None:
    gm = marked(joint)
    assert keys_apart(gm) is gm
