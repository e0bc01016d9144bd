"""Products of values and turned weights have the weights first, whatever stands between them and q·kᵀ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.ops import aten

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.weights_first import weights_first

from support.graphs_by_hand import traced


def t(matrices: Tensor) -> Tensor:
    return matrices.transpose(-2, -1)


def operands() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, *sizes, generator=generator) for sizes in ((5, 4), (6, 4), (6, 4), (5, 6))]


def from_softmax(node: fx.Node) -> bool:
    while node.target in (aten.where.self, aten.transpose.int, aten.to.dtype, aten._to_copy.default):
        node = node.args[2 if node.target is aten.where.self else 0]  # type: ignore[assignment]
    return node.target is aten.softmax.int and node.args[1] in (-1, 3)


@pytest.mark.parametrize(
    "attention",
    [
        lambda q, k, v, bias: t(v) @ t((q @ t(k)).softmax(-1)),
        lambda q, k, v, bias: t(v) @ (q @ t(k) + bias).softmax(-1).transpose(3, 2),
        lambda q, k, v, bias: t(v) @ ((k @ t(q)) * 0.5 + t(bias)).softmax(-2),
        lambda q, k, v, bias: t(v) @ (k @ (t(q) / 2)).to(torch.float64).softmax(2).float(),
        lambda q, k, v, bias: t((k @ t(q)).softmax(-2)) @ v,
        lambda q, k, v, bias: torch.einsum("bhjd,bhij->bihd", v, (q @ t(k)).softmax(-1)),
        lambda q, k, v, bias: t(v) @ t(torch.where((w := (q @ t(k)).softmax(-1)).isnan(), torch.zeros_like(w), w)),
        lambda q, k, v, bias: v.permute(0, 1, 3, 2) @ (q @ t(k)).softmax(-1).permute(0, 1, 3, 2),
    ],
)
def test_weights_come_first(attention: Callable[..., Tensor]) -> None:
    gm = einsum_to_matmul(traced(attention, *operands()))
    propagate_shapes(gm, after="test")
    turned = weights_first(gm)
    propagate_shapes(turned, after="test")
    *_, product = [node for node in turned.graph.nodes if node.target is aten.matmul.default]
    assert from_softmax(product.args[0]) and not from_softmax(product.args[1])
    torch.testing.assert_close(turned(*operands()), gm(*operands()))


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v, bias: (q @ t(k)).softmax(-1) @ v,
        lambda q, k, v, bias: q.softmax(-1) @ (t(k.softmax(-2)) @ v),  # linear attention: no softmax of a product
        lambda q, k, v, bias: t(v) @ t((q @ t(k)).relu()),
        lambda q, k, v, bias: (q @ t(k)).softmax(-2) @ v,  # shared out among queries: no weights of an attention
    ],
)
def test_other_products_stay_as_they_are(function: Callable[..., Tensor]) -> None:
    gm = traced(function, *operands())
    assert weights_first(gm) is gm
