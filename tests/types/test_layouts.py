"""Tokens painted with their places are where each family's windows have them by hand, and come back as they were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtp_fx.types.axes import Plain, TensorType
from gtp_fx.types.infer import infer_types
from gtp_fx.types.layouts import by_window, convert, image_layout

from support.captured import shared_model
from support.reference_windows import Parts
from support.window_families import Family, families_in_tiers
from support.window_graphs import branches, marked, on


def at_once(target: Any, *args: Any) -> Any:
    """What `convert` is to call instead of inserting it into a graph."""
    return target(*args)


def painted(parts: Parts) -> Tensor:
    """[2, N, 3]: each token's row and column on the image and the image's number, from 1 on, since padding is 0."""
    images = torch.arange(1, 3)[:, None, None]
    tokens = torch.cat(
        [parts.windows.places_NR.expand(2, -1, -1) + 1, images.expand(2, len(parts.windows.places_NR), 1)], dim=2
    )
    return tokens.float()


@families_in_tiers
@torch.no_grad()
def test_tokens_painted_with_their_places_are_found_again(family: Family) -> None:
    """There by window, in the order that the family's own windows have by hand, and back as they were."""
    model = shared_model(family)
    gm = marked(family)
    typing = infer_types(gm.graph)
    walk = on(family, model, dict.fromkeys(family.branched, 0))
    walk(family.inputs())
    found = branches(gm)
    for branch, parts in zip(found, walk.seen.values(), strict=True):
        windows = parts.windows
        tokens = painted(parts)
        by_hand = windows.of(tokens).flatten(0, 1)
        assert (branch.windows, branch.tokens) == tuple(windows.index_Wn.shape)
        for node in (node for part in branch.parts for node in (*part.entries, part.result)):
            kind: TensorType = typing.type(node)
            own = tokens.reshape(2, *node.meta["val"].shape[1:-1], 3)
            region: TensorType = (*branch.region, (Plain(3),))
            rows = convert(at_once, own, (*kind[:-1], (Plain(3),)), region)
            assert torch.equal(rows, by_hand)
            assert torch.equal(convert(at_once, rows, region, (*kind[:-1], (Plain(3),))), own)
        image = image_layout(branch.region)
        places = torch.ops.gtp_fx.grid_places([axis[0].whole_size for axis in image[1:]], tokens)
        arranged = convert(at_once, places + 1, (*image, (Plain(2),)), by_window(branch.region, (Plain(2),)))
        assert torch.equal(arranged, by_hand[: branch.windows, :, :2].long())
