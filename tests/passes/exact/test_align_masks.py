"""Masks of as many dimensions as the queries they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.align_masks import align_masks

from support.graphs_by_hand import node, traced


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


Q, BIAS = noise(2, 3, 5, 4), noise(3, 5, 5)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, bias),
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, attn_mask=bias, scale=0.3),
        lambda q, bias: F.scaled_dot_product_attention(q, q, q, attn_mask=bias > 0),
    ],
    ids=["bias", "by name, scaled", "mask"],
)
def test_a_mask_of_three_dimensions_gets_a_fourth(attend: Callable[[Tensor, Tensor], Tensor]) -> None:
    gm = traced(attend, Q, BIAS)
    aligned = align_masks(gm)
    propagate_shapes(aligned, after="align_masks")
    attention = node(aligned, aten.scaled_dot_product_attention.default, 0)
    assert attention.args[3].meta["val"].shape == (1, 3, 5, 5) and "attn_mask" not in attention.kwargs
    torch.testing.assert_close(aligned(Q, BIAS), gm(Q, BIAS))
    assert align_masks(aligned) is aligned


@pytest.mark.parametrize("bias", [noise(5, 5), noise(1, 3, 5, 5), None], ids=["two", "four", "none"])
def test_other_masks_stay(bias: Tensor | None) -> None:
    given = () if bias is None else (bias,)
    gm = traced(lambda q, *bias: F.scaled_dot_product_attention(q, q, q, *bias), Q, *given)
    assert align_masks(gm) is gm


def test_then_torch_fuses_it() -> None:
    """On a CPU torch computes the whole map for a mask of three dimensions. Once it doesn't, the pass can go."""
    gm = traced(lambda q, bias: F.scaled_dot_product_attention(q, q, q, bias), Q, BIAS)
    assert [_is_fused(run) for run in (gm, align_masks(gm))] == [False, True]


@torch.no_grad()
def _is_fused(run: Callable[..., Tensor]) -> bool:
    with torch.profiler.profile() as seen:
        run(Q, BIAS)
    return "aten::_scaled_dot_product_flash_attention_for_cpu" in {event.key for event in seen.key_averages()}
