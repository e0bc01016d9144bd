"""Branch placement against the same by hand, on families whose blocks attend within windows, or to pooled keys.

Grids are no squares wherever the library takes that. Every block that can has tokens skip its branch, so that a block
sees what those before it made of theirs. Tolerance: the two do the same float32 arithmetic in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx
from bench.live_weights import enliven
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.passes.reduce.skip_branches import skip_branches

from support.captured import optimised, shared_model
from support.window_families import (
    FAMILIES,
    PADDED,
    SAM,
    SWIN,
    TORCHVISION,
    Family,
    every_family,
    families,
    families_in_tiers,
)
from support.window_graphs import RECOVER, Skips, error, marked, on, tensors
from support.zoo import in_tiers


@every_family
@torch.no_grad()
def test_blocks_by_hand_where_no_token_skips_are_the_model(family: Family) -> None:
    model, x = shared_model(family), family.inputs()
    assert error(on(family, model, dict.fromkeys(family.blocks, 0))(x), model(x)) < 1e-5


@families_in_tiers
@torch.no_grad()
def test_equals_the_branch_by_hand(family: Family) -> None:
    check(family)


def check(family: Family) -> None:
    """On another batch than it was captured with."""
    model, x = shared_model(family), family.inputs(batch=3)
    fast = optimised(family, schedule=family.schedule, strategy=RECOVER)
    assert [row.removed for row in fast.report.sites] == [n for n in family.schedule if n]
    assert all(row.windows for row in fast.report.sites)
    wanted = on(family, model, family.blocks)(x)
    assert error(fast.graph_module(x), wanted) < 1e-5
    assert error(model(x), wanted) > 1e-4, "a schedule that changes nothing proves nothing"


@pytest.mark.parametrize(
    ("family", "blocks"),
    [
        pytest.param(
            TORCHVISION,
            {"features.1.1": 40},
            marks=[pytest.mark.xdist_group(TORCHVISION.name), pytest.mark.nightly],
        ),
        pytest.param(
            PADDED, {"layers.0.blocks.1": 41}, marks=[pytest.mark.xdist_group(PADDED.name), pytest.mark.nightly]
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
@torch.no_grad()
def test_padding_is_nobodys_neighbour(family: Family, blocks: dict[str, int]) -> None:
    check(replace(family, blocks={**dict.fromkeys(family.blocks, 0), **blocks}))


@torch.no_grad()
@families(SWIN, SAM, by_default=(SWIN,))
def test_idle_tokens_keep_the_residual_alone(family: Family) -> None:
    model, x = shared_model(family), family.inputs()
    idle = optimised(family, schedule=family.schedule, strategy="gtp").graph_module
    assert error(idle(x), on(family, model, family.blocks, mean=0.0)(x)) < 1e-5
    assert error(idle(x), on(family, model, family.blocks)(x)) > 1e-4


@torch.no_grad()
@families(*FAMILIES, by_default=(SWIN, PADDED))
def test_tokens_that_skip_get_a_share_of_their_windows_mean(family: Family) -> None:
    """Of its patches' mean: padding, and tokens that are no patches, aren't in it."""
    model, x = shared_model(family), family.inputs(batch=3)
    strategy = gtp_fx.strategies.Regeneration(score="mixed-max", branch_mean=0.75, windows="skip")
    fast = optimised(family, schedule=family.schedule, strategy=strategy).graph_module
    assert error(fast(x), on(family, model, family.blocks, mean=0.75)(x)) < 1e-5
    assert error(fast(x), on(family, model, family.blocks, mean=0.0)(x)) > 1e-4


@families(*FAMILIES, by_default=(SWIN,))
@torch.no_grad()
def test_recovering_nothing_everywhere_is_the_original(family: Family) -> None:
    """All that branch placement inserts, and no token skips: the numbers are the model's."""
    model, x = shared_model(family), family.inputs(batch=3)
    gm = marked(family)
    indices = [block.index for block in typed_graph(gm.graph).blocks if block.branch is not None]
    plan: Any = Skips(dict.fromkeys(indices, 0), gtp_fx.GTP(branch="recover"))
    whole = skip_branches(gm, plan)
    recovers = [node for node in whole.graph.nodes if node.target is torch.ops.gtp_fx.recover.default]
    assert len(recovers) == len(indices) == len(family.branched)
    made, wanted = whole(x), tensors(model(x))
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, Tensor)]
    for a, b in zip(leaves, wanted, strict=True):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-5


class Copies(nn.Module):
    """A timm Swin whose branches return the token itself, and whose attention returns nothing."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.stages = model.layers
        for block in (block for stage in model.layers for block in stage.blocks):
            block.norm2 = nn.Identity()
            block.mlp = nn.Linear(block.dim, block.dim, bias=False)
            block.mlp.weight.copy_(torch.eye(block.dim))
            block.attn.proj.weight.zero_()
            block.attn.proj.bias.zero_()
        self.embed = nn.Conv2d(block.dim, block.dim, 1, bias=False)
        self.embed.weight.copy_(torch.eye(block.dim)[:, :, None, None])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BHWC = self.embed(x_BCHW).permute(0, 2, 3, 1)
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        return x_BHWC


@torch.no_grad()
@pytest.mark.parametrize("block", in_tiers([0, 1], 0))
def test_places_in_the_tokens_come_out_where_they_went_in(block: int) -> None:
    """Two blocks of Swin on 14 x 21, the second rolled. A branch returns each token its own place as output; a skipping
    token gets its neighbours'."""
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2,), num_heads=(2,), embed_dim=32
    )
    model = Copies(enliven(swin)).eval()
    places_HWR = torch.cartesian_prod(torch.arange(14), torch.arange(21)).reshape(14, 21, 2).float()
    x = torch.randn(2, 32, 14, 21, generator=torch.Generator().manual_seed(0))
    x[:, :2] = places_HWR.permute(2, 0, 1)
    whole = model(x)
    assert torch.equal(whole[..., :2], 4 * places_HWR.expand(2, -1, -1, -1)), "each block doubles what it is given"
    schedule = [0, 0]
    schedule[block] = 24
    found = gtp_fx.optimize(model, schedule=schedule, strategy=RECOVER, example_inputs=x, compile=False)(x)[..., :2]
    kept = (found == 4 * places_HWR).all(-1)
    # The other block doubles as well, and this one adds the branch to what there was: place + result.
    result = (found / 2 - places_HWR).sub(places_HWR).abs().amax(-1)
    assert (result[~kept] <= 1.0 + 1e-5).float().mean() > 0.9, "all but those without a neighbour that stays"
    assert kept.sum() >= 2 * 6 * 25
    assert (~kept).sum() > 2 * 6 * 12, "a mean of neighbours may be its own place, but seldom is"


@pytest.mark.xdist_group("swin")
@pytest.mark.parametrize(("block", "count"), in_tiers([(0, 49), (1, 60)], (0, 49)))
def test_a_window_keeps_a_token(block: int, count: int) -> None:
    schedule = [0, 0, 0]
    schedule[block] = count
    with pytest.raises(gtp_fx.ScheduleError, match="at least one has to stay"):
        optimised(SWIN, schedule=schedule)
