"""Which patches a token stands for: the matrix, its row sums, and labels carried along by it."""

from __future__ import annotations

import copy
import io

import pytest
import torch

import gtp_fx

from support import hf_models
from support.captured import optimised, provenance, shared_model
from support.reference import gtp_reference
from support.zoo import BY_NAME, Row, build, images, in_tiers, rows


@torch.no_grad()
@rows("deit", "dinov2-reg4", "vit-gap", by_default=("dinov2-reg4", "vit-gap"))
def test_row_sums_are_the_token_scales_and_the_order_is_the_grids(row: Row) -> None:
    model, x = shared_model(row), images(row)
    schedule = [row.patches // 5, row.patches // 5, 0]
    fast = optimised(row, schedule=schedule, strategy=gtp_fx.GTP(alpha=0.3))
    (found,) = provenance(fast, x)
    reference = gtp_reference(model, x, schedule=schedule, alpha=0.3)
    left = row.patches - sum(schedule)
    assert found.grid == row.grid
    assert found.matrix.shape == (len(x), left, row.patches)
    assert torch.equal(found.index, reference.sites[-1].kept_BK)
    torch.testing.assert_close(found.matrix.sum(-1), reference.scale_BN[:, row.prefix :])
    assert bool((found.matrix.sum(-1) > 1 + 1e-4).any()), "tokens that leave are received by somebody"


@torch.no_grad()
@pytest.mark.xdist_group("deit")
def test_the_matrix_carries_what_belongs_to_patches() -> None:
    """A token that stays stands for itself by 1; no token that is left stands for another that is."""
    row = BY_NAME["deit"]
    (found,) = provenance(optimised(row, schedule=[60, 0, 0], strategy="gtp"), images(row))
    carried = found.matrix @ torch.eye(row.patches)
    assert torch.equal(carried.argmax(-1), found.index)
    among_the_left = found.matrix.gather(2, found.index[:, None].expand(-1, found.index.shape[1], -1))
    torch.testing.assert_close(among_the_left, torch.eye(found.index.shape[1]).expand_as(among_the_left))


@torch.no_grad()
def test_nothing_removed_has_no_streams_to_tell_of() -> None:
    row = BY_NAME["deit"]
    assert gtp_fx.optimize(build(row), flops_budget=1.0, compile=False).provenance(images(row)) == ()


@torch.no_grad()
@pytest.mark.parametrize("strategy", in_tiers(["gtp", "tome", "idle"], "tome", "idle"))
def test_a_copy_and_a_saved_model_tell_the_same(strategy: str) -> None:
    row = BY_NAME["deit"]
    x = images(row)
    fast = gtp_fx.optimize(build(row), schedule=[60, 30, 0], strategy=strategy, compile=False)
    (wanted,) = fast.provenance(x)
    saved = io.BytesIO()
    torch.save(fast, saved)
    saved.seek(0)
    for other in (copy.deepcopy(fast), torch.load(saved, weights_only=False)):
        (found,) = other.provenance(x)
        assert found.grid == wanted.grid
        assert torch.equal(found.matrix, wanted.matrix) and torch.equal(found.index, wanted.index)


@torch.no_grad()
def test_outputs_and_provenance_come_from_one_run() -> None:
    """Of the map that comes back, what is at `index` are the tokens that were left: the others are made up."""
    fast = gtp_fx.optimize(hf_models.build("dinov2"), flops_budget=0.6, compile=False)
    given = hf_models.inputs("dinov2", batch=3)
    found, (patches,) = fast.with_provenance(**given)
    wanted, (alone,) = fast(**given), fast.provenance(**given)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state)
    torch.testing.assert_close(patches.matrix, alone.matrix)
    assert torch.equal(patches.index, alone.index)
    assert patches.index.shape[1] < 64 == found.last_hidden_state.shape[1] - 1
