"""Linear layers run before tokens are padded and after padding is cropped, where nothing else stands between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import gtp_fx
from bench.live_weights import enliven
from gtp_fx.graph.verify import propagate_shapes
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.project_unpadded import project_unpadded
from gtp_fx.plan.cost.count import count_flops
from gtp_fx.targets import target_named

from support.graphs_by_hand import traced

ROWS, SIDE, WIDTH, MADE = 5, 3, 4, 12
WINDOWS = 4
"""Of 3 x 3 places over 5 x 5 patches, which are padded to 6 x 6."""


def windows(x: Tensor) -> Tensor:
    """[B, 6, 6, C] -> [4 B, 9, C]."""
    return x.reshape(-1, 2, SIDE, 2, SIDE, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, SIDE**2, x.shape[-1])


def back(x: Tensor) -> Tensor:
    """[4 B, 9, C] -> [B, 5, 5, C], without the padding."""
    grid = x.reshape(-1, 2, 2, SIDE, SIDE, x.shape[-1]).permute(0, 1, 3, 2, 4, 5).reshape(-1, 6, 6, x.shape[-1])
    return grid[:, :ROWS, :ROWS].contiguous()


def padded(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, 1, 0, 1))


def operands() -> tuple[Tensor, ...]:
    """Patches, windows, and a projection of each with its bias."""
    sizes = ((2, ROWS, ROWS, WIDTH), (2 * WINDOWS, SIDE**2, WIDTH), (MADE, WIDTH), (MADE,))
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator) for size in sizes)


def captured(function: Callable[..., object]) -> fx.GraphModule:
    gm = normalise(traced(function, *operands()))
    propagate_shapes(gm, after="test")
    return gm


def rewritten(gm: fx.GraphModule, target: str | None = None) -> fx.GraphModule:
    """The pass's result, of the same numbers: a bias that is added afterwards may round otherwise."""
    before = str(gm.graph)
    found = project_unpadded(gm, None if target is None else target_named(target))
    assert str(gm.graph) == before, "a pass leaves its input as it is"
    propagate_shapes(found, after="test")
    torch.testing.assert_close(found(*operands()), gm(*operands()), rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize(
    ("function", "of_the_work"),
    [
        (lambda x, y, w, b: F.linear(windows(padded(x)), w, b), 25 / 36),
        (lambda x, y, w, b: F.linear(windows(padded(x)), w), 25 / 36),
        (lambda x, y, w, b: F.linear(windows(padded(x).roll((-1, -1), (1, 2))), w, b), 25 / 36),
        # Queries, keys and values of layers of their own.
        (lambda x, y, w, b: [F.linear(p, v, b) for p in [windows(padded(x))] for v in (w, w + 1, w - 1)], 25 / 36),
        (lambda x, y, w, b: back(F.linear(y, w, b)), 25 / 36),
        (lambda x, y, w, b: back(F.linear(y, w)).sin(), 25 / 36),
        # Before and after: the projection of what is padded and cropped runs on patches alone.
        (lambda x, y, w, b: back(F.linear(windows(padded(x)), w, b)), 25 / 36),
    ],
)
def test_nothing_is_multiplied_for_padding(function: Callable[..., object], of_the_work: float) -> None:
    gm = captured(function)
    assert count_flops(rewritten(gm).graph) == round(of_the_work * count_flops(gm.graph))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y, w, b: F.linear(windows(F.pad(x, (0, 0, 0, 1, 0, 1), value=1.0)), w, b),  # padding that isn't zeros
        lambda x, y, w, b: F.linear(windows(padded(x)).sin(), w, b),  # something is computed in between
        lambda x, y, w, b: (lambda z: (F.linear(z, w, b), z))(windows(padded(x))),  # padded tokens are read elsewhere
        lambda x, y, w, b: F.pad(F.linear(y, w, b), (0, 0, 0, 7))[:, :8],  # zeros that the layer would make its bias of
        lambda x, y, w, b: F.linear(F.pad(x, (0, 2))[..., :WIDTH], w, b),  # features are padded
        lambda x, y, w, b: (lambda z: (back(z), z.sum()))(F.linear(y, w, b)),  # and what is cropped is read whole
        lambda x, y, w, b: F.linear(y, w, b).reshape(-1, SIDE**2 * MADE)[1:],  # features are merged with tokens
    ],
)
def test_what_is_read_otherwise_stays(function: Callable[..., object]) -> None:
    gm = captured(function)
    assert count_flops(rewritten(gm).graph) == count_flops(gm.graph)


def test_padding_more_features_has_to_pay() -> None:
    """A GPU multiplies in less time than it moves three times the features; a crop moves no more than before."""
    before = captured(lambda x, y, w, b: F.linear(windows(padded(x)), w, b))
    assert project_unpadded(before, target_named("h100")) is before
    after = captured(lambda x, y, w, b: back(F.linear(y, w, b)))
    assert count_flops(rewritten(after, "h100").graph) < count_flops(after.graph)


@torch.no_grad()
def test_windows_that_are_padded_are_projected_without() -> None:
    """And where a hook reads a layer, that layer's calls stay as they are."""
    build = {"img_size": 80, "depth": 2, "embed_dim": 32, "num_heads": 2, "global_attn_indexes": (1,), "neck_chans": 8}
    model = enliven(timm.create_model("samvit_base_patch16", **build)).eval()
    x = torch.randn(2, 3, 80, 80)
    fast = gtp_fx.optimize(model, flops_budget=1.0, target="cpu", example_inputs=x, compile=False)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    whole = gtp_fx.optimize(
        model, flops_budget=1.0, example_inputs=x, compile=False, disabled_passes=["project_unpadded"]
    )
    # Of a block in windows, 25 patches of 196 places: all products but those of attention and the MLP.
    places, patches, width = 14 * 14, 5 * 5, 32
    assert whole.report.flops_after - fast.report.flops_after == 2 * (places - patches) * 4 * width * width
    seen: list[int] = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda layer, args, output: seen.append(args[0].numel() // width))
    again = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
    assert seen == [2 * places, 2 * places], "the model's call and the graph's, of two images"
