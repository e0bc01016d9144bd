"""Nets on photographs: what one begins with from another, and a training that goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import photograph_nets
from bench.photograph_nets import PHOTOGRAPH_NETS, begin_with, build, keep, kept_path, load_or_train, resized, train

SMALL = replace(PHOTOGRAPH_NETS["photographs-cls"], width=24, depth=1, batch=8, epochs=2)


def photographs() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return torch.randn(16, 3, 32, 32, generator=drawn), torch.randint(0, 10, (16,), generator=drawn)


def test_a_training_that_was_stopped_ends_where_it_would_have(tmp_path: Path) -> None:
    whole = train(SMALL, 3, *photographs()).state_dict()

    def stopping(what: str, done: int, total: int) -> None:
        if done == 3:  # in the second of two epochs, of two steps each
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SMALL, 3, *photographs(), state=tmp_path / "net.unfinished", progress=stopping)
    steps: list[int] = []
    resumed = train(
        SMALL, 3, *photographs(), state=tmp_path / "net.unfinished", progress=lambda _, done, __: steps.append(done)
    )
    assert steps == [3, 4]
    torch.testing.assert_close(resumed.state_dict(), whole, rtol=0, atol=0)


def test_nets_go_on_from_another_net() -> None:
    start = build(SMALL).state_dict()
    larger, pooled = replace(SMALL, side=48), replace(SMALL, class_token=False)
    for config, tokens in ((larger, 145), (pooled, 64)):
        net = build(config)
        begin_with(net, start)
        own = net.state_dict()
        assert torch.equal(own["blocks.0.attn.qkv.weight"], start["blocks.0.attn.qkv.weight"])
        assert own["pos_embed"].shape[1] == tokens
        assert net(resized(photographs()[0][:2], config)).shape == (2, 10)
    assert torch.equal(own["pos_embed"], start["pos_embed"][:, 1:]), "of patches, without the CLS token's"


def test_the_windowed_net_has_windows() -> None:
    config = PHOTOGRAPH_NETS["photographs-windowed"]
    assert build(config)(photographs()[0][:2]).shape == (2, 10)
    assert config.tokens == 256


def test_a_net_that_is_kept_comes_back_and_another_recipe_has_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photograph_nets, "KEPT", tmp_path)
    monkeypatch.setenv("GTP_FX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PHOTOGRAPH_NETS, "small", SMALL)
    net = build(SMALL).eval()
    keep("small", 3, net)
    found = load_or_train("small", 3, None)
    assert not found.training and next(found.parameters()).dtype == torch.float32
    torch.testing.assert_close(found.state_dict(), net.state_dict(), rtol=2**-11, atol=2**-24)  # halves, rounded
    with pytest.raises(FileNotFoundError, match="no photographs are given"):
        load_or_train("small", 4, None)
    file = kept_path("small", 3)
    monkeypatch.setitem(PHOTOGRAPH_NETS, "small", replace(SMALL, epochs=3))
    assert kept_path("small", 3) != file
