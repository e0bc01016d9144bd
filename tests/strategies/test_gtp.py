"""The optimised model is the method: equal to an eager reference written from it, on live weights.

Tolerances: the reference and the graph do the same float32 arithmetic in another order; over three blocks that was
2e-7 to 6e-7 of the largest logit. A wrong option (alpha, graph, scale, theta, score) moves logits by more than 1e-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import gtp_fx
from gtp_fx.ops.attention import SCORES

from support.captured import optimised, shared_model
from support.reference import gtp_reference
from support.zoo import BY_NAME, DEPTH, WITH_DEAD_TOKENS, Row, build, images, in_tiers, rows


def relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


@torch.no_grad()
def check(row: Row, schedule: Sequence[int], disabled_passes: Sequence[str] = (), **options: Any) -> None:
    model, x = shared_model(row), images(row)
    strategy: dict[str, Any] = {"token_scale": True}
    strategy |= {{"sparsity": "attention_sparsity"}.get(name, name): value for name, value in options.items()}
    fast = optimised(
        row, schedule=schedule, strategy=gtp_fx.GTP(**strategy), disabled_passes=disabled_passes
    ).graph_module
    wanted = gtp_reference(model, x, schedule=schedule, **options).logits_BV
    assert relative(fast(x), wanted) < 1e-5
    assert relative(model(x), wanted) > 1e-4, "a schedule that changes nothing proves nothing"


ALIKE = ("deit", "deit3", "no-classes", "clip-quickgelu", "dinov2", "siglip-gap", "reg1-gap", "reg4-gap")
"""Rows put together as another is, but for a width, an activation or a head."""


@rows("deit", "deit3", "vit-gap", by_default=("deit",))
@pytest.mark.parametrize(
    ("count", "sparsity", "graph", "alpha"),
    [(8, 1.0, "mixed", 0.1), (8, 0.6, "mixed", 0.3), (12, 1.0, "spatial", 0.2), (5, 0.8, "semantic", 0.4)],
)
def test_equals_the_reference(row: Row, count: int, sparsity: float, graph: str, alpha: float) -> None:
    check(row, [count] * DEPTH, sparsity=sparsity, graph=graph, alpha=alpha)


@rows(by_default=[name for name in BY_NAME if name not in ALIKE])
def test_every_architecture_equals_the_reference(row: Row) -> None:
    """A tenth of the patches leaves at the first block, none at the second, a fifth at the third."""
    check(row, [row.patches // 10, 0, row.patches // 5])


@pytest.mark.xdist_group("deit-distilled")
@pytest.mark.parametrize("score", list(SCORES))
def test_every_score_equals_the_reference(score: str) -> None:
    check(BY_NAME["deit-distilled"], [20, 20, 0], score=score)


@pytest.mark.xdist_group("vit")
@pytest.mark.parametrize(
    "disabled",
    in_tiers([[], WITH_DEAD_TOKENS], []),
    ids=["without dead tokens", "with dead tokens"],
)
@pytest.mark.parametrize("options", [{"token_scale": False}, {"neighbors": 3, "sparsity": 0.7}])
def test_options_equal_the_reference(disabled: list[str], options: dict[str, Any]) -> None:
    check(BY_NAME["vit"], [15, 15, 15], disabled, **options)


@torch.no_grad()
@rows(by_default=("vit", "siglip-map"))
def test_nothing_removed_is_the_original(row: Row) -> None:
    model, x = shared_model(row), images(row)
    wanted = model(x)
    for options in ({"flops_budget": 1.0}, {"schedule": [0] * DEPTH, "disabled_passes": WITH_DEAD_TOKENS}):
        fast = optimised(row, **options)
        assert relative(fast.graph_module(x), wanted) < 1e-5
        assert fast.schedule.removes_nothing


@torch.no_grad()
@rows("vit-gap", "reg4-gap", by_default=("vit-gap",))
def test_weighted_pooling_counts_a_token_for_those_it_stands_for(row: Row) -> None:
    """By hand on the reference's own last tokens; the paper's plain mean is another number."""
    model, x = shared_model(row), images(row)
    schedule = [20, 20, 20]
    plain, weighted = (
        optimised(row, schedule=schedule, strategy=gtp_fx.GTP(alpha=0.4, weighted_pooling=on)).graph_module(x)
        for on in (False, True)
    )
    reference = gtp_reference(model, x, schedule=schedule, alpha=0.4)
    assert relative(plain, reference.logits_BV) < 1e-5
    scale_BN1 = reference.scale_BN[:, row.prefix :, None]
    mean_BC = (reference.tokens_BNC[:, row.prefix :] * scale_BN1).sum(1) / scale_BN1.sum(1)
    assert relative(weighted, model.head(model.fc_norm(mean_BC))) < 1e-5
    assert relative(weighted, plain) > 1e-4


@torch.no_grad()
@pytest.mark.xdist_group("deit3")
def test_kept_tokens_are_the_references_and_ascending() -> None:
    """Read off the graph: the indices that `select` returns at each site, seen on the whole grid."""
    row = BY_NAME["deit3"]
    model, x = shared_model(row), images(row)
    schedule = [30, 30, 0]
    fast = optimised(row, schedule=schedule, strategy=gtp_fx.GTP.paper())
    kept: list[Tensor] = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.target is torch.ops.gtp_fx.select.default:
                kept.append(value[0])
            return value

    Watch(fast.graph_module).run(x)
    on_grid = kept[0]
    reference = gtp_reference(model, x, schedule=schedule)
    for site, indices in zip(reference.sites, [on_grid, on_grid.gather(1, kept[1])], strict=True):
        assert torch.equal(site.kept_BK, indices)
        assert bool((indices.diff(dim=1) > 0).all())


@torch.no_grad()
def test_bfloat16_follows_float32() -> None:
    """Eight bits of mantissa: logits of the original differ by about 1 % from float32, and of GTP by little more, since
    near-equal scores may change places. Half of the spread between two images would be 30 %."""
    row = BY_NAME["deit"]
    model, x = build(row), images(row)
    wanted = gtp_reference(model, x, schedule=[10, 10, 10]).logits_BV
    strategy = gtp_fx.GTP.paper()
    fast = gtp_fx.optimize(model.bfloat16(), schedule=[10, 10, 10], strategy=strategy, compile=False)
    low = fast(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert relative(low.float(), wanted) < 0.1
