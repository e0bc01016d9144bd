"""Linear layers and their parts in one form: products with parameters, splits as slices, scales second."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.ops import aten

from gtp_fx.capture.vocabulary import open_composites
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.matmul_to_linear import matmul_to_linear
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.split_projections import split_projections

from support.graphs_by_hand import calls, patches, traced

X, W, BIAS = torch.randn(2, 5, 8), torch.randn(6, 8), torch.randn(6)


def canonical(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    """The graph of a function after the passes that give products one form."""
    gm = traced(function, *inputs)
    open_composites(gm)
    gm = normalise(gm)
    propagate_shapes(gm, "normalise")
    gm = einsum_to_matmul(gm)
    propagate_shapes(gm, "einsum_to_matmul")
    gm = matmul_to_linear(gm)
    propagate_shapes(gm, "matmul_to_linear")
    return gm


def operators(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@torch.no_grad()
@pytest.mark.parametrize(
    "layer",
    [
        lambda x, w, b: x @ w.T + b,
        lambda x, w, b: b + torch.matmul(x, w.mT),
        lambda x, w, b: torch.einsum("bnc,oc->bno", x, w) + b,
        lambda x, w, b: torch.addmm(b, x.reshape(-1, 8), w.t()).view(2, 5, 6),
        lambda x, w, b: torch.tensordot(x, w, dims=([-1], [1])) + b,
        lambda x, w, b: F.linear(x.view(-1, 8), w, b).view(2, 5, -1),
        lambda x, w, b: (torch.mm(x.flatten(0, 1), w.T) + b).unflatten(0, (2, 5)),
    ],
    ids=["matmul", "mT", "einsum", "addmm", "tensordot", "over flattened tokens", "mm"],
)
def test_a_product_with_a_parameter_is_a_linear_layer(layer: Callable[..., Tensor]) -> None:
    gm = canonical(layer, X, W, BIAS)
    assert operators(gm) == ["aten.linear.default"]
    torch.testing.assert_close(gm(X, W, BIAS), F.linear(X, W, BIAS))


@torch.no_grad()
def test_a_weight_the_other_way_round_is_transposed_once() -> None:
    gm = canonical(lambda x, w, b: x @ w, X, W.T.contiguous(), BIAS)
    assert operators(gm) == ["aten.transpose.int", "aten.linear.default"]
    torch.testing.assert_close(gm(X, W.T.contiguous(), BIAS), X @ W.T)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w, b: x @ x.mT,
        lambda x, w, b: x @ (w.T * 2.0),
        lambda x, w, b: torch.einsum("bnc,bnc->bn", x, x),
    ],
    ids=["of tokens with tokens", "of a weight that is computed", "another einsum"],
)
def test_other_products_stay(function: Callable[..., Tensor]) -> None:
    assert calls(canonical(function, X, W, BIAS), aten.linear.default) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda x: x.split([1, 4], 1)[0], ["aten.slice.Tensor"]),
        (lambda x: x.split(3, dim=1)[1], ["aten.slice.Tensor"]),
        (lambda x: x.chunk(2, -1)[1], ["aten.slice.Tensor"]),
        (lambda x: x.unbind(1)[-2], ["aten.select.int"]),
        (lambda x: torch.mul(x * 1.0, 1).permute(0, 1, 2).div(1), []),
        (lambda x: 2.0 * torch.stack([x, x]).sum(0), ["aten.add.Tensor", "aten.mul.Tensor"]),
    ],
    ids=["split by sizes", "split", "chunk", "unbind", "nothing done", "a sum over a stack"],
)
def test_parts_and_sums_have_one_spelling(function: Callable[[Tensor], Tensor], wanted: list[str]) -> None:
    gm = normalise(traced(function, X))
    assert operators(gm) == wanted
    assert torch.equal(gm(X), function(X))


def parts_of(qkv: Tensor, how: str) -> list[Tensor]:
    """q, k and v [B, H, N, D] of a joint projection [B, N, 3 C], taken in one of several ways."""
    if how == "view":
        return list(qkv.reshape(2, 13, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0))
    if how == "heads first":  # [B, N, 3 H, D], the parts of which are runs of heads
        return [part.transpose(1, 2) for part in qkv.reshape(2, 13, 6, 4).split(2, 2)]
    flat = qkv.chunk(3, -1) if how == "chunk" else [qkv[..., i : i + 8] for i in (0, 8, 16)]
    return [part.reshape(2, 13, 2, 4).transpose(1, 2) for part in flat]


@torch.no_grad()
@pytest.mark.parametrize("how", ["view", "heads first", "chunk", "slices"])
def test_parts_live_for_other_tokens_are_split_off_however_they_are_taken(how: str) -> None:
    def cls_head(image: Tensor, embed: Tensor, qkv: Tensor, cls: Tensor) -> Tensor:
        x = torch.cat([cls.expand(2, -1, -1), patches(image, embed)], 1)
        q, k, v = parts_of(F.linear(x, qkv), how)
        return (x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 13, 8))[:, 0]

    inputs = torch.randn(2, 3, 8, 6), torch.randn(8, 3, 2, 2), torch.randn(24, 8), torch.randn(1, 1, 8)
    gm = mark_blocks(normalise(traced(cls_head, *inputs)))
    split = split_projections(gm)
    assert (calls(gm, aten.linear.default), calls(split, aten.linear.default)) == (1, 2), "q, and k and v together"
    propagate_shapes(split, "split_projections")
    torch.testing.assert_close(split(*inputs), cls_head(*inputs))
