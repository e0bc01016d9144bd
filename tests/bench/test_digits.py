"""Benches of small nets: canvases are deterministic, splits share no digit, nets train and reload from the cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import gtp_fx
from bench import digit_nets
from bench.digit_nets import NETS, NetConfig, build, cache_folder, load_or_train, train
from bench.digits import CLASSES, Look, Split, canvases, digit_indices, patch_labels
from bench.scenes import CELL, scenes, texture
from bench.sheet import draw_sheet
from bench.tasks import TASKS, outputs_of

TINY = NetConfig(
    look=Look(side=32, pieces=2, strokes=1), width=16, depth=2, heads=2, close_ups=1, close_up=24, steps=1, batch=4
)


def test_canvases_are_the_same_for_the_same_seed() -> None:
    images, labels = canvases(Split.test, 3, 8)
    again, labels_again = canvases(Split.test, 3, 8)
    others, _ = canvases(Split.test, 4, 8)
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, others)
    assert images.shape == (8, 1, 64, 64) and images.dtype == torch.float32
    assert labels.min() >= 0 and labels.max() < CLASSES


def test_splits_share_no_digit() -> None:
    for one, other in combinations(Split, 2):
        assert not set(digit_indices(one).tolist()) & set(digit_indices(other).tolist())
    assert sum(len(digit_indices(split)) for split in Split) == 1797


def test_a_digit_stands_whole_in_its_place() -> None:
    bare = Look(side=24, smallest=20, largest=20, pieces=0, strokes=0, noise=0, jitter=0)
    images, _ = canvases(Split.train, 0, 4, bare)
    background = images.amin()
    assert (images[..., 20:, :] == background).all() and (images[..., 20:] == background).all()
    assert (images[..., :20, :20].flatten(1).amax(dim=1) > 2).all()


def test_clutter_without_room_is_left_out() -> None:
    full = Look(side=24, smallest=20, largest=20, noise=0, jitter=0)
    bare = replace(full, pieces=0, strokes=0)
    assert torch.equal(canvases(Split.train, 0, 1, full)[0], canvases(Split.train, 0, 1, bare)[0])
    with pytest.raises(ValueError, match="too small"):
        Look(side=20)


@pytest.mark.nightly
@pytest.mark.parametrize("class_token", [True, False])
def test_training_is_the_same_for_the_same_seed(class_token: bool) -> None:
    config = replace(TINY, class_token=class_token)
    images, labels = canvases(Split.test, 0, 8, config.look)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = train(config, 1, lambda _, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    expected = outputs_of(first, images, batch=3)
    assert expected.shape == (8, CLASSES) and 0 <= TASKS["digits"].score(expected, labels) <= 1
    assert torch.equal(expected, outputs_of(train(config, 1), images, batch=3))
    assert not torch.equal(expected, outputs_of(train(config, 2), images, batch=3))


@pytest.mark.nightly
def test_a_trained_net_comes_back_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, _ = canvases(Split.test, 0, 4, TINY.look)
    trained = outputs_of(load_or_train(TINY, 0), images)
    assert len(list(cache_folder().iterdir())) == 1 and cache_folder().is_relative_to(tmp_path)
    monkeypatch.setattr(digit_nets, "train", None)  # no second training
    model = load_or_train(TINY, 0)
    assert not model.training and torch.equal(trained, outputs_of(model, images))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_or_train(replace(TINY, rate=1e-3), 0)
    load_or_train(TINY, 1)
    assert len(list(cache_folder().iterdir())) == 3


@pytest.mark.nightly
def test_the_nets_can_lose_tokens() -> None:
    images, _ = canvases(Split.calibration, 0, 4, TINY.look)
    for class_token in (True, False):
        model = build(replace(TINY, class_token=class_token)).eval()
        fast = gtp_fx.optimize(model, schedule=[4, 4], compile=False, example_inputs=images)
        assert outputs_of(fast, images).shape == (4, CLASSES)
        assert fast.report.flops_ratio < 1


def test_nets_that_were_trained_before_keep_their_names() -> None:
    """Files in users' caches; a change here trains everything anew."""
    assert (
        digit_nets._key(NetConfig(), 0) == "957382cc667436d4ed35"
        and digit_nets._key(NetConfig(class_token=False), 2) == "ec44a4fa498644f35aaa"
    )
    assert digit_nets._key(replace(NetConfig(), task="patches"), 0) != digit_nets._key(NetConfig(), 0)


