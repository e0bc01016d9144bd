"""Models in strange forms: each gives an exact result, or is refused by name with what to give in its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from bench.dynamo_door import Door

from support.tiny_vit import Block, TinyViT, pictures


class Nameless:
    """An object whose own methods fail."""

    def __repr__(self) -> str:
        raise ValueError("no repr")

    def __eq__(self, other: object) -> bool:
        raise ValueError("no equality")

    def __bool__(self) -> bool:
        raise ValueError("no truth")

    __hash__ = None  # type: ignore[assignment]


class Slotted(Block):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.extra = 3


class NoLength(nn.GELU):
    def __len__(self) -> int:
        raise TypeError("no length")


class Empty(nn.GELU):
    """False, as an empty container is."""

    def __len__(self) -> int:
        return 0


class Choosing(TinyViT):
    """Higher-order operators after the blocks, which the compiler doesn't look into."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(self.tokens(x) if x.ndim == 4 else x)
        x = torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t * 3, (x,))
        again = torch._higher_order_ops.while_loop
        return again(lambda i, t: i < 3, lambda i, t: (i + 1, t * 1.1), (torch.tensor(0), x))[1].mean(1)


class Counting(TinyViT):
    """`len` of a batch is a number to Python, and Dynamo, which traces it as a size, stops at the break."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x) + torch.zeros(len(x), 1)


class Mapped(TinyViT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.vmap(torch.tanh)(x))


class Flagged(TinyViT):
    def forward(self, x: Tensor, flag: Any = np.ones(3)) -> Tensor:  # noqa: B008
        return super().forward(x)


def with_part(part: nn.Module) -> TinyViT:
    model = TinyViT()
    model.blocks[1].mlp[2] = part
    return model


def with_attributes() -> TinyViT:
    model = TinyViT()
    model.thing, model.things, model.by_name = Nameless(), [Nameless()], {"a": Nameless()}
    return model


def exported() -> nn.Module:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(TinyViT(), (pictures(),), dynamic_shapes=dynamic).module()


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "slots": lambda: TinyViT(Slotted),
    "a part without a length": lambda: with_part(NoLength()),
    "a part of length 0": lambda: with_part(Empty()),
    "attributes that compare to nothing": with_attributes,
    "exported for any batch": exported,
    "in DataParallel": lambda: nn.DataParallel(TinyViT()),
    "cond and while_loop": Choosing,
    "vmap": Mapped,
    "len of a batch, and a graph break": Counting,
    "traced part": lambda: with_part(torch.jit.trace(nn.GELU(), torch.randn(2, 17, 64))),
}
SLOW = (
    "cond and while_loop",
    "in DataParallel",
    "exported for any batch",
    "vmap",
    "traced part",
    "a part of length 0",
    "len of a batch, and a graph break",
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly if n in SLOW else ()) for n in RIGHT])
@torch.no_grad()
def test_the_result_is_right(name: str) -> None:
    model, x = RIGHT[name](), pictures(3)
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=pictures(), compile=False)
    torch.testing.assert_close(exact(x), model(x), rtol=1e-5, atol=1e-5)
    fast = gtp_fx.optimize(model, flops_budget=0.8, example_inputs=pictures(), compile=False)
    assert fast.report.flops_ratio <= 0.8
    assert fast(x).shape == model(x).shape


def scripted_part() -> nn.Module:
    return with_part(torch.jit.script(nn.Sequential(nn.GELU(), nn.Identity())))


def quantised() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(TinyViT(), {nn.Linear}, torch.qint8)


class Lazy(TinyViT):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.LazyLinear(3)


NAMED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted": (lambda: torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), "compiled by TorchScript"),
    "traced": (lambda: torch.jit.trace(TinyViT(), pictures()), "compiled by TorchScript"),
    "scripted part": (scripted_part, r"blocks\.1\.mlp\.2 is compiled by TorchScript"),
    "quantised": (quantised, "quantise the result"),
    "lazy": (Lazy, "call the model once"),
    "exported for one batch": (
        lambda: torch.export.export(TinyViT(), (pictures(),)).module(),
        "a batch of 2 alone",
    ),
    "program": (lambda: torch.export.export(TinyViT(), (pictures(),)), "no nn.Module; its .module"),
    "partial": (lambda: functools.partial(TinyViT().forward), "'partial', and no nn.Module"),
    "function": (lambda: TinyViT().forward, "'forward', and no nn.Module"),
    "class": (lambda: TinyViT, "'TinyViT', and no nn.Module"),
}
SLOW_TOO = ("traced", "scripted part", "exported for one batch", "program")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.nightly if n in SLOW_TOO else ()) for n in NAMED])
def test_the_refusal_names_what_to_give(name: str) -> None:
    make, told = NAMED[name]
    model = make()
    with pytest.raises(gtp_fx.GtpError, match=told) as refused:
        gtp_fx.optimize(model, flops_budget=1.0, example_inputs=pictures(), compile=False)
    assert not isinstance(refused.value, gtp_fx.InternalError)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ((pictures(), np.ones(3)), "Unsupported input type"),
        ((pictures(), Nameless()), "<Nameless>"),
        (torch.nested.nested_tensor([torch.randn(3, 16, 16)] * 2), "nested tensor"),
    ],
    ids=["an array", "an object without a repr", "nested"],
)
def test_inputs_of_strange_kinds(inputs: Any, told: str) -> None:
    with pytest.raises(gtp_fx.CaptureError, match=told):
        gtp_fx.optimize(Flagged(), flops_budget=1.0, example_inputs=inputs, compile=False)


class Mapped(nn.Module):
    """A forward with a function of one image, mapped over the batch, that writes in place."""

    def forward(self, x: Tensor) -> Tensor:
        def one(image: Tensor) -> Tensor:
            first = image.new_zeros(1, 4)
            first[0, 0] = image.sum()
            return first

        mapped: Tensor = torch.vmap(one)(x)
        return mapped + x


class Pairs(nn.Module):
    """Pairs of what is found in the first image, for every image: three sizes that are known when it runs."""

    def forward(self, x: Tensor) -> Tensor:
        found = x[0].nonzero()[:, 0].float()
        return (found[:, None] - found) * x.sum(1)[:, None, None]


@torch.no_grad()
def test_what_torch_cannot_trace_is_refused_by_its_line() -> None:
    torch._dynamo.reset()
    door, x = Door(keep_refused=True, flops_budget=1.0), torch.randn(3, 4)
    torch.testing.assert_close(torch.compile(Mapped(), backend=door)(x), Mapped()(x))
    (refused,) = door.refused
    assert isinstance(refused, gtp_fx.CaptureError)
    assert "torch can't trace this graph of Dynamo's" in str(refused) and "test_strange_inputs.py:" in str(refused)


@torch.no_grad()
def test_too_many_unknown_sizes_are_refused() -> None:
    with pytest.raises(gtp_fx.CaptureError, match="more of its sizes are known only"):
        gtp_fx.optimize(Pairs(), flops_budget=1.0, example_inputs=torch.randn(2, 4), compile=False)


class WritesToDropped(TinyViT):
    """Blocks whose streams are added to in place, after a dropout."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x)
        for block in self.blocks:
            x = nn.functional.dropout(x, 0.3, self.training)
            x += 0.1 * block(x)
        return x.mean(1)


@torch.no_grad()
def test_what_a_dropout_that_is_off_returns_may_be_written_to() -> None:
    torch._dynamo.reset()
    model, x = WritesToDropped().eval(), pictures(2)
    door = Door(flops_budget=1.0)
    torch.testing.assert_close(torch.compile(model, backend=door)(x), model(x), rtol=1e-4, atol=1e-4)
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-4)
