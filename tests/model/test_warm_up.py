"""Warmed up, a model compiles nothing for a later call, whatever its batch and wherever its images were made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
from torch import fx

import gtp_fx
from gtp_fx.errors import InputError, OptionError
from gtp_fx.model.sections import code

from support.batches import Joined
from support.plain_vit import PlainViT, built, images
from support.tiny_vit import TinyViT, pictures

BATCHES = (1, 2, 5, 32)


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """Graphs that Dynamo hands on to be compiled; they are run as they are, since code is Inductor's own matter."""
    found: list[fx.GraphModule] = []
    compile = torch.compile

    def backend(gm: fx.GraphModule, inputs: Any) -> fx.GraphModule:
        found.append(gm)
        return gm

    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=backend))
    return found


def small() -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(built(lambda: PlainViT(depth=2)), flops_budget=0.9, example_inputs=images())


@pytest.mark.parametrize(("mode", "batches"), [(torch.inference_mode, (1, 8)), (torch.no_grad, (8, 1))])
def test_no_request_compiles(
    compiled: list[fx.GraphModule], mode: type[AbstractContextManager[None]], batches: tuple[int, ...]
) -> None:
    fast, kinds = small(), 2 if mode is torch.inference_mode else 1
    with mode():
        fast.warm_up(batches)
    assert len(compiled) == 2 * kinds, "one image, and more, of each kind of tensor"
    outside = [images(batch) for batch in BATCHES]

    def served(number: int) -> bool:
        with mode():
            inside = images(BATCHES[number])
            return torch.equal(fast(inside), fast(outside[number]))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(served, range(len(BATCHES))))
    assert len(compiled) == 2 * kinds
    with torch.enable_grad():
        fast(outside[-1])
    assert len(compiled) == 2 * kinds + 1, "another mode: what counts does count"


@pytest.mark.nightly
def test_two_batches_in_one_call_are_open_apart(compiled: list[fx.GraphModule]) -> None:
    kind = Joined("two batches", "pixels", "slice")
    fast = gtp_fx.optimize(kind.model(), flops_budget=0.74, example_inputs=kind.inputs())
    with torch.no_grad():
        fast.warm_up((3, 4))
        assert len(compiled) == 1
        for sizes in ((3, 4), (6, 2), (5, 5)):
            fast(*kind.inputs(*sizes))
    assert len(compiled) == 1


@pytest.mark.nightly
def test_every_image_size_is_warmed(compiled: list[fx.GraphModule]) -> None:
    model = timm.create_model("test_vit", depth=2, dynamic_img_size=True).eval()
    sizes = [torch.zeros(2, 3, side, side) for side in (160, 96)]
    fast = gtp_fx.optimize(model, flops_budget=0.8, example_inputs=sizes)
    with torch.no_grad():
        fast.warm_up()
        assert len(compiled) == 4
        for images in sizes:
            fast(images[:1])
            fast(images.repeat(3, 1, 1, 1))
    assert len(compiled) == 4


@pytest.mark.nightly
def test_shared_code_is_open_from_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[fx.GraphModule] = []

    def not_compiled(gm: fx.GraphModule, *_: Any) -> fx.GraphModule:
        found.append(gm)
        return gm

    monkeypatch.setattr(code, "compile_with_inductor", not_compiled)
    model = built(lambda: PlainViT(depth=4))
    fast = gtp_fx.optimize(model, schedule=(3, 2, 2, 0), example_inputs=images(), shapes="shared")
    with torch.no_grad():
        fast.warm_up((8,))
        once = len(found)
        assert once
        for batch in (2, 5, 32):
            fast(images(batch))
    assert len(found) == once


def test_what_cant_be_warmed_up_is_refused() -> None:
    fast = small()
    for wrong in ((), (0,), "18", (2.0,), 8):
        with pytest.raises(OptionError, match="give batch sizes from 1 up"):
            fast.warm_up(wrong)  # type: ignore[arg-type]
    fast.train()
    with pytest.raises(InputError, match="call eval"):
        fast.warm_up()


def test_an_eager_model_has_nothing_to_warm_up_and_says_so() -> None:
    fast = gtp_fx.optimize(TinyViT(), flops_budget=0.9, example_inputs=(pictures(),), compile=False)
    with pytest.warns(UserWarning, match="isn't compiled"), torch.no_grad():
        fast.warm_up((2,))
