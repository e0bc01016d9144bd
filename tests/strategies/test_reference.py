"""The reference itself, against what needs no GTP: the models' own forward, and arithmetic done by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor

from support.captured import shared_model
from support.reference import (
    adjacency,
    gtp_reference,
    normalise,
    propagate,
    select,
    semantic,
    sparsify,
    spatial,
    token_scores,
)
from support.zoo import BY_NAME, DEPTH, Row, build, images, rows


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@rows()
@torch.no_grad()
def test_nothing_propagated_is_the_model_itself(row: Row) -> None:
    model, x_BCHW = shared_model(row), images(row)
    assert (model.num_prefix_tokens, model.patch_embed.grid_size) == (row.prefix, row.grid)
    result = gtp_reference(model, x_BCHW, schedule=[0] * DEPTH)
    assert result.sites == ()
    assert relative_error(result.logits_BV, model(x_BCHW)) < 1e-5


@rows()
@torch.no_grad()
def test_sites_shorten_the_sequence_and_keep_the_order_of_the_grid(row: Row) -> None:
    model, x_BCHW = shared_model(row), images(row)
    result = gtp_reference(model, x_BCHW, schedule=[7, 0, 5])
    first, second = result.sites
    assert (first.block, second.block) == (0, 2)
    assert first.kept_BK.shape == (2, row.patches - 7) and second.kept_BK.shape == (2, row.patches - 12)
    assert result.scale_BN.shape == (2, row.tokens - 12)
    assert (result.scale_BN[:, : row.prefix] == 1).all() and (result.scale_BN >= 1).all()
    for site in result.sites:
        assert (site.kept_BK.diff(dim=1) > 0).all()
    for before, after in zip(first.kept_BK, second.kept_BK, strict=True):
        assert torch.isin(after, before).all()
    assert relative_error(result.logits_BV, model(x_BCHW)) > 1e-3, "propagation must show in the outputs"


def test_spatial_graph_on_a_grid_that_is_not_square() -> None:
    height, width = 3, 5
    places = list(itertools.product(range(height), range(width)))
    edges = spatial((height, width))
    for (i, (row_i, column_i)), (j, (row_j, column_j)) in itertools.product(enumerate(places), repeat=2):
        touching = abs(row_i - row_j) <= 1 and abs(column_i - column_j) <= 1 and i != j
        assert edges[i, j] == touching
    assert edges.sum(dim=1).tolist() == [3, 5, 5, 5, 3, 5, 8, 8, 8, 5, 3, 5, 5, 5, 3]


def test_semantic_graph_is_directed_and_knows_no_length() -> None:
    """Directions of 0°, 10°, 30° and 90°, of any length: the last looks at 30°, which does not look back."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 30.0, 90.0]))
    points = torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([[1.0], [9.0], [2.0], [5.0]])
    edges = semantic(points[None], neighbors=1)[0]
    assert edges.nonzero().tolist() == [[0, 1], [1, 0], [2, 1], [3, 2]]

    mixed = adjacency(points[None], (1, 4), "mixed", neighbors=1)[0]
    assert mixed.nonzero().tolist() == [[0, 1], [1, 0], [1, 2], [2, 1], [2, 3], [3, 2]]


