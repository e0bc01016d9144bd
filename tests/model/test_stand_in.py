"""The optimised model stands in for the original: methods, mode, dtype, replaced weights, and copies follow."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx

from support import hf_models
from support.small_models import NAME, apart, noise, small
from support.zoo import enliven, in_tiers


@torch.no_grad()
def test_a_method_with_other_blocks_is_refused() -> None:
    """It stops early, so that the schedule says nothing of it."""
    fast = small()
    with pytest.raises(gtp_fx.ScheduleError, match=r"forward_intermediates: this schedule was made for another model"):
        fast.forward_intermediates(noise(), indices=[1], stop_early=True)


@pytest.mark.nightly
@torch.no_grad()
def test_methods_follow_the_weights() -> None:
    """One set of parameters, in whatever dtype and of whatever checkpoint."""
    fast, other = small(), enliven(timm.create_model(NAME, depth=3), seed=5).eval()
    fast.forward_features(noise())
    fast.load_state_dict(other.state_dict())
    wanted = gtp_fx.optimize(other, schedule=fast.schedule, compile=False).forward_features(noise())
    torch.testing.assert_close(fast.forward_features(noise()), wanted)
    fast.to(torch.float64)
    assert fast.forward_features(noise().double()).dtype == torch.float64
    assert fast.forward_head(fast.forward_features(noise().double())).dtype == torch.float64


class Headed(nn.Module):
    """Attention, and a head with a buffer that a product reads, dropout, and no attention."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.body = enliven(timm.create_model(NAME, depth=2, num_classes=0)).eval()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(64, 5)
        self.register_buffer("mix", torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def score(self, features: Tensor) -> Tensor:
        return self.head(self.drop(features)) @ self.mix

    def mean(self, features: Tensor) -> Tensor:
        return features.mean(-1)

    def renew(self) -> None:
        self.head = nn.Linear(64, 7)
        self.mix = torch.eye(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.body(x))


@torch.no_grad()
def test_methods_without_attention_follow_weights_and_mode() -> None:
    """Captured over the stand-in's own parameters: its mode, its dtype, and what a quantiser put in their place."""
    quantization = pytest.importorskip("torchao.quantization")
    model = Headed().eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False, example_inputs=noise())
    features = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    exact = fast.score(features)
    torch.testing.assert_close(exact, model.score(features))
    torch.testing.assert_close(fast.mean(features), features.mean(-1))  # no FLOPs at all

    fast.train()
    assert model.training and not torch.equal(fast.score(features), fast.score(features)), "dropout"
    fast.eval()
    torch.testing.assert_close(fast.score(features), exact)

    twin = copy.deepcopy(fast)  # a layer is the original's own, so what is done to it is done to both
    quantization.quantize_(twin, quantization.Int8WeightOnlyConfig())
    quantised = twin.score(features)
    assert 1e-5 < apart(quantised, exact) < 0.05
    torch.testing.assert_close(model.score(features), exact)
    torch.testing.assert_close(fast.score(features), exact)


@pytest.mark.nightly
@torch.no_grad()
def test_a_remade_model_keeps_what_was_quantised() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    fast = gtp_fx.optimize(Headed().eval(), schedule=[30, 0], compile=False, example_inputs=noise())
    quantization.quantize_(fast, quantization.Int8WeightOnlyConfig())
    before = {name for name, p in fast.named_parameters() if type(p).__module__.startswith("torchao")}
    fast.renew()
    after = {name for name, p in fast.named_parameters() if type(p).__module__.startswith("torchao")}
    assert fast(noise()).shape == (3, 7) and len(before) > 8
    assert before - after == {"head.weight"}, "the new head is what the original has now"
    assert fast.mix is fast._gtp.original.mix


@torch.no_grad()
def test_moving_moves_the_original_wholly() -> None:
    """Buffers too, which `.to()` would renew in the stand-in alone; what is captured afterwards is of one dtype."""
    model = Headed().eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False, example_inputs=noise())
    fast.to(torch.float64)
    assert model.mix is fast.mix and model.mix.dtype == torch.float64
    features = torch.randn(4, 64, dtype=torch.float64)
    torch.testing.assert_close(fast.score(features), model.score(features))
    assert fast.train()(noise().double()).dtype == torch.float64, "captured for training only now"
    assert fast.score(features).dtype == torch.float64


