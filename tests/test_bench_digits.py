"""The digits bench: canvases are the same each time and share no digit between splits, nets train and come back from the cache."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

import gtp_fx
from bench import digit_nets
from bench.digit_nets import NetConfig, accuracy, build, cache_folder, load_or_train, logits, train
from bench.digits import CLASSES, Look, Split, canvases, digit_indices

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


@pytest.mark.parametrize("class_token", [True, False])
def test_training_is_the_same_for_the_same_seed(class_token: bool) -> None:
    config = replace(TINY, class_token=class_token)
    images, labels = canvases(Split.test, 0, 8, config.look)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = train(config, 1, lambda _, done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    expected = logits(first, images, batch=3)
    assert expected.shape == (8, CLASSES) and 0 <= accuracy(first, images, labels) <= 1
    assert torch.equal(expected, logits(train(config, 1), images, batch=3))
    assert not torch.equal(expected, logits(train(config, 2), images, batch=3))


def test_a_trained_net_comes_back_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    images, _ = canvases(Split.test, 0, 4, TINY.look)
    trained = logits(load_or_train(TINY, 0), images)
    assert len(list(cache_folder().iterdir())) == 1 and cache_folder().is_relative_to(tmp_path)
    monkeypatch.setattr(digit_nets, "train", None)  # no second training
    model = load_or_train(TINY, 0)
    assert not model.training and torch.equal(trained, logits(model, images))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_or_train(replace(TINY, rate=1e-3), 0)
    load_or_train(TINY, 1)
    assert len(list(cache_folder().iterdir())) == 3


def test_the_nets_can_lose_tokens() -> None:
    images, _ = canvases(Split.calibration, 0, 4, TINY.look)
    for class_token in (True, False):
        model = build(replace(TINY, class_token=class_token)).eval()
        fast = gtp_fx.optimize(model, schedule=[4, 4], compile=False, example_inputs=images)
        assert logits(fast, images).shape == (4, CLASSES)
        assert fast.report.flops_ratio < 1
