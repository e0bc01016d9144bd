"""Where on the image the tokens are that skip a branch: rolled, padded, pooled."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

import gtp_fx
from gtp_fx.report.draw_token_flow import draw_token_flow
from gtp_fx.report.token_flow import SkipView, token_flow

from support.reference import select
from support.reference_windows import Parts
from support.window_families import HIERA, PADDED, SWIN, TORCHVISION, TWINS, Family, families
from support.window_graphs import on


def skipping_by_hand(parts: Parts, count: int) -> list[int]:
    """Of the first image, numbers on the grid."""
    found = []
    for index_n, score_n in zip(parts.windows.index_Wn, parts.score_BWn[0], strict=True):
        score_n = torch.where(index_n < 0, -1.0 - torch.arange(len(index_n)), score_n)
        left_1P = select(score_n[None], count)[1]
        found.append(index_n[left_1P[0]])
    left = torch.cat(found)
    places_NR = parts.windows.places_NR
    numbers_N = places_NR[:, 0] * (int(places_NR[:, 1].max()) + 1) + places_NR[:, 1]
    return sorted(numbers_N[left[left >= 0]].tolist())


@families(SWIN, PADDED, TORCHVISION, HIERA, TWINS, by_default=(SWIN,))
@torch.no_grad()
def test_journeys_say_which_patches_skip(family: Family, tmp_path: Path) -> None:
    """Rolled, padded, pooled: where on the image a window's tokens are, and padding is nowhere."""
    model, x = family.model(), family.inputs(batch=1)
    fast = gtp_fx.optimize(
        model, schedule=family.schedule, strategy="gtp", example_inputs=family.inputs(), compile=False
    )
    views = token_flow(fast.graph_module, fast.sites, fast.report.sites, x)
    skipping = {name: family.blocks[name] for name in family.branched}
    hand = on(family, model, skipping, mean=0.0)
    hand(x)
    for view, (name, count) in zip(views, skipping.items(), strict=True):
        assert isinstance(view, SkipView) and view.layer.startswith(name)
        assert view.skipped.tolist() == skipping_by_hand(hand.seen[name], count), name
    draw_token_flow(views, torch.rand(*family.shape[1:], 3), family.name, tmp_path / "skips.png")
    assert Image.open(tmp_path / "skips.png").width > 1000
    assert json.loads(json.dumps(views[0].to_dict()))["skipped"] == views[0].skipped.tolist()
