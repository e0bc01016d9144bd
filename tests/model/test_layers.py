"""What comes back is a model of the original's layers: hooks, adapters, replaced and pruned layers act, or are refused.

Each try has the right answer from the original itself, or from arithmetic; silence and a wrong number are never right.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_leaves

import gtp_fx
from gtp_fx.capture.layers import layer_paths
from gtp_fx.errors import InputError
from gtp_fx.passes.lower.call_layers import called_layers

from support.small_models import NAME, apart, noise
from support.window_families import FAMILIES, SWIN, Family, families
from support.zoo import enliven

_HOOKED = ("swin", "samvit", "swin rolled, then padded", "transformers SAM", "maxvit")
HOOKED = tuple(family for family in FAMILIES if family.name in _HOOKED)
"""Windows in several layouts, with padding and without."""

pytestmark = pytest.mark.filterwarnings("ignore:.*requires_grad=True to a scalar")


def made(depth: int = 2, budget: float | None = None, **options: object) -> tuple[nn.Module, gtp_fx.OptimizedModel]:
    """Return a model, and what is made of it: exact, or with tokens removed where a budget or a schedule is given."""
    model = enliven(timm.create_model(NAME, depth=depth)).eval()
    chosen = {"schedule": [30] + [0] * (depth - 1)} if budget is None else {"flops_budget": budget}
    return model, gtp_fx.optimize(model, compile=False, **chosen, **options)  # type: ignore[arg-type]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Doubled(nn.Module):
    """Stands in a layer's place, as an adapter does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.factor = inner, 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.inner(x)


LAYERS = (
    "blocks.0.attn.qkv",
    "blocks.0.norm1",
    "blocks.0.mlp.act",
    "blocks.1.attn.qkv",
    "patch_embed.proj",
    "norm",
    "head",
)
"""Among them one whose projection is taken apart: the last block's, of which one token's query is needed."""


@torch.no_grad()
def test_layers_are_called_and_what_stands_in_their_place_is_run() -> None:
    """At a budget of 1 the answer is the original's, whose layers they are."""
    model, fast = made(budget=1.0)
    before = fast(noise())
    for path in LAYERS:
        layer, (parent, _, name) = model.get_submodule(path), path.rpartition(".")
        setattr(fast.get_submodule(parent), name, Doubled(layer))
        wanted = model(noise())
        assert apart(wanted, before) > 1e-3
        torch.testing.assert_close(fast(noise()), wanted, rtol=1e-4, atol=1e-4)
        fast.get_submodule(path).factor = 0.5  # a layer's own affair, which nobody has to compare
        torch.testing.assert_close(fast(noise()), model(noise()), rtol=1e-4, atol=1e-4)
        setattr(fast.get_submodule(parent), name, layer)
        torch.testing.assert_close(fast(noise()), before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_on_layers_fire(when: str) -> None:
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    fired: list[str] = []

    def hook() -> None:
        for path in LAYERS:
            model.get_submodule(path).register_forward_hook(lambda *_, path=path: fired.append(path))

    with silent():
        if when == "before":
            hook()
        fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False)
        assert not fired, "tracing runs nobody's hooks"
        fast(noise())
        if when == "after":
            assert not fired
            hook()
            fast(noise())
    assert set(fired) == set(LAYERS)


@torch.no_grad()
def test_hooks_change_what_a_layer_returns() -> None:
    model, fast = made(budget=1.0)
    before = fast(noise())
    handle = fast.blocks[1].attn.qkv.register_forward_hook(lambda module, args, output: output * 0.5)
    torch.testing.assert_close(fast(noise()), model(noise()), rtol=1e-4, atol=1e-4)
    assert apart(fast(noise()), before) > 1e-3
    handle.remove()
    torch.testing.assert_close(fast(noise()), before, rtol=1e-4, atol=1e-4)


_ASIDE = (nn.Dropout, nn.Softmax, nn.Flatten, nn.Identity)
"""What graphs have no call for; hooks on it are told of."""