class Constants(nn.Module):
    """Each graph of it lifts a constant of its own, which torch calls by the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = enliven(timm.create_model(NAME, depth=2, num_classes=0)).eval()
        self.scales, self.shape, self.act = [2.0], {"power": 1.0}, torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x) * torch.tensor(7.0 if self.training else 0.5)
        return self.act(y * self.scales[0] ** self.shape["power"])

    def doubled(self, x: Tensor) -> Tensor:
        return self.body(x) * torch.tensor(2.0)

    def stretched(self, features: Tensor) -> Tensor:
        return features * torch.arange(64.0)

    def change(self, how: str) -> None:
        if how == "list":
            self.scales[0] = 3.0
        elif how == "dict":
            self.shape["power"] = 2.0
        else:
            self.act = torch.sigmoid

    def picked(self, keep: Tensor) -> Tensor:
        return keep.float() * 2 if keep.dtype == torch.bool else keep + 0.5

    def times(self, features: Tensor, by: float = 2) -> Tensor:
        return features // by if isinstance(by, int) else features / by


def exact(model: nn.Module) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(model, flops_budget=1.0, compile=False, example_inputs=noise())


@pytest.mark.nightly
@torch.no_grad()
def test_graphs_keep_their_constants_apart() -> None:
    model = Constants().eval()
    fast, x = exact(model), noise()
    names = set(fast.state_dict())
    for _ in range(2):
        torch.testing.assert_close(fast.doubled(x), model.doubled(x))
        torch.testing.assert_close(fast.stretched(x[0, 0, :3, :64]), model.stretched(x[0, 0, :3, :64]))
        for mode in (True, False):
            torch.testing.assert_close(fast.train(mode)(x), model.train(mode)(x))
    assert set(fast.state_dict()) == names, "constants are no weights"


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize(
    "how", ["list", *(pytest.param(how, marks=pytest.mark.nightly) for how in ("dict", "function"))]
)
def test_methods_that_change_anything_are_noticed(how: str) -> None:
    model = Constants().eval()
    fast, before = exact(model), model(noise())
    fast.change(how)
    torch.testing.assert_close(fast(noise()), model(noise()))
    assert apart(model(noise()), before) > 0.01


@torch.no_grad()
def test_an_attribute_of_the_original_is_the_originals() -> None:
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    fast, before = exact(model), model(noise())
    graph = fast.graph_module
    fast.mine, fast.num_classes = 3, model.num_classes
    assert fast.mine == 3 and not hasattr(model, "mine") and fast.graph_module is graph
    fast.global_pool = "avg"
    assert fast.global_pool == model.global_pool == "avg" and fast.graph_module is not graph
    torch.testing.assert_close(fast(noise()), model(noise()))
    assert apart(model(noise()), before) > 0.01


@pytest.mark.nightly
@torch.no_grad()
def test_forms_of_a_call_differ_by_type_too() -> None:
    model = Constants().eval()
    fast, features = exact(model), torch.linspace(1, 9, 128).reshape(2, 64)
    for by in (3, 3.0, 2, 2.0):
        torch.testing.assert_close(fast.times(features, by), model.times(features, by))
    keep = torch.arange(128).reshape(2, 64)
    for each in (keep, keep > 64):
        torch.testing.assert_close(fast.picked(each), model.picked(each))
    with pytest.raises(gtp_fx.InputError, match="uint8"):
        fast(noise().to(torch.uint8))


def renamed(copied: Any) -> None:
    state = copied.state_dict()
    copied.load_state_dict({**state, "pos_embed": state["pos_embed"] * 0}, assign=True)


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(renamed, marks=pytest.mark.nightly),
        lambda copied: setattr(copied, "cls_token", nn.Parameter(copied.cls_token + torch.linspace(-1, 1, 64))),
        pytest.param(
            lambda copied: setattr(copied, "head", enliven(nn.Linear(64, 1000), seed=3)), marks=pytest.mark.nightly
        ),
    ],
    ids=["load_state_dict", "a parameter", "a head"],
)
@pytest.mark.parametrize("how", ["deepcopy", pytest.param("save", marks=pytest.mark.nightly)])
def test_copies_read_their_own_weights(how: str, change: Callable[[Any], None]) -> None:
    """Those of models that have run, and whose methods have."""
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    before, features = fast(noise()), fast.forward_features(noise())
    if how == "deepcopy":
        copied = copy.deepcopy(fast)
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    torch.testing.assert_close(copied(noise()), before)
    change(copied)
    change(fast)
    assert apart(fast(noise()), before) > 0.01
    torch.testing.assert_close(copied(noise()), fast(noise()))
    torch.testing.assert_close(copied.forward_features(noise()), fast.forward_features(noise()))
    del features


@torch.no_grad()
@pytest.mark.parametrize("dtype", in_tiers([torch.float64, torch.bfloat16], torch.float64))
@pytest.mark.parametrize(
    "family", ["timm", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("dinov2", "clip"))]
)
def test_another_dtype_has_graphs_of_its_own(family: str, dtype: torch.dtype) -> None:
    """Dtypes are written into graphs: positions resampled in float32, images cast to the dtype of the weights."""
    model = enliven(timm.create_model(NAME, depth=2)).eval() if family == "timm" else hf_models.build(family)
    call = {"x": noise()} if family == "timm" else hf_models.inputs(family)
    fast = gtp_fx.optimize(model, flops_budget=1.0, compile=False, example_inputs=call)
    fast(**call)
    report = fast.report
    fast.to(dtype)
    call = {key: value.to(dtype) if value.is_floating_point() else value for key, value in call.items()}
    found, wanted = fast(**call), model(**call)
    found, wanted = (value if isinstance(value, Tensor) else value[0] for value in (found, wanted))
    assert found.dtype == wanted.dtype == dtype
    assert apart(found, wanted) < (1e-6 if dtype == torch.float64 else 0.05)
    assert fast.report is report and fast.graph_module is not None


@pytest.mark.nightly
@torch.no_grad()
def test_weights_that_are_assigned_are_the_originals_too() -> None:
    """Of another dtype: what is captured later fits, and getters read them."""
    other = enliven(timm.create_model(NAME, depth=2), seed=5).eval()
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    fast.load_state_dict({name: value.double() for name, value in other.state_dict().items()}, assign=True)
    assert fast.get_classifier().weight is fast.head.weight and fast.head.weight.dtype == torch.float64
    wanted = gtp_fx.optimize(other.double(), schedule=[30, 0], compile=False)
    for call in (fast, fast.forward_features, fast.train()):
        assert call(noise().double()).dtype == torch.float64
    torch.testing.assert_close(fast.eval()(noise().double()), wanted(noise().double()))


@pytest.mark.nightly
@torch.no_grad()
def test_weights_are_assigned_where_there_were_none() -> None:
    other = enliven(timm.create_model(NAME, depth=2), seed=5).double().eval()
    wanted = gtp_fx.optimize(other, schedule=[30, 0], compile=False)
    with torch.device("meta"):
        empty = timm.create_model(NAME, depth=2).eval()
    late = gtp_fx.optimize(empty, schedule=[30, 0], compile=False)
    late.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(late(noise().double()), wanted(noise().double()))
    torch.testing.assert_close(late.forward_features(noise().double()), wanted.forward_features(noise().double()))
    late.reset_classifier(10)
    assert late(noise().double()).shape == (3, 10)


@pytest.mark.nightly
@torch.no_grad()
def test_methods_with_fewer_blocks_where_no_token_leaves() -> None:
    model = enliven(timm.create_model(NAME, depth=3)).eval()
    fast = exact(model)
    for found, wanted in zip(
        fast.get_intermediate_layers(noise(), n=[0, 1]), model.get_intermediate_layers(noise(), n=[0, 1]), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_a_remake_that_fails_leaves_it_as_it_was() -> None:
    model = Headed().eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False, example_inputs=noise())
    before = fast(noise())
    model.spoil = type(model.renew)(lambda self: setattr(self, "head", nn.Linear(3, 7)), model)
    with pytest.raises(gtp_fx.CaptureError, match="Headed"):
        fast.spoil()
    torch.testing.assert_close(fast(noise()), before)
    assert fast.report.flops_ratio < 1


@torch.no_grad()
def test_parts_are_the_originals() -> None:
    model = enliven(timm.create_model(NAME, depth=2)).eval()
    fast = gtp_fx.optimize(model, schedule=[30, 0], compile=False)
    assert [*fast.named_modules()][1:] == [*model.named_modules()][1:]
    assert fast.blocks[-1] is model.blocks[-1] and len(fast.blocks) == 2
    assert torch.equal(fast.patch_embed(noise()), model.patch_embed(noise()))


@pytest.mark.nightly
def test_parts_in_a_mode_of_their_own() -> None:
    """Dropout that stays on in evaluation, and a frozen part in training: each is the original's."""
    model = enliven(timm.create_model(NAME, depth=2, proj_drop_rate=0.5)).eval()
    # Where dead tokens are dropped, fewer random numbers are drawn.
    fast = gtp_fx.optimize(model, flops_budget=1.0, compile=False, disabled_passes=["drop_dead_tokens"])
    wanted, x = model(noise()), noise()
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
    for module in fast.modules():  # as Monte Carlo dropout does
        if isinstance(module, torch.nn.Dropout):
            module.train()
    assert not fast.training
    fast(x)  # makes its graph
    torch.manual_seed(0)
    dropped = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(x), dropped, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dropped, wanted)
    fast.train()
    for block in fast.blocks:
        block.eval()
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
    assert fast.training and not fast.blocks[0].training
    fast.eval()
    torch.testing.assert_close(fast(x), wanted, rtol=1e-4, atol=1e-4)