def test_one_digit_of_a_scene_stands_on_stripes() -> None:
    """Identify a texture, without noise, by its rows: stripes move one column a row, checks repeat or flip, dots are
    rare."""
    bare = replace(NETS["scenes-cls"].look, noise=0, strokes=0)
    images, labels = scenes(Split.test, 5, 12, bare)
    assert torch.equal(images, scenes(Split.test, 5, 12, bare)[0]) and labels.shape == (12,)
    assert not torch.equal(images, scenes(Split.train, 5, 12, bare)[0])
    cells = images[:, 0].unfold(1, CELL, CELL).unfold(2, CELL, CELL).flatten(1, 2)
    used = (cells.flatten(2).std(dim=2) > 0).sum(dim=1)
    assert (used == 3).all()
    striped = torch.stack([_is_striped(cell) for cell in cells.flatten(0, 1)]).reshape(12, 9)
    assert (striped.sum(dim=1) == 1).all()
    assert {kind: texture(kind, 8, np.random.default_rng(0)).shape for kind in ("stripes", "checks", "dots")}


def _is_striped(cell: torch.Tensor) -> torch.Tensor:
    """Return whether a cell is striped, by its first or its last two rows, one pair of which no digit reaches.

    Stripes: the two rows differ, and are the same after a shift of one column.
    """
    return torch.tensor(any(_one_step_apart(*cell[rows]) for rows in (slice(0, 2), slice(-2, None))))


def _one_step_apart(top: torch.Tensor, below: torch.Tensor) -> bool:
    shifted = torch.equal(top[1:], below[:-1]) or torch.equal(top[:-1], below[1:])
    return shifted and not torch.equal(top, below)


def test_a_patch_is_labelled_by_the_whole_digit_alone() -> None:
    look = Look(side=48, smallest=20, largest=20, pieces=3, strokes=2, noise=0)
    images, labels = patch_labels(Split.test, 0, 6, look, 8)
    whole, digits = canvases(Split.test, 0, 6, look)
    assert torch.equal(images, whole) and labels.shape == (6, 36)
    for row, digit in zip(labels, digits, strict=True):
        assert set(row.tolist()) == {0, int(digit) + 1}
        shown = row.reshape(6, 6).nonzero()
        assert ((shown.amax(0) - shown.amin(0)) <= 3).all(), "20 pixels lie on four patches at most"
    bare = replace(look, pieces=0, strokes=0)
    alone, labels = patch_labels(Split.test, 0, 6, bare, 8)
    dark = (alone[:, 0] <= alone.amin()).unfold(1, 8, 8).unfold(2, 8, 8).flatten(3).all(-1).flatten(1)
    assert not (dark & (labels > 0)).any(), "a patch without ink shows no digit"


def test_scores_of_tasks() -> None:
    digits, patches = TASKS["digits"], TASKS["patches"]
    outputs = torch.eye(10)[torch.tensor([3, 4, 5, 5])]
    assert digits.score(outputs, torch.tensor([3, 4, 5, 6])) == 0.75
    found = torch.eye(11)[torch.tensor([[0, 0, 4, 4], [0, 2, 2, 2]])]
    wanted = torch.tensor([[0, 4, 4, 4], [0, 0, 2, 2]])
    assert patches.score(found, wanted) == pytest.approx((2 / 4 + 2 / 3 + 2 / 3) / 3)
    assert patches.loss(50 * torch.eye(11)[wanted], wanted).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.nightly
@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, look=replace(TINY.look, side=48), windows=2, patch=4, depth=6, width=8, close_up=24),
        replace(TINY, task="patches", class_token=False),
        replace(NETS["scenes-cls"], width=16, depth=2, heads=2, close_ups=1, steps=1, batch=4),
    ],
    ids=["windowed", "patches", "scenes"],
)
def test_every_kind_of_net_trains_and_loses_tokens(config: NetConfig) -> None:
    task = TASKS[config.task]
    images, labels = task.draw(Split.test, 0, 4, config.look, config.patch)
    model = train(config, 0)
    outputs = outputs_of(model, images)
    assert outputs.shape == (*labels.shape, task.classes)
    assert torch.equal(outputs, outputs_of(train(config, 0), images))
    fast = gtp_fx.optimize(model, flops_budget=0.8, compile=False, example_inputs=images)
    assert outputs_of(fast, images).shape == outputs.shape and fast.report.flops_ratio <= 0.8


def test_a_sheet_is_drawn(tmp_path: Path) -> None:
    draw_sheet([NETS["scenes-cls"], NETS["patches"]], tmp_path / "sheet.png", columns=2)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
