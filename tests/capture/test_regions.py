"""Regions of a forward are as if their contexts weren't there, save for the numbers and gradients that they mean."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.ops import aten  # type: ignore[import-not-found]
from torch.utils.checkpoint import checkpoint

import gtp_fx
from gtp_fx.capture.autocast_casts import Autocast, Caster
from gtp_fx.graph.torch_internals import fake_mode

from support.plain_vit import Block, PlainViT, built, dynamo_door, images, module_door
from support.zoo import in_tiers


class Without(PlainViT):
    """A frozen backbone and a trained head."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.norm(self.blocks(self.tokens(image)))
        return self.head(x[:, 0])  # type: ignore[no-any-return]


class SwitchedOnAgain(PlainViT):
    """Only the last block is trained, and the table of positions isn't."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.blocks[:2](self.tokens(image))
            with torch.enable_grad():
                x = self.blocks[2](x)
        torch.set_grad_enabled(False)
        x = x * 2
        torch.set_grad_enabled(True)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class Inferred(PlainViT):
    def forward(self, image: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self.norm(self.blocks(self.tokens(image)))
        return self.head(x[:, 0].clone())  # type: ignore[no-any-return]


class InPlace(PlainViT):
    """What is changed in place inside is the same tensor outside."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.tokens(image)
            x += 1
            x.mul_(0.5)
            x = self.blocks(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class HalfInside(PlainViT):
    """Autocast on, off within, on again."""

    def forward(self, image: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = self.blocks[0](self.tokens(image))
            with torch.autocast("cpu", enabled=False):
                x = self.blocks[1](x.float())
            x = self.blocks[2](x)
        return self.head(self.norm(x.float())[:, 0])  # type: ignore[no-any-return]


class HalfDecorated(PlainViT):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, image: Tensor) -> Tensor:
        x = self.blocks(self.tokens(image))
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


class OfAnotherDevice(PlainViT):
    @torch.autocast("cuda")
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)


class Spelled(Block):
    """Attention by einsum, which no list of autocast's has and which is touched inside."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhid,bhjd->bhij", q.float(), k.float()) / q.shape[-1] ** 0.5
        return logits.softmax(-1).to(v.dtype) @ v


class HalfSpelled(HalfDecorated):
    def __init__(self) -> None:
        super().__init__(Spelled)


class Recomputed(PlainViT):
    """Each block kept as its input, in both of torch's ways."""

    def forward(self, image: Tensor) -> Tensor:
        x = self.tokens(image)
        for reentrant, block in zip((False, True, False), self.blocks, strict=True):
            x = checkpoint(block, x, use_reentrant=reentrant)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]


def _turned(t: Tensor) -> Tensor:
    one, two = t.chunk(2, -1)
    angles = torch.arange(t.shape[-2], device=t.device)[:, None] / 10 ** torch.linspace(0, 1, one.shape[-1])
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