@families(*HOOKED, by_default=(SWIN,))
@torch.no_grad()
@pytest.mark.filterwarnings("error:hooks on")
def test_hooks_on_every_layer_change_what_it_returns(family: Family) -> None:
    """Also where a pass has moved the layer's call to other dimensions, or it runs for some tokens or windows alone."""
    model, x = family.model(), family.inputs()
    exact = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    ways: tuple[dict[str, Any], ...] = (
        {"schedule": family.schedule, "strategy": "regeneration(windows=skip)"},
        {"flops_budget": 0.95},
    )
    reduced = [gtp_fx.optimize(model, **way, example_inputs=x, compile=False) for way in ways]
    paths = {path for path in layer_paths(exact.captured_graph) if not isinstance(model.get_submodule(path), _ASIDE)}
    fired: set[str] = set()

    def hook(path: str) -> Callable[..., Any]:
        def fires(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
            fired.add(path)
            return output * 0.9

        return fires

    for path in paths:
        model.get_submodule(path).register_forward_hook(hook(path))
    wanted = tree_leaves(model(x))
    for found, tensor in zip(tree_leaves(exact(x)), wanted, strict=True):
        torch.testing.assert_close(found, tensor, rtol=1e-4, atol=1e-4)
    for fast in reduced:
        fired.clear()
        fast(x)
        assert fired == paths


@pytest.mark.nightly
@torch.no_grad()
def test_hooks_on_convolutions_that_are_linear_layers_change_what_they_return() -> None:
    """A convolution with a kernel of one is called as it is then, in a layout of its own; all of them can't be."""
    sizes = {"img_size": 64, "embed_dim": 96, "num_heads": 3, "depth": (1, 1, 1)}
    model, x = enliven(timm.create_model("visformer_tiny", **sizes)).eval(), torch.randn(2, 3, 64, 64)
    paths = ("stage2.0.attn.qkv", "stage2.0.mlp.conv1")
    for path in paths:
        fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
        plain = model(x)
        hook = model.get_submodule(path).register_forward_hook(lambda layer, args, output: output * 0.5)
        assert apart(model(x), plain) > 1e-3
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
        hook.remove()
    fast = gtp_fx.optimize(model, flops_budget=1.0, example_inputs=x, compile=False)
    for path in layer_paths(fast.captured_graph):
        if isinstance(model.get_submodule(path), nn.Conv2d):
            model.get_submodule(path).register_forward_hook(lambda layer, args, output: output * 0.5)
    for _ in range(2):
        with pytest.raises(InputError, match=r"there are hooks now.*call gtp_fx.optimize again"):
            fast(x)


@torch.no_grad()
def test_hooks_on_blocks_are_told_of() -> None:
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    store: list[object] = []
    handle = model.blocks[1].register_forward_hook(lambda *_: store.append(1))
    with pytest.warns(UserWarning, match=r"hooks on blocks\.1 don't run"):
        fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False)
    assert not store
    with silent():
        fast(noise())
    fast.blocks[0].register_forward_pre_hook(lambda *_: store.append(1))
    with pytest.warns(UserWarning, match=r"hooks on blocks\.0 don't run"):
        fast(noise())
    with silent():
        fast(noise())  # once is enough
    assert not store
    handle.remove()


@torch.no_grad()
def test_hooks_on_the_whole_fire_on_both() -> None:
    model, fast = made()
    fast.register_forward_hook(lambda module, args, output: output + 1)
    assert apart(model(noise()), fast(noise())) < 1, "both have it"
    fired: list[nn.Module] = []
    model.register_forward_hook(lambda module, *_: fired.append(module))
    fast(noise())
    model(noise())
    assert fired[0] is fast and fired[1] is model


