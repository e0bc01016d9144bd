"""output="reduced": token maps are returned with the tokens that are left, and it is said which these are."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gtp_fx
from bench.live_weights import enliven
from gtp_fx.model.backend import gtp
from gtp_fx.model.planner import Planner
from gtp_fx.options.options import Options
from gtp_fx.strategies.registry import STRATEGIES, strategy_named

from support.printed import in_one_line
from support.tiny_vit import TinyViT, pictures

pytestmark = pytest.mark.xdist_group("reduced-outputs")
REMOVED = (4, 3, 2)
LEFT = (12, 9, 7)


class Tower(TinyViT):
    """What towers return: the stream, its states, each token by a table of places, a map and CLS."""

    def __init__(self) -> None:
        super().__init__(depth=3)
        enliven(self)

    def forward(self, x: Tensor) -> dict[str, Any]:
        states = [self.tokens(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        x = states[-1]
        grid = x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
        return {"tokens": x, "states": states, "placed": x * self.places, "grid": grid, "cls": x[:, 0]}


@cache
def made(output: str, strategy: Any = "regeneration") -> gtp_fx.OptimizedModel:
    model, x = Tower(), pictures()
    return gtp_fx.optimize(model, schedule=REMOVED, strategy=strategy, output=output, example_inputs=x, compile=False)


def of_kept(whole_BNC: Tensor, kept: gtp_fx.KeptTokens) -> Tensor:
    patches = kept.positions[..., None].expand(-1, -1, whole_BNC.shape[-1])
    return torch.cat([whole_BNC[:, : kept.prefix], whole_BNC[:, kept.prefix :].gather(1, patches)], dim=1)


@torch.no_grad()
def with_tokens_masked(model: TinyViT, x: Tensor, kept: list[gtp_fx.KeptTokens]) -> list[Tensor]:
    """The original's states, where no token attends to those that were removed in an earlier block."""
    x = model.tokens(x)
    states, seen_BN = [x], torch.ones(x.shape[:2], dtype=torch.bool)
    for block, left in zip(model.blocks, kept, strict=True):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in block.qkv(block.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BN[:, None, None])
        x = x + block.out(attended.transpose(1, 2).flatten(2))
        x = x + block.mlp(x)
        states.append(x)
        seen_BN = torch.zeros_like(seen_BN).scatter(1, left.positions + 1, True).index_fill(1, torch.tensor([0]), True)
    return states


def test_each_state_is_the_originals_with_removed_tokens_masked() -> None:
    """Where nothing is passed on, that is an oracle that shares no code with the compiler."""
    fast, x = made("reduced", gtp_fx.GTP(alpha=0.0, token_scale=False)), pictures(3)
    output, kept = fast.with_kept_tokens(x)
    assert kept["states"][0] is None and kept["cls"] is None and kept["grid"] is None
    states = with_tokens_masked(Tower(), x, kept["states"][1:])
    for state, told, count, wanted in zip(output["states"][1:], kept["states"][1:], LEFT, states[1:], strict=True):
        assert state.shape == (3, 1 + count, 16) and told.positions.shape == (3, count)
        torch.testing.assert_close(state, of_kept(wanted, told), atol=1e-4, rtol=1e-4)
    assert (states[-1] - with_tokens_masked(Tower(), x, [kept["states"][1]] * 3)[-1]).abs().max() > 1e-2  # they matter


def test_outputs_are_the_whole_ones_at_the_kept_tokens() -> None:
    x = pictures(3)
    (output, kept), whole = made("reduced").with_kept_tokens(x), made("full")(x)
    for name in ("tokens", "placed"):
        torch.testing.assert_close(output[name], of_kept(whole[name], kept[name]))
    for name in ("grid", "cls"):  # a map has a place for every token
        torch.testing.assert_close(output[name], whole[name])
    torch.testing.assert_close(made("reduced")(x)["tokens"], output["tokens"])


def test_the_report_says_how_many_and_what_is_put_back() -> None:
    report = made("reduced").report
    found = {row.output: (row.tokens, row.whole) for row in report.returned}
    assert found == {
        "tokens": (8, 17),
        "states[0]": (17, 17),
        "states[1]": (13, 17),
        "states[2]": (10, 17),
        "states[3]": (8, 17),
        "placed": (8, 17),
    }
    assert len(report.recovered) == 1 and "states[1]: 13 of 17 tokens" in in_one_line(str(report))
    assert report.flops_after < made("full").report.flops_after


def test_every_patch_has_a_stand_in_that_provenance_agrees_with() -> None:
    fast, x = made("reduced"), pictures(3)
    kept = fast.with_kept_tokens(x)[1]["tokens"]
    assert kept.grid == (4, 4) and kept.stand_ins.shape == (3, 16)
    assert torch.equal(kept.stand_ins.gather(1, kept.positions), torch.arange(7).expand(3, -1))
    (origin,) = fast.provenance(x)
    assert torch.equal(kept.positions, origin.index)
    assert torch.equal(kept.stand_ins, origin.matrix.argmax(dim=1))  # this strategy gives a token to one other


def test_nothing_removed_is_the_original() -> None:
    model, x = Tower(), pictures(3)
    fast = gtp_fx.optimize(model, flops_budget=1.0, output="reduced", example_inputs=pictures(), compile=False)
    output, kept = fast.with_kept_tokens(x)
    for name, wanted in model(x).items():
        torch.testing.assert_close(output[name], wanted)
    assert kept["tokens"] is None and all(row.tokens == row.whole for row in fast.report.returned)


