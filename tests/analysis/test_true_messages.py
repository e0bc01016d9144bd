"""Messages are true: the headline says what was found and what stopped it, and each cause has one line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from gtp_fx.errors import Refusal, merged

from support.tiny_vit import Block, TinyViT, pictures


class SummedUp(Block):
    """Logits summed up along a row, so that each depends on those before it."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)) / 8).cumsum(-1).softmax(-1) @ v


class TwoProducts(Block):
    """Logits that are two products, entry by entry."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.transpose(-1, -2)) * (v @ v.transpose(-1, -2))).softmax(-1) @ v


class Learned(Block):
    """Weights that are no softmax of a product."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q[..., :1] + k[..., 0][..., None, :]).softmax(-1) @ v


class NoResidual(Block):
    """Attention whose result takes the place of the stream, in a block without an MLP."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class TwoStreams(TinyViT):
    """No residual add, and two streams that are never one value."""

    def forward(self, x: Tensor) -> Tensor:
        first = second = self.tokens(x)
        for block in self.blocks:
            branch = block(first)
            first, second = first * branch, second * branch
        return torch.cat([first.mean(1), second.mean(1)], 1)


class Keyless(Block):
    """Keys from an operator without a rule."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, torch.cummax(k, -1).values, v)


class Lost(TinyViT):
    """Tokens from an operator without a rule."""

    def tokens(self, x: Tensor) -> Tensor:
        return torch.cummax(super().tokens(x), 1).values


class Closed(TinyViT):
    """Attention inside an operator that takes functions."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        return torch.cond(x.sum() > 0, lambda t: self.blocks[0](t), lambda t: t + 1, (x,)).mean(1)


class Series(TinyViT):
    """Tokens that are no patches of a grid."""

    def tokens(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, : 17 * 16].unflatten(1, (17, 16)) + self.places


HEADLINES = {
    "logits summed up": (
        lambda: TinyViT(SummedUp),
        r"has attention \(0 attention operators, 2 softmax, 1 convolutions\).*blocks\.0, blocks\.1: aten\.softmax"
        r"\.int: aten\.cumsum\.default \[\S*tiny_vit\.py:\d+\] stands between q·kᵀ and this softmax.*attn_mask",
    ),
    "two products": (lambda: TinyViT(TwoProducts), r"made of 2 products and aren't one of them plus a bias"),
    "no product": (lambda: TinyViT(Learned), r"no softmax of q·kᵀ"),
    "no residual add": (
        lambda: TwoStreams(NoResidual),
        r"has 2 blocks of .* and none can lose tokens.*"
        r"joined with what came before it by aten\.mul\.Tensor \[\S*true_messages\.py:\d+\]",
    ),
    "keys lost": (lambda: TinyViT(Keyless), r"its keys come from aten\.cummax\.default \[\S+\].*no rule"),
    "tokens lost": (Lost, r"\(2 attention operators, .*its queries come from aten\.cummax\.default \[\S+\].*no rule"),
    "in a function": (Closed, r"has attention \(1 attention operators, .*cond: attention inside a higher-order"),
    "no grid": (Series, r"nothing here cuts a picture into patches"),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.nightly if n in ("no product", "tokens lost") else ()) for n in HEADLINES],
)
def test_the_headline_says_what_stopped_it(name: str) -> None:
    make, told = HEADLINES[name]
    with pytest.raises(gtp_fx.UnsupportedModelError, match=f"(?s){told}") as error:
        gtp_fx.optimize(make(), flops_budget=0.6, example_inputs=pictures(), compile=False)
    assert not str(error.value).startswith("no self-attention"), "there is some"


def test_a_cause_has_one_line_with_its_layers() -> None:
    refusals = [Refusal(f"blocks.{i}.attn", "aten.add.Tensor", "why", "vit.py:3") for i in range(12)]
    (one,) = merged(refusals)
    assert str(one) == "blocks.0.attn … blocks.11.attn (12 layers): aten.add.Tensor: why [vit.py:3]"
    assert merged(refusals[:2])[0].layer == "blocks.0.attn, blocks.1.attn"
    assert merged([*refusals, Refusal("head", "aten.add.Tensor", "other")])[1].layer == "head"


def test_a_message_has_six_causes_at_most() -> None:
    causes = [Refusal("", f"aten.op{i}", "why") for i in range(9)]
    lines = str(gtp_fx.UnsupportedModelError("it can't be", tuple(causes))).splitlines()
    assert lines[0] == "it can't be"
    assert len(lines) == 7
    assert lines[-1] == "  - and 4 more causes"
    assert str(gtp_fx.UnsupportedModelError("headline:", (causes[0],))) == "headline: aten.op0: why"


def test_a_model_without_attention_is_told_so() -> None:
    with pytest.raises(gtp_fx.UnsupportedModelError, match=r"no self-attention over patch tokens was found .*\(0 att"):
        gtp_fx.optimize(nn.Sequential(nn.Conv2d(3, 4, 3)), flops_budget=0.7, example_inputs=pictures())
