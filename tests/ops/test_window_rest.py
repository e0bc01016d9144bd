"""Operators of resting windows against loops."""

from __future__ import annotations

import torch
from torch.ops import gtp_fx as ops

import gtp_fx.ops

assert gtp_fx.ops, "it registers the operators"


def test_activity_and_the_way_out_and_back() -> None:
    rows = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))  # two images of three windows
    activity = ops.window_activity(rows, 3)
    apart = [sum((token - window.mean(0)).norm() for token in window) / 4 for window in rows]
    torch.testing.assert_close(activity, torch.tensor(apart).view(2, 3))
    awake, resting = ops.select(torch.tensor([[0.3, 0.1, 0.2], [0.1, 0.2, 0.3]]), 1)
    assert awake.tolist() == [[0, 2], [1, 2]] and resting.tolist() == [[1], [0]]
    assert ops.awake_rows(awake, 3).tolist() == [0, 2, 4, 5]
    assert ops.window_ranks(awake, 3).tolist() == [0, -1, 1, -1, 2, 3]


def test_activity_of_half_precision_is_summed_in_float32() -> None:
    rows = torch.tensor([300.0, -300.0], dtype=torch.float16).expand(3, 2).T[None]  # its squares are beyond float16
    assert ops.window_activity(rows, 1).dtype == torch.float32
    torch.testing.assert_close(ops.window_activity(rows, 1), torch.tensor([[300.0 * 3**0.5]]))


def test_padded_windows_out_and_back() -> None:
    """Four windows of two places over six patches: of the two without padding one rests, and the others are awake."""
    # Windows 0 to 3 hold the patches 0 and 1, 2 and padding, 3 and 4, padding and 5.
    whole, edge = torch.tensor([[0, 1], [3, 4]]), torch.tensor([2, 5])
    stream = torch.arange(12.0).reshape(2, 6, 1)
    assert ops.windows_without_padding(stream, whole)[..., 0].tolist() == [[0, 1], [3, 4], [6, 7], [9, 10]]
    kept, _ = ops.select(torch.tensor([[0.1, 0.2], [0.2, 0.1]]), 1)
    awake = ops.awake_of_padded(kept, torch.tensor([0, 2]), torch.tensor([1, 3]))
    assert awake.tolist() == [[2, 1, 3], [0, 1, 3]]
    patches = ops.awake_patches(kept, whole, edge)
    assert patches.tolist() == [[3, 4, 2, 5], [0, 1, 2, 5]]
    values = patches[..., None].float() + 1
    padded = ops.pad_windows(values, torch.tensor([0, 1, 2, -1, -1, 3]), 2)
    assert padded[..., 0].tolist() == [[4, 5], [3, 0], [0, 6], [1, 2], [3, 0], [0, 6]]
    assert torch.equal(ops.crop_windows(padded, torch.tensor([0, 1, 2, 5]), 3), values)


def test_activity_of_tokens_is_their_distance_from_the_mean_of_patches() -> None:
    rows = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))  # two images of two windows
    patch = torch.tensor([[True, True, False], [True, True, True]])
    wanted = torch.stack([(row - row[patch[i % 2]].mean(0)).norm(dim=-1) for i, row in enumerate(rows)])
    torch.testing.assert_close(ops.token_activity(rows, patch), wanted)
    torch.testing.assert_close(ops.token_activity(rows)[1::2], wanted[1::2])


def test_cells_are_pooled_and_weighed_by_their_places_and_know_their_tokens() -> None:
    members = torch.tensor([[0, 1], [2, -1]])
    rows = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([rows[:, :2].mean(1), rows[:, 2]], 1)
    torch.testing.assert_close(ops.pool_cells(rows, members), wanted)
    assert ops.pool_cells(torch.full((1, 3, 1), 6e4).half(), members).flatten().tolist() == [6e4, 6e4]
    queries = torch.randn(1, 1, 2, 4)
    log = torch.tensor([2.0, 1.0]).log()
    torch.testing.assert_close(ops.cell_bias(members, queries), log.view(1, 1, 1, 2))
    torch.testing.assert_close(ops.cell_bias(members, queries, torch.ones(2, 2)), 1 + log.expand(2, 2))
    hidden = torch.tensor([[True, False], [True, True]])
    assert ops.cell_bias(members, queries, hidden).isinf().tolist() == (~hidden).tolist()
    # Two images of two windows of three tokens: the second window of the first image rests, and the first of the other.
    rank, window, cell = (
        torch.tensor([-1, 0, 1, -1]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
        torch.tensor([0, 0, 1, 0, 0, 1]),
    )
    numbers = ops.cell_numbers(rank, window, cell, torch.arange(6), 2, 2, [2, 3]).view(2, 6)
    assert numbers[0, 3:].tolist() == [0, 0, 1] and numbers[1, :3].tolist() == [2, 2, 3]
