"""Costs that depend on three levels of one stream: a bias that every block makes of its own tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtp_fx
from gtp_fx.errors import UnsupportedModelError
from gtp_fx.passes.reduce import remove_tokens as pass_module
from gtp_fx.plan.cost.chains import cost_model
from gtp_fx.plan.cost.terms import Term
from gtp_fx.plan.site import Site
from gtp_fx.targets.work import Work
from gtp_fx.types.axes import TokenAxis, TokenDomain
from gtp_fx.types.coercions import Coercions
from gtp_fx.types.grids import Grid

from support.tiny_vit import TinyViT, pictures


class Gated(nn.Module):
    """Attention whose bias is a map [B, 17, 17] of the tokens, padded over the CLS token."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.gates = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(y).chunk(3, -1))
        rows, columns = self.gates(y).chunk(2, -1)
        bias = F.pad((rows @ columns[:, 1:].transpose(1, 2)).sigmoid(), (1, 0))[:, None]
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return x + self.mlp(x)


@torch.no_grad()
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_the_budget_is_met_and_not_by_far(budget: float) -> None:
    model = TinyViT(Gated, depth=4)
    strategy = gtp_fx.GTP(neighbors=3)
    fast = gtp_fx.optimize(model, flops_budget=budget, strategy=strategy, example_inputs=pictures(), compile=False)
    assert 0.5 * budget < fast.report.flops_ratio <= budget
    x = pictures(3)
    assert 0 < (fast(x) - model(x)).norm() / model(x).norm() < 1


def test_a_term_of_three_levels_is_paid_where_its_site_removes_tokens() -> None:
    grid = Grid("g", (4,))
    sites = tuple(Site(block, TokenAxis(TokenDomain(grid, block)), 1, 1) for block in range(3))
    levels = [TokenDomain(grid, level) for level in (1, 2, 3)]
    # Recovering at site 0 (from level 1 to 0) a map whose other axis is at level 3.
    term = Term(
        frozenset((levels[0], levels[2])),
        lambda count: [Work("gather", count(levels[0]) * count(levels[2]))],
        site=0,
    )
    model = cost_model(sites, [term], lambda works: sum(w.flops for w in works), lambda _: np.zeros(1), 1, np.int64)
    assert model.cost((1, 0, 1)) == 3 * 2
    assert model.cost((1, 1, 1)) == 3 * 1
    assert model.cost((0, 1, 1)) == 0


def test_a_schedule_whose_sites_alone_leave_no_way_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """`find_sites` checks all sites together, and a plan uses some of them."""
    refused = gtp_fx.Refusal("blocks.1", "aten.add.Tensor", "places has no dimension for the images")
    monkeypatch.setattr(pass_module, "find_coercions", lambda _: Coercions((), (refused,)))
    with pytest.raises(UnsupportedModelError, match=r"by this schedule.*blocks\.1: aten\.add\.Tensor: places has no"):
        gtp_fx.optimize(TinyViT(), schedule=[3, 0], strategy=gtp_fx.GTP(neighbors=3), example_inputs=pictures())