def test_gradients_are_those_of_the_outputs() -> None:
    x = pictures(3).requires_grad_()
    for fast in (made("reduced"), made("full")):
        output = fast(x)
        (of_cls,) = torch.autograd.grad(output["cls"].square().sum(), x)
        assert of_cls.abs().max() > 0
    (reduced,) = torch.autograd.grad(made("reduced")(x)["tokens"].square().sum(), x)
    assert bool(reduced.isfinite().all()) and reduced.abs().max() > 0


def test_a_model_that_returns_no_tokens_is_refused() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"output: it is \[\*, 16\], which is no row of each image"):
        gtp_fx.optimize(TinyViT(), schedule=[4, 0], output="reduced", example_inputs=pictures(), compile=False)
    with pytest.raises(gtp_fx.UnsupportedModelError, match="nothing that this model returns can have fewer tokens"):
        Planner(TinyViT(), pictures()).plan(Options.of(schedule=[4, 0], output="reduced"))


def test_a_strategy_that_brings_tokens_back_is_refused() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match="strategy 'idle' puts every token back"):
        gtp_fx.optimize(
            _Last(), schedule=[4, 4], strategy="idle", output="reduced", example_inputs=pictures(), compile=False
        )


class _Last(TinyViT):
    """Returns the stream alone."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_single_tensor_has_kept_tokens_in_its_place() -> None:
    fast = gtp_fx.optimize(_Last(), schedule=[4, 4], output="reduced", example_inputs=pictures(), compile=False)
    output, kept = fast.with_kept_tokens(pictures(1))
    assert output.shape == (1, 9, 16) and kept.positions.shape == (1, 8)
    assert repr(kept) == "KeptTokens(1 images, each 8 of 4 x 4 patches, 1 before and 0 after them)"


def test_whole_outputs_have_no_kept_tokens_to_tell() -> None:
    with pytest.raises(gtp_fx.OptionError, match='optimize it with output="reduced"'):
        made("full").with_kept_tokens(pictures())
    with pytest.raises(gtp_fx.OptionError, match="output='less' is unknown; give one of 'full', 'reduced'"):
        gtp_fx.optimize(Tower(), flops_budget=0.7, output="less")


def test_an_evaluation_compares_whole_outputs() -> None:
    for given in ({"budgets": [0.8], "output": "reduced"}, {"optimised": {"mine": made("reduced")}}):
        with pytest.raises(gtp_fx.OptionError, match="token by token, and these have fewer"):
            gtp_fx.evaluate(Tower(), pictures(8), timing=False, **given)


def test_a_backend_returns_what_dynamo_was_promised() -> None:
    with pytest.raises(gtp_fx.OptionError, match=r"call gtp_fx\.optimize"):
        gtp(torch.fx.symbolic_trace(nn.Identity()), [], options={"flops_budget": 0.7, "output": "reduced"})


def test_calibration_compares_whole_outputs() -> None:
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    calibration = gtp_fx.Calibration(images, cache=None)
    options = {"flops_budget": 0.8, "calibration": calibration, "example_inputs": pictures(), "compile": False}
    reduced = gtp_fx.optimize(_Last(), output="reduced", **options)
    assert reduced.report.moved is not None and reduced(pictures()).shape[1] < 17


@pytest.mark.nightly
@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {"idle"}))
def test_every_strategy_says_which_tokens_it_kept(strategy: str) -> None:
    x, taken = pictures(3), strategy_named(strategy).positions(3)
    schedule = [4 if block in taken else 0 for block in range(3)]
    options = {"schedule": schedule, "strategy": strategy, "example_inputs": pictures(), "compile": False}
    output, kept = gtp_fx.optimize(Tower(), output="reduced", **options).with_kept_tokens(x)
    whole, told = gtp_fx.optimize(Tower(), **options)(x), kept["tokens"]
    first = kept["states"][0]  # shorter where tokens leave before a block's attention
    assert output["states"][0].shape[1] == (17 if first is None else 1 + first.positions.shape[1])
    torch.testing.assert_close(output["tokens"], of_kept(whole["tokens"], told))
    assert torch.equal(told.stand_ins.gather(1, told.positions), torch.arange(16 - sum(schedule)).expand(3, -1))


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_compiled_saved_and_exported(tmp_path: Any) -> None:
    model, x = _Last(), pictures(3)
    options = {"schedule": [4, 4], "output": "reduced", "example_inputs": pictures()}
    eager = gtp_fx.optimize(model, compile=False, **options)
    fast = gtp_fx.optimize(model, **options)
    (output, kept), (wanted, told) = fast.with_kept_tokens(x), eager.with_kept_tokens(x)
    torch.testing.assert_close(output, wanted)
    assert torch.equal(kept.positions, told.positions) and torch.equal(kept.stand_ins, told.stand_ins)
    eager.save_pretrained(tmp_path)
    again, *_ = gtp_fx.load(tmp_path, _Last()).with_kept_tokens(x)
    assert torch.equal(again, wanted)
    gtp_fx.export(eager, tmp_path / "x.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "x.pt2").module()(x), wanted)