class Scaled(nn.Module):
    """A model with a flag, a list and a context manager that forward reads, and a cache that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.scale, self.steps = enliven(timm.create_model(NAME, depth=2)).eval(), 1.0, [1.0, 2.0]
        self.pretrained_cfg, self.seen = {"input_size": (3, 160, 160)}, 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[-1]
        return self.vit(x) * self.scale * self.steps[0]

    @contextlib.contextmanager
    def scaled(self, by: float) -> Iterator[None]:
        before, self.scale = self.scale, by
        try:
            yield
        finally:
            self.scale = before


@torch.no_grad()
@pytest.mark.parametrize("recapture", [False, True])
def test_a_flag_that_forward_reads_is_noticed(recapture: bool) -> None:
    model = Scaled().eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False, recapture=recapture)
    before = fast(noise())
    model(noise())  # what forward itself writes is no change
    torch.testing.assert_close(fast(noise()), before)

    def check(path: str, factor: float) -> None:
        if recapture:
            torch.testing.assert_close(fast(noise()), factor * before)
        else:
            with pytest.raises(gtp_fx.InputError, match=f"{path} changed since this model was optimised"):
                fast(noise())

    with fast.scaled(3.0):
        check("scale", 3.0)
    model.steps[0] = 2.0
    check("steps", 2.0)
    model.steps[0] = 1.0
    model.vit.blocks[0].attn = nn.Identity()
    if not recapture:
        check(r"vit\.blocks\.0\.attn", 1.0)
    model.remark = "of no consequence"


@torch.no_grad()
def test_parameters_may_be_taken_away_pruned_and_parametrised() -> None:
    model, fast = made(budget=1.0)
    kept = fast.pos_embed.detach()
    del fast.pos_embed
    assert not hasattr(fast, "pos_embed")
    fast.register_parameter("pos_embed", nn.Parameter(2 * kept))
    torch.testing.assert_close(fast(noise()), model(noise()), rtol=1e-4, atol=1e-4)

    for path, name in (("", "pos_embed"), ("blocks.0.attn.proj", "weight"), ("blocks.1.attn.qkv", "weight")):
        before = fast(noise())
        prune.random_unstructured(fast.get_submodule(path), name, 0.5)
        pruned = fast(noise())
        assert apart(pruned, before) > 1e-3
        prune.remove(fast.get_submodule(path), name)  # what is left is the pruned weight
        torch.testing.assert_close(fast(noise()), pruned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(noise()), model(noise()), rtol=1e-4, atol=1e-4)

    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    before = fast(noise())
    parametrize.register_parametrization(fast.blocks[0].mlp.fc1, "weight", Halved())
    halved = fast(noise())
    assert apart(halved, before) > 1e-3
    parametrize.remove_parametrizations(fast.blocks[0].mlp.fc1, "weight")
    torch.testing.assert_close(fast(noise()), halved)


@torch.no_grad()
def test_a_method_that_fails_leaves_both_as_they_were() -> None:
    model = enliven(timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=64, num_heads=2, img_size=96)).eval()
    fast, x = gtp_fx.optimize(model, schedule=[10, 0], compile=False), noise()[..., :96, :96]
    before, shape = fast(x), model.pos_embed.shape
    with pytest.raises(gtp_fx.GtpError):
        fast.set_input_size(img_size=(128, 96))  # the examples are of another size
    assert model.pos_embed.shape == shape
    torch.testing.assert_close(fast(x), before)
    assert fast.train()(x).shape == before.shape


@torch.no_grad()
def test_weights_that_are_assigned_to_the_original_are_followed() -> None:
    model, fast = made(budget=1.0)
    other = enliven(timm.create_model(NAME, depth=2), seed=3).eval()
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(fast(noise()), other(noise()), rtol=1e-4, atol=1e-4)
    swapped = {name: value * 0.5 for name, value in fast.named_parameters()}
    found = torch.func.functional_call(fast, swapped, (noise(),))
    torch.testing.assert_close(found, torch.func.functional_call(model, swapped, (noise(),)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast(noise()), other(noise()), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_averages_of_weights_are_models_of_their_own() -> None:
    _, fast = made()
    average = torch.optim.swa_utils.AveragedModel(fast)
    before = average(noise())
    torch.testing.assert_close(before, fast(noise()))
    for parameter in fast.parameters():
        parameter.mul_(0.5)
    torch.testing.assert_close(average(noise()), before)
    average.update_parameters(fast)
    assert apart(average(noise()), before) > 1e-3


def test_gradients_through_a_checkpoint_are_the_same() -> None:
    _, fast = made()
    fast(noise()).square().mean().backward()
    wanted = fast.blocks[0].attn.qkv.weight.grad.clone()
    fast.zero_grad()
    torch.utils.checkpoint.checkpoint(fast, noise(), use_reentrant=False).square().mean().backward()
    torch.testing.assert_close(fast.blocks[0].attn.qkv.weight.grad, wanted)


@torch.no_grad()
def test_a_copy_may_be_quantised_layer_by_layer() -> None:
    """Each linear layer is replaced by one with packed weights and a forward of its own."""
    _, fast = made()
    before = fast(noise())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(fast, {nn.Linear}, dtype=torch.qint8)
        after = quantised(noise())
    assert 1e-5 < apart(after, before) < 0.2
    torch.testing.assert_close(fast(noise()), before)


@pytest.mark.nightly
@torch.no_grad()
def test_adapters() -> None:
    """Injected afterwards they act; there before, they are merged and switched off with a word of it, or recaptured."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv"], init_lora_weights=False)
    model, fast = made(budget=1.0)
    before = fast(noise())
    peft.inject_adapter_in_model(config, fast)
    assert apart(fast(noise()), before) > 1e-3
    torch.testing.assert_close(fast(noise()), model(noise()), rtol=1e-4, atol=1e-4)

    adapted = peft.get_peft_model(enliven(timm.create_model(NAME, depth=2)).eval(), config).eval()
    with adapted.disable_adapter():
        base = adapted(noise())
    fast = gtp_fx.optimize(adapted, flops_budget=1.0, compile=False, example_inputs=noise())
    torch.testing.assert_close(fast(noise()), adapted(noise()), rtol=1e-4, atol=1e-4)
    with fast.disable_adapter(), pytest.raises(gtp_fx.InputError, match="changed since"):
        fast(noise())
    follows = gtp_fx.optimize(adapted, flops_budget=1.0, compile=False, example_inputs=noise(), recapture=True)
    with follows.disable_adapter():
        torch.testing.assert_close(follows(noise()), base, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(follows(noise()), adapted(noise()), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
@torch.no_grad()
def test_compiled_graphs_call_layers_too() -> None:
    """And hooks that come later."""
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0])
    eager = gtp_fx.optimize(model, schedule=[30, 0], compile=False)
    torch.testing.assert_close(fast(noise()), eager(noise()), rtol=1e-3, atol=1e-3)
    fast.blocks[0].attn.qkv.register_forward_hook(lambda module, args, output: output * 0.5)
    torch.testing.assert_close(fast(noise()), eager(noise()), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_model_that_never_ran_is_traced_whole() -> None:
    class Outer(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).softmax(-1)

    _, fast = made()
    torch._dynamo.reset()
    found = torch.compile(Outer(fast), fullgraph=True, backend="eager")(noise())
    torch.testing.assert_close(found, fast(noise()).softmax(-1))


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["gtp", "topk", "tome"])
def test_half_precision_stays_finite(strategy: str) -> None:
    """q·kᵀ is beyond float16 before it is scaled, and the original scales the queries first."""
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    for block in model.blocks:
        block.attn.qkv.weight[:128] *= 60
    model.half()
    assert model(noise().half()).isfinite().all()
    fast = gtp_fx.optimize(model, schedule=[30, 0], strategy=strategy, compile=False)
    assert fast(noise().half()).isfinite().all()


def test_every_linear_layer_norm_and_activation_is_called() -> None:
    """Of a plain block; only the last block's joint projection is taken apart, by the tokens that are needed of it."""
    model, fast = made()
    runner = next(iter(fast._gtp.runners.values()))
    leaves = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.LayerNorm | nn.GELU)}
    assert leaves - called_layers(runner.graph_module) == {"blocks.1.attn.qkv"}
    assert copy.deepcopy(fast).blocks[0] is not model.blocks[0]
