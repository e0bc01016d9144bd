"""Taps: what modules inside return, with every token in its place, from one run; hooks on them; gradients by them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx

from support.small_models import NAME, noise
from support.zoo import enliven

DEPTH = 3
TAPS = ("blocks.0", "blocks.1", "blocks.2.attn")


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def net() -> nn.Module:
    return enliven(timm.create_model(NAME, depth=DEPTH)).eval()


def heard(model: nn.Module, x: Tensor, *paths: str) -> tuple[Any, list[Tensor]]:
    """Return the model's output, and what forward hooks on some modules get."""
    outputs: list[Tensor] = []
    handles = [model.get_submodule(path).register_forward_hook(lambda *a: outputs.append(a[-1])) for path in paths]
    result = model(x)
    for handle in handles:
        handle.remove()
    return result, outputs


def test_taps_are_the_originals_where_nothing_is_removed_and_whole_where_something_is() -> None:
    model, x = net(), noise()
    wanted, inside = heard(model, x, *TAPS)
    exact, tapped = gtp_fx.optimize(model, flops_budget=1.0, compile=False, taps=TAPS).with_taps(x)
    same(exact, wanted)
    assert list(tapped) == list(TAPS)
    for found, theirs in zip(tapped.values(), inside, strict=True):
        same(found, theirs)

    fast = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False, taps=TAPS)
    output, tapped = fast.with_taps(x)
    assert [found.shape for found in tapped.values()] == [theirs.shape for theirs in inside]
    same(output, gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, outputs = heard(fast, x, *TAPS)
    same(again, output)
    for found, theirs in zip(tapped.values(), outputs, strict=True):
        same(found, theirs)
    # A site follows the first block's attention: tokens that remain are the stream's own.
    (kept,) = fast.provenance(x)
    plain = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False, taps=["blocks.0"])
    rows = (kept.index + 1)[..., None].expand(-1, -1, tapped["blocks.0"].shape[-1])
    same(tapped["blocks.0"].gather(1, rows), plain.with_taps(x)[1]["blocks.0"].gather(1, rows))


def test_a_gradient_by_a_tap_is_that_of_the_tokens_that_remain() -> None:
    """Grad-CAM's. The oracle: how the output moves where the later part of the model gets other tokens."""
    model, x = net().double(), noise().double()
    fast = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False, taps=["blocks.0"], strategy=gtp_fx.GTP(alpha=0.0))
    output, tapped = fast.with_taps(x)
    (by_tap,) = torch.autograd.grad(output[:, 0].sum(), tapped["blocks.0"], retain_graph=True)
    moved = by_tap.abs().sum(-1) > 0
    (kept,) = fast.provenance(x)
    remains = torch.zeros_like(moved).scatter(1, kept.index + 1, True)
    remains[:, 0] = True
    assert torch.equal(moved, remains)
    # The last layer of that block adds its bias to the tokens that remain, and to no others.
    bias = fast.blocks[0].mlp.fc2.bias
    (by_bias,) = torch.autograd.grad(output[:, 0].sum(), bias)
    same(by_tap.sum(dim=(0, 1)), by_bias)


def test_hooks_that_a_tap_cant_serve_are_refused() -> None:
    model, x = net(), noise()
    fast = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False, taps=["blocks.0"])
    handle = fast.blocks[0].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(gtp_fx.InputError, match=r"'blocks\.0' returns another output"):
        fast(x)
    handle.remove()
    handle = fast.blocks[0].register_forward_hook(lambda module, args, output: print(args[0].shape))
    with pytest.raises(gtp_fx.InputError, match=r"gets its output, and no inputs"):
        fast(x)
    handle.remove()
    fast.blocks[0].register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks on blocks\.0 don't run"):
        fast(x)


@pytest.mark.parametrize(
    ("taps", "error", "message"),
    [
        ("blocks.0", gtp_fx.OptionError, r"give a list of paths, taps=\['blocks.0'\]"),
        (["block.0"], gtp_fx.OptionError, "no module 'block.0'; did you mean 'blocks.0'"),
        (["blocks"], gtp_fx.CaptureError, "'blocks' isn't called by VisionTransformer's forward"),
    ],
)
def test_what_is_no_tap(taps: Any, error: type[Exception], message: str) -> None:
    model = net()
    if taps == ["blocks"]:
        model.blocks = nn.ModuleList(model.blocks)
        model.forward = lambda x: _by_hand(model, x)  # type: ignore[method-assign]
    with pytest.raises(error, match=message):
        gtp_fx.optimize(model, flops_budget=0.8, compile=False, taps=taps, example_inputs=noise())


def _by_hand(model: Any, x: Tensor) -> Tensor:
    x = model._pos_embed(model.patch_embed(x))
    for block in model.blocks:
        x = block(x)
    result: Tensor = model.head(model.norm(x)[:, 0])
    return result


def test_a_copy_has_the_taps_and_hooks_of_its_own() -> None:
    fast = gtp_fx.optimize(net(), schedule=[8, 0, 0], compile=False, taps=["blocks.0"])
    twin, seen = copy.deepcopy(fast), []
    twin.blocks[0].register_forward_hook(lambda *_: seen.append(1))
    fast(noise())
    assert seen == []
    same(twin.with_taps(noise())[1]["blocks.0"], fast.with_taps(noise())[1]["blocks.0"])
    assert seen == [1]


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
def test_compiled_taps_and_a_hook_that_comes_later_compile_once() -> None:
    fast = gtp_fx.optimize(net(), schedule=[8, 0, 0], taps=["blocks.0"])
    output, tapped = fast.with_taps(noise())
    seen: list[Tensor] = []
    fast.blocks[0].register_forward_hook(lambda *a: seen.append(a[-1]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        same(fast(noise()), output)
    same(seen[0], tapped["blocks.0"])
    same(fast.graph_module(noise())[1]["blocks.0"], tapped["blocks.0"])


def test_hooks_on_gradients_fire_on_layers_whenever_they_were_set() -> None:
    model, seen = net(), []
    model.norm.register_full_backward_hook(lambda *_: seen.append("before"))
    fast = gtp_fx.optimize(model, schedule=[8, 0, 0], compile=False)
    fast.blocks[0].norm1.register_full_backward_hook(lambda *_: seen.append("after"))
    fast(noise()).sum().backward()
    assert seen == ["before", "after"]