def test_normalised_by_row_degrees() -> None:
    path = torch.tensor([[[0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]], dtype=torch.bool)
    half = 2**-0.5  # degrees 1, 2, 1 and a lone token, whose row must be 0 and not inf
    expected = torch.tensor([[[0, half, 0, 0], [half, 0, half, 0], [0, half, 0, 0], [0, 0, 0, 0]]])
    torch.testing.assert_close(normalise(path, torch.float32), expected)


def test_propagation_and_token_scales_on_a_2x2_grid() -> None:
    """Every patch touches the three others: degree 3, so Â = 1/3 off the diagonal. A class token leads."""
    weights = normalise(spatial((2, 2))[None], torch.float32)
    x_BNC = torch.tensor([[[100.0, 0.0], [1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [6.0, 60.0]]])
    kept, left = torch.tensor([[0, 2]]), torch.tensor([[1, 3]])
    short = propagate(x_BNC, kept, left, torch.arange(4)[None], weights, alpha=0.3, prefix=1)
    # Patches 1 and 3 sum to (8, 80); a third of it times 0.3 is (0.8, 8).
    torch.testing.assert_close(short, torch.tensor([[[100.0, 0.0], [1.8, 18.0], [3.8, 38.0]]]))

    ones = torch.ones(1, 5, 1)
    scale = propagate(ones, kept, left, torch.arange(4)[None], weights, alpha=0.3, prefix=1)
    torch.testing.assert_close(scale[0, :, 0], torch.tensor([1.0, 1.2, 1.2]))


def test_a_later_site_still_speaks_of_the_whole_grid() -> None:
    """A row of four; patch 1 has left. Now 3, the third present, leaves to 2, whose degree is still 2."""
    weights = normalise(spatial((1, 4))[None], torch.float32)
    scale = torch.tensor([[[1.1], [1.2], [1.0]]])
    present, kept, left = torch.tensor([[0, 2, 3]]), torch.tensor([[0, 1]]), torch.tensor([[2]])
    short = propagate(scale, kept, left, present, weights, alpha=0.4, prefix=0)
    torch.testing.assert_close(short[0, :, 0], torch.tensor([1.1, 1.2 + 0.4 * 2**-0.5]))


def test_scores_by_hand() -> None:
    """Two heads over a class token and two patches; rows are queries."""
    attn_BHNN = torch.tensor(
        [
            [
                [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]],
                [[0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]],
            ]
        ]
    )
    expected = {
        "regenerate-max": [0.6, 0.4],
        "regenerate-mean": [0.4, 0.3],
        "broadcast-max": [1.5, 1.3],
        "broadcast-mean": [1.05, 1.05],
        "mixed-max": [0.6 * 1.5, 0.4 * 1.3],  # each maximum over heads by itself
        "mixed-mean": [0.4 * 1.05, 0.3 * 1.05],
        "cls-max": [0.5, 0.3],
        "cls-mean": [0.3, 0.3],
    }
    for score, values in expected.items():
        torch.testing.assert_close(token_scores(attn_BHNN, 1, score), torch.tensor([values]))


def test_selection_keeps_the_highest_and_the_earlier_of_equals() -> None:
    kept, left, gap = select(torch.tensor([[0.5, 0.1, 0.4, 0.2], [0.3, 0.0, 0.0, 0.0]]), 2)
    assert kept.tolist() == [[0, 2], [0, 1]] and left.tolist() == [[1, 3], [2, 3]]
    torch.testing.assert_close(gap, torch.tensor([0.5, 0.0]))


def test_sparsification_cuts_each_map_by_itself() -> None:
    first = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    maps = torch.stack([first, 10 * first])[None]
    assert sparsify(maps, 1.0) is maps
    assert sparsify(maps, 0.8) is maps, "int(4·0.2) = 0: there is no 0-th smallest"
    cut = torch.tensor([[0.0, 0.0], [0.3, 0.4]])  # k = 3: the third smallest itself stays
    torch.testing.assert_close(sparsify(maps, 0.25), torch.stack([cut, 10 * cut])[None])


@torch.no_grad()
def test_token_scales_reach_the_attention_pool() -> None:
    """Tokens leave in the last block only, so no attention but the head's can see their scales."""
    row = BY_NAME["siglip-map"]
    model, x_BCHW = build(row), images(row)
    last = [0] * (DEPTH - 1) + [90]
    seen, unseen = (
        gtp_reference(model, x_BCHW, schedule=last, alpha=0.4, token_scale=flag).logits_BV for flag in (True, False)
    )
    assert relative_error(unseen, seen) > 1e-4


def test_refuses_what_it_does_not_know() -> None:
    row = BY_NAME["siglip-gap"]
    model, x_BCHW = build(row), images(row)
    with pytest.raises(ValueError, match="3 counts"):
        gtp_reference(model, x_BCHW, schedule=[1, 1])
    with pytest.raises(ValueError, match="leave one of 196"):
        gtp_reference(model, x_BCHW, schedule=[100, 96, 0])
    with pytest.raises(ValueError, match="no class token"):
        gtp_reference(model, x_BCHW, schedule=[1, 1, 1], score="cls-max")
    with pytest.raises(ValueError, match="spectral"):
        gtp_reference(model, x_BCHW, schedule=[1, 1, 1], graph="spectral")
    parallel = VisionTransformer(embed_dim=64, depth=1, num_heads=1, block_fn=ParallelScalingBlock).eval()
    with pytest.raises(TypeError, match="ParallelScalingBlock"):
        gtp_reference(parallel, x_BCHW, schedule=[1])
