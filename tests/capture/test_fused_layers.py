"""nn.Transformer's layers fused into one operator, as without gradients: the operators that they are made of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from gtp_fx.capture.fused_layers import attention, encoder_layer
from gtp_fx.graph.torch_internals import FUSED_ATTENTION, FUSED_LAYER

from support.plain_vit import WIDTH, PlainViT, built, dynamo_door, images, module_door

HEADS = 4


class Encoder(PlainViT):
    """Torch's own encoder; `options` are those of its layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, batch_first=True, **options)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=not layer.norm_first)  # type: ignore[assignment]
        for number, p in enumerate(self.blocks.parameters()):
            nn.init.normal_(p, 1.0 * (p.ndim == 1), 0.2, generator=torch.Generator().manual_seed(number))


class Before(Encoder):
    def __init__(self) -> None:
        super().__init__(norm_first=True, activation="gelu")


@pytest.mark.parametrize(
    ("make", "without"),
    [
        (Encoder, torch.no_grad),
        pytest.param(Before, torch.inference_mode, marks=pytest.mark.nightly),
    ],
)
def test_both_doors_see_the_layers_operators(make: type[nn.Module], without: Any) -> None:
    model = built(make)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with without():
        wanted = model(images(3))
        doors = module_door(model), dynamo_door(model)
    for door in doors:
        torch.testing.assert_close(door.output, wanted, rtol=1e-4, atol=1e-5)
        assert door.less.report.flops_ratio <= 0.75
    assert doors[0].less.schedule == doors[1].less.schedule
    assert torch.backends.mha.get_fastpath_enabled() == fastpath


def test_the_switch_is_back_after_an_error() -> None:
    class Broken(PlainViT):
        def forward(self, image: Tensor) -> Tensor:
            raise RuntimeError("broken")

    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(gtp_fx.CaptureError, match="broken"):
        gtp_fx.optimize(built(Broken), flops_budget=0.8, example_inputs=images())
    assert torch.backends.mha.get_fastpath_enabled()


def _weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [0.3 * torch.randn(shape, generator=generator) for shape in shapes]


def _mask(kind: int | None, dtype: torch.dtype) -> Tensor | None:
    """Some keys hidden, never all of a query's: [N, N], [B, N] or [B, H, N, N]."""
    shapes = {0: (5, 5), 1: (2, 5), 2: (2, HEADS, 5, 5)}
    if kind is None:
        return None
    hidden = torch.rand(shapes[kind], generator=torch.Generator().manual_seed(1)) < 0.4
    hidden[..., 0] = False
    return hidden if dtype is torch.bool else torch.zeros(shapes[kind]).masked_fill(hidden, -torch.inf)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize("first", [False, True])
def test_a_layer_equals_torchs_operator(first: bool, kind: int | None, dtype: torch.dtype) -> None:
    c = WIDTH
    x, *weights = _weights((2, 5, c), (3 * c, c), (3 * c,), (c, c), (c,))
    rest = _weights((c,), (c,), (c,), (c,), (2 * c, c), (2 * c,), (c, 2 * c), (c,))
    given = (x, c, HEADS, *weights, first, not first, 1e-5, *rest, _mask(kind, dtype), kind)
    torch.testing.assert_close(encoder_layer(*given), FUSED_LAYER(*given), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", [None, 0, 1, 2])
@pytest.mark.parametrize(("weights_too", "averaged"), [(False, True), (True, True), (True, False)])
def test_attention_equals_torchs_operator(weights_too: bool, averaged: bool, kind: int | None) -> None:
    c = WIDTH
    x, *weights = _weights((2, 5, c), (3 * c, c), (3 * c,), (c, c), (c,))
    given = (x, x, x, c, HEADS, *weights, _mask(kind, torch.bool), weights_too, averaged, kind)
    (out, seen), (wanted, map_wanted) = attention(*given), FUSED_ATTENTION(*given)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    if weights_too:
        torch.testing.assert_close(seen, map_wanted, rtol=1e-4, atol=1e-5)
    else:
        assert seen is None