class Turning(Block):
    turned = staticmethod(torch.autocast("cpu", enabled=False)(torch.no_grad()(_turned)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)


class Rotary(PlainViT):
    """Queries and keys are turned without gradients or autocast; values under neither."""

    def __init__(self) -> None:
        super().__init__(Turning)


REGIONS: list[Callable[[], nn.Module]] = [
    Without,
    SwitchedOnAgain,
    Inferred,
    InPlace,
    HalfInside,
    HalfDecorated,
    HalfSpelled,
    OfAnotherDevice,
    Recomputed,
    Rotary,
]


def close(found: Tensor, wanted: Tensor) -> None:
    """To rounding: in bfloat16 two units in the last place of the largest, since fused attention rounds less."""
    assert found.dtype == wanted.dtype
    atol = 2**-7 * float(wanted.abs().max()) if wanted.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    in_tiers(REGIONS, Without, HalfInside, HalfDecorated, HalfSpelled, InPlace, SwitchedOnAgain, Recomputed, Rotary),
    ids=lambda make: make.__name__,
)
def test_both_doors_give_eager_numbers_and_reduce(make: Callable[[], nn.Module]) -> None:
    model = built(make)
    wanted = model(images(3))
    assert wanted.dtype == (torch.bfloat16 if make in (HalfDecorated, HalfSpelled) else torch.float32)
    module, dynamo = module_door(model), dynamo_door(model)
    close(module.output, wanted)
    close(dynamo.output, wanted)
    assert module.less.report.flops_ratio <= 0.75
    assert module.less.schedule == dynamo.less.schedule


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The gradients of a loss by the names of the parameters that get one."""
    model.zero_grad(set_to_none=True)
    run(images(3)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


FROZEN = [Without, SwitchedOnAgain, InPlace]


@pytest.mark.parametrize("make", in_tiers(FROZEN, SwitchedOnAgain, InPlace), ids=lambda make: make.__name__)
def test_no_gradient_reaches_what_is_frozen_inside(make: Callable[[], nn.Module]) -> None:
    model = built(make)
    wanted = gradients(model, model)
    assert 0 < len(wanted) < len(list(model.parameters()))
    found = gradients(model, module_door(model).exact.graph_module)
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-3, atol=1e-5)


@pytest.mark.nightly
@torch.no_grad()
def test_an_outer_autocast_reaches_no_part_that_switches_it() -> None:
    """In silence it would: the part has no context any more."""
    half = gtp_fx.optimize(built(HalfInside), flops_budget=0.8, example_inputs=images(), compile=False)
    turning = gtp_fx.optimize(built(Rotary), flops_budget=0.8, example_inputs=images(), compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert turning(images()).dtype == torch.bfloat16, "nothing that it turns is a product"
        with pytest.raises(gtp_fx.errors.InputError, match="switches autocast off for a part"):
            half(images())


@torch.no_grad()
def test_casts_are_those_of_the_device() -> None:
    """A GPU's lists, read on fake tensors: softmax, norms and sums in float32, products in float16."""
    graph = fx.Graph()
    with fake_mode():
        x = torch.empty(2, 5, 5, device="cuda")
        given = graph.placeholder("x")
        given.meta["val"] = x
        product = graph.call_function(aten.matmul.default, (given, given))
        product.meta["val"] = torch.empty(2, 5, 5, device="cuda", dtype=torch.float16)
        soft = graph.call_function(aten.softmax.int, (product, -1))
        soft.meta["val"] = torch.empty(2, 5, 5, device="cuda")
        doubled = graph.call_function(aten.mul.Tensor, (product, 2))
        doubled.meta["val"] = product.meta["val"]
    caster = Caster(graph)
    for node in (product, soft, doubled):
        caster.cast_operands(node, {"cuda": Autocast(True, torch.float16)})
    casts = [
        [operand.args[1] for operand in node.all_input_nodes if operand.target is aten.to.dtype]
        for node in (product, soft, doubled)
    ]
    assert casts == [[torch.float16], [torch.float32], []]


class Scripted(PlainViT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp = torch.jit.script(self.blocks[1].mlp)


@pytest.mark.nightly
def test_a_part_that_torchscript_compiled_is_refused_by_name() -> None:
    with pytest.raises(gtp_fx.CaptureError, match=r"blocks\.1\.mlp is compiled by TorchScript"):
        gtp_fx.optimize(built(Scripted), flops_budget=0.8, example_inputs=images())


@torch.no_grad()
def test_parts_that_are_compiled_are_seen_into() -> None:
    """Wrapped, compiled in place, or with a compiled function for a forward; names stay the original's."""
    model = built(PlainViT)
    wanted = model(images(3))
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].compile(backend="eager")
    model.norm.forward = torch.compile(model.norm.forward, backend="eager")
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=images(), compile=False)
    close(fast(images(3)), wanted)
    assert fast.report.blocks == 3
    assert list(fast.state_dict()) == list(model.state_dict())
