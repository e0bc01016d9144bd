"""Updates in place of a part of a tensor: what is added to a part is added to all, and anything else stays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.ops import aten

import gtp_fx
from gtp_fx.graph.nodes import count_nodes

from support.captured import Built, exact, optimised, shared_model
from support.tiny_vit import Block, TinyViT


class Biased(Block):
    """A bias between the 16 patches, by row and by column, beside a CLS token that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.randn(2, 16, 4)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.biased(q @ k.mT / 8**0.5).softmax(-1) @ v

    def biased(self, logits: Tensor) -> Tensor:
        bias = self.rows.unsqueeze(-1) + self.columns.unsqueeze(-2)
        return logits + nn.functional.pad(bias.flatten(2), (1, 0, 1, 0))


class InPlace(Biased):
    """The same, written over the patches' part."""

    def biased(self, logits: Tensor) -> Tensor:
        apart = logits[:, :, 1:, 1:].view(logits.shape[0], -1, 16, 4, 4)
        apart = apart + self.rows.unsqueeze(-1) + self.columns.unsqueeze(-2)
        logits[:, :, 1:, 1:] = apart.view(logits.shape[0], -1, 16, 16)
        return logits


class InSteps(Biased):
    """The same, by operators that update a view."""

    def biased(self, logits: Tensor) -> Tensor:
        logits[..., 1:, 1:] += (self.rows.unsqueeze(-1) + self.columns.unsqueeze(-2)).flatten(2)
        return logits


class Squared(Biased):
    """What is written to the part is no sum."""

    def biased(self, logits: Tensor) -> Tensor:
        logits[:, :, 1:, 1:] = logits[:, :, 1:, 1:].square()
        return logits


SHAPE = (3, 16, 16)
OUT_OF_PLACE = Built(lambda: TinyViT(Biased), SHAPE)


@pytest.mark.parametrize("block", [InPlace, pytest.param(InSteps, marks=pytest.mark.nightly)])
@torch.no_grad()
def test_a_bias_that_is_added_in_place_is_a_bias(block: type[Biased]) -> None:
    """The same parameters and, for other spellings, the same schedule; sums in another order are 1e-5 apart at most."""
    source = Built(lambda: TinyViT(block), SHAPE)
    images = torch.randn(3, *SHAPE)
    wanted = shared_model(OUT_OF_PLACE)(images)
    assert torch.allclose(shared_model(source)(images), wanted, atol=1e-6)
    assert torch.allclose(optimised(source, flops_budget=1.0).graph_module(images), wanted, atol=1e-5)
    fast, other = (optimised(kind, schedule=[6, 0]) for kind in (source, OUT_OF_PLACE))
    found = fast.graph_module(images)
    assert torch.allclose(found, other.graph_module(images), atol=1e-5)
    assert (found - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_what_is_no_sum_stays_as_it_is_and_is_named() -> None:
    source = Built(lambda: TinyViT(Squared), SHAPE)
    images = torch.randn(3, *SHAPE)
    assert count_nodes(exact(source, flops_budget=1.0).graph_module.graph, (aten.slice_scatter.default,)) == 4
    assert torch.allclose(optimised(source, flops_budget=1.0).graph_module(images), shared_model(source)(images))
    with pytest.raises(gtp_fx.GtpError, match=r"aten\.slice_scatter\.default .* stands between"):
        optimised(source, flops_budget=0.8)
