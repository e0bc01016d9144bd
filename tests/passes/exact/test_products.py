"""Products in one form: einsum as matmul, projections of the same tokens as one; and graphs that stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.ops import aten
from torch.utils.flop_counter import FlopCounterMode

from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.fuse_projections import fuse_projections
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.targets import target_named

from support.graphs_by_hand import calls, traced


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def spelled(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("equation", "a", "b"),
    [
        ("bhid,bhjd->bhij", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("bhij,bhjd->bhid", (2, 3, 5, 6), (2, 3, 6, 4)),
        ("bihd,bjhd->bhij", (2, 5, 3, 4), (2, 6, 3, 4)),
        ("bhij,bjhd->bihd", (2, 3, 5, 6), (2, 6, 3, 4)),
        ("ij,jk->ik", (5, 4), (4, 6)),
        ("ij,jk->ki", (5, 4), (4, 6)),
        ("...id,...jd->...ij", (2, 3, 5, 4), (2, 3, 6, 4)),
        ("bhid,bjd->bhij", (2, 3, 5, 4), (2, 6, 4)),  # one key head for all
        ("bhij,bjd->bihd", (2, 3, 5, 6), (2, 6, 4)),
        ("dj,id", (4, 5), (6, 4)),
    ],
)
def test_an_einsum_that_is_a_matrix_product_becomes_one(equation: str, a: tuple[int, ...], b: tuple[int, ...]) -> None:
    gm = traced(lambda x, y: torch.einsum(equation, x, y), noise(*a), noise(*b))
    assert calls(gm, aten.einsum.default) == 1
    product = einsum_to_matmul(gm)
    assert (calls(product, aten.einsum.default), calls(product, aten.matmul.default)) == (0, 1)
    torch.testing.assert_close(product(noise(*a), noise(*b)), gm(noise(*a), noise(*b)))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),  # two rows' labels: a decomposed relative position
        ("bhij,hg->bgij", [(2, 3, 4, 4), (3, 3)]),  # heads mixed: three free labels
        ("bnc->bcn", [(2, 3, 4)]),
        ("bi,bi->b", [(2, 3), (2, 3)]),
        ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)]),
        ("bij,bjk->bik", [(1, 3, 4), (2, 4, 5)]),  # broadcast
        ("...ij,...jk->...ik", [(1, 2, 3, 4), (2, 4, 5)]),
    ],
)
def test_an_einsum_that_is_something_else_stays(equation: str, shapes: list[tuple[int, ...]]) -> None:
    gm = traced(lambda *tensors: torch.einsum(equation, *tensors), *(noise(*shape) for shape in shapes))
    assert spelled(einsum_to_matmul(gm)) == spelled(gm)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),
        ("bhij,hg->bgij", [(2, 3, 4, 4), (3, 3)]),
        ("bnc->bcn", [(2, 3, 4)]),
    ],
)
def test_flops_of_an_einsum_are_the_counters(equation: str, shapes: list[tuple[int, ...]]) -> None:
    tensors = [noise(*shape) for shape in shapes]
    gm = traced(lambda *operands: torch.einsum(equation, *operands), *tensors)
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *tensors)
    assert count_flops(gm.graph) == counter.get_total_flops()


X, Q, K, V, BIAS = noise(2, 40, 8), noise(8, 8), noise(6, 8), noise(4, 8), noise(8)


def projected(x: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Separate projections, of which one has a bias, as BEiT's keys have none."""
    return torch.cat([F.linear(x, q, bias) * 2.0, F.linear(x, k), F.linear(x, v).relu()], dim=-1)


def test_projections_of_the_same_tokens_become_one_product_on_a_gpu() -> None:
    """One sum in another order at most: within float32's rounding."""
    gm = traced(projected, X, Q, K, V, BIAS)
    assert spelled(fuse_projections(gm, target_named("cpu"))) == spelled(gm), "on a CPU that costs time"
    fused = fuse_projections(gm, target_named("h100"))
    assert calls(fused, aten.linear.default) == 1
    propagate_shapes(fused, after="fuse_projections")
    assert count_flops(fused.graph) == count_flops(gm.graph)
    torch.testing.assert_close(fused(X, Q, K, V, BIAS), gm(X, Q, K, V, BIAS))
    other = [tensor + 1 for tensor in (X, Q, K, V, BIAS)]
    torch.testing.assert_close(fused(*other), gm(*other), msg="weights are read at every call")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, q, k, v, bias: F.linear(x, q, bias),
        lambda x, q, k, v, bias: F.linear(x * 2.0, q) + F.linear(x, q),
        lambda x, q, k, v, bias: F.linear(x[:, :1], q) + F.linear(x[:, :1], q),
        lambda x, q, k, v, bias: F.linear(x, q * 2.0) + F.linear(x, q),
    ],
    ids=["one alone", "of other tokens", "of too few", "of a weight that is computed"],
)
def test_other_projections_stay(function: Callable[..., Tensor]) -> None:
    gm = traced(function, X, Q, K, V, BIAS)
    assert spelled(fuse_projections(gm)) == spelled(gm)


@torch.no_grad()
@pytest.mark.parametrize("view", [lambda x: x.flatten(1), lambda x: x.unflatten(2, (2, 4)), lambda x: x.view(2, 320)])
def test_views_have_one_spelling(view: Callable[[Tensor], Tensor]) -> None:
    gm = normalise(traced(view, X))
    assert spelled(gm) == ["aten.reshape.default"]
    assert torch.equal(gm(X), view(X))


def test_attention_that_nothing_reads_is_gone_unless_it_draws_random_numbers() -> None:
    def dead(x: Tensor, dropout: float) -> Tensor:
        F.scaled_dot_product_attention(x, x, x, dropout_p=dropout)
        return x * 2.0

    for dropout, left in ((0.0, 0), (0.5, 1)):
        gm = normalise(traced(partial(dead, dropout=dropout), X))
        assert calls(gm, aten.scaled_dot_product_attention.default) == left


def test_an_einsum_that_adds_nothing_up_stays() -> None:
    """Over one key torch multiplies entry by entry, which counts no FLOPs: a product would count more than before."""
    x, y = torch.randn(2, 5, 1), torch.randn(2, 1, 4)
    gm = normalise(traced(lambda x, y: torch.einsum("bij,bjd->bid", x, y), x, y))
    assert calls(einsum_to_matmul(gm), aten.einsum.default) == 1
