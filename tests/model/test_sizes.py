"""Several image sizes in one optimised model: a graph and a schedule each, over one set of parameters."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import gtp_fx
from gtp_fx.capture.signatures import CallSignature, canonical_arguments
from gtp_fx.model import forms

from support.zoo import enliven

pytestmark = pytest.mark.xdist_group("sizes")


def vit(**options: Any) -> nn.Module:
    """36 patches at its own size of 48 x 48, 64 at 64 x 64."""
    given = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": 2, "dynamic_img_size": True}
    return enliven(timm.create_model("vit_tiny_patch16_224", **{**given, **options})).eval()


def images(height: int, width: int | None = None, batch: int = 2) -> Tensor:
    numbers = torch.Generator().manual_seed(height)
    return torch.randn(batch, 3, height, width or height, generator=numbers)


def optimised(model: nn.Module, **options: Any) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(model, **{"flops_budget": 0.5, "compile": False, **options})


def described(height: int, width: int | None = None) -> str:
    return f"(float32[*, 3, {height}, {width or height}])"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Not to be changed, nor what is made of it."""
    return vit()


@pytest.fixture(scope="module")
def both(model: nn.Module) -> gtp_fx.OptimizedModel:
    return optimised(model, example_inputs=[images(48), images(64), images(48, batch=4)])


@pytest.fixture(scope="module")
def alone(model: nn.Module) -> gtp_fx.OptimizedModel:
    return optimised(model, example_inputs=images(64))


@torch.no_grad()
def test_each_example_has_a_graph_and_a_schedule(both: gtp_fx.OptimizedModel, alone: gtp_fx.OptimizedModel) -> None:
    assert list(both.forms) == [described(48), described(64)] and both.forms[described(48)] is both
    assert torch.equal(both(images(64, batch=3)), alone(images(64, batch=3)))
    assert both(images(48)).shape == (2, 1000)
    large = both.forms[described(64)]
    assert (large.schedule, large.report) == (alone.schedule, alone.report)
    assert (both.schedule.tokens, large.schedule.tokens) == ((36, 36), (64, 64))
    assert both.report.flops_ratio <= 0.5 and any(both.schedule)
    assert [p.matrix.shape[2] for p in both.provenance(images(64))] == [64]
    with pytest.raises(gtp_fx.InputError, match=r"48, 48\]\) or .*64, 64\]\) and called .*80, 80\].* sizes='any'"):
        both(images(80))


@pytest.mark.nightly
def test_parameters_exist_once(model: nn.Module, both: gtp_fx.OptimizedModel) -> None:
    assert [(name, id(p)) for name, p in both.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    ours = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    for form in both.forms.values():
        runner = next(iter(form._gtp.runners.values()))
        for gm in (form.graph_module, runner.graph_module):
            held = (value for value in vars(gm).values() if isinstance(value, Tensor))
            tensors = [*gm.parameters(), *gm.buffers(), *held]
            assert sum(t.numel() for t in tensors if t.untyped_storage().data_ptr() not in ours) < 1000


@torch.no_grad()
def test_a_new_size_is_made_at_its_first_call(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, alone: gtp_fx.OptimizedModel
) -> None:
    """What was dropped for another is freed."""
    monkeypatch.setattr(forms, "MOST", 1)
    fast = optimised(model, sizes="any")
    with torch.inference_mode():
        first = fast(images(64, batch=1))
    graph = weakref.ref(fast.forms[described(64)].graph_module)
    assert torch.equal(first, alone(images(64, batch=1)))
    fast(images(32, 40, batch=5))
    assert list(fast.forms) == [described(48), described(32, 40)]
    assert len(fast.forms[described(32, 40)].signature.args[0]) == 2, "a batch isn't kept"
    gc.collect()
    assert graph() is None


def test_the_form_is_dropped_whose_last_call_is_longest_ago() -> None:
    calls = [((size,), {}) for size in range(forms.MOST + 3)]
    signatures = [CallSignature(inspect.Signature(), *call) for call in calls]
    models = [SimpleNamespace(_gtp=SimpleNamespace(signature=signature)) for signature in signatures]
    kept = forms.Forms()
    kept.add(models[0], for_good=True)
    for model in models[1:-2]:
        kept.add(model)
    assert kept.taking(calls[1]) is models[1] and kept.taking(calls[-1]) is None
    for model in models[-2:]:
        kept.add(model)
    assert list(kept) == [*models[:2], *models[4:]]


def test_a_size_that_the_model_refuses_is_an_error_that_names_it() -> None:
    fast = optimised(vit(dynamic_img_size=False), sizes="any")
    wanted = fast(images(48))
    with pytest.raises(gtp_fx.CaptureError, match=r"\[\*, 3, 64, 64\].*Input height \(64\) doesn't match"):
        fast(images(64))
    assert torch.equal(fast(images(48)), wanted) and list(fast.forms) == [described(48)]
    with pytest.raises(gtp_fx.CaptureError, match=r"64, 64"):
        optimised(vit(dynamic_img_size=False), example_inputs=[images(48), images(64)])
    with pytest.raises(gtp_fx.OptionError, match="'given'"):
        optimised(vit(), sizes="all")


class Flags(nn.Module):
    """Arguments of every kind behind the image."""

    def __init__(self) -> None:
        super().__init__()
        self.body = vit()

    def forward(self, x: Tensor, scale: float = 1.0, shift: float = 0.0, **flags: float) -> Tensor:
        return self.body(x) * scale + shift + flags.get("one", 0) - 2 * flags.get("two", 0)


@torch.no_grad()
def test_a_list_holds_examples_and_a_tuple_arguments() -> None:
    model = Flags().eval()
    fast = optimised(model, flops_budget=1.0, example_inputs=[(images(48), 2.0), {"x": images(64), "shift": 3.0}])
    torch.testing.assert_close(fast(scale=2.0, x=images(48)), model(images(48), 2.0))
    torch.testing.assert_close(fast(images(64), 1.0, 3.0), model(images(64), shift=3.0))
    with pytest.raises(gtp_fx.InputError, match="for another"):
        fast(images(64), 2.0, 3.0)
    with pytest.raises(gtp_fx.CaptureError, match="a list holds several examples"):
        optimised(model, example_inputs=[images(48), 2.0])


def by_place(x: Any, /, a: int = 1, *more: int, key: int = 3, **flags: int) -> Any:
    return x, a, more, key, flags


def place_alone(x: Any, a: int = 1, b: int = 2, /, c: int = 3) -> Any:
    return x, a, b, c


@pytest.mark.parametrize(
    ("function", "one", "other"),
    [
        (Flags.forward, ((0, 1), {"two": 2, "one": 1}), ((), {"one": 1, "self": 0, "x": 1, "two": 2})),
        (Flags.forward, ((0, 1, 1.0, 5.0), {}), ((0,), {"shift": 5.0, "x": 1})),
        (Flags.forward, ((0, 1, 4.0, 0.0), {}), ((0, 1), {"scale": 4.0})),
        (by_place, ((0, 1), {"b": 4, "key": 3, "a2": 5}), ((0,), {"a2": 5, "b": 4})),
        (by_place, ((0, 1, 7), {"key": 4}), ((0, 1, 7), {"key": 4})),
        (place_alone, ((0, 1, 5), {}), ((0, 1, 5, 3), {})),
        (place_alone, ((0, 4, 2), {"c": 3}), ((0, 4), {})),
    ],
)
def test_a_call_has_one_form_however_it_is_written(function: Callable[..., Any], one: Any, other: Any) -> None:
    signature = inspect.signature(function)
    first, second = (canonical_arguments(signature, *call) for call in (one, other))
    assert first == second and list(first[1]) == list(second[1])
    if function is not Flags.forward:
        assert function(*first[0], **first[1]) == function(*one[0], **one[1])


@torch.no_grad()
def test_threads_that_meet_a_size_at_once_make_it_once(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> None:
    fast = optimised(model, sizes="any")
    together, results = threading.Barrier(4), []
    made, init = [], gtp_fx.OptimizedModel.__init__
    monkeypatch.setattr(
        gtp_fx.OptimizedModel,
        "__init__",
        lambda self, *args, **options: (made.append(1), init(self, *args, **options))[1],
    )

    def call() -> None:
        together.wait()
        results.append(fast(images(64)).detach())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(results) == 4 and all(torch.equal(result, results[0]) for result in results)


@pytest.mark.nightly
@torch.no_grad()
def test_methods_follow_the_schedule_of_their_size(
    model: nn.Module, both: gtp_fx.OptimizedModel, alone: gtp_fx.OptimizedModel
) -> None:
    fast = optimised(model, sizes="any")
    features = fast.forward_features(images(64))
    assert torch.equal(features, alone.forward_features(images(64))) and features.shape == (2, 65, 32)
    torch.testing.assert_close(fast.forward_head(features), alone(images(64)))
    assert list(fast.forms) == [described(48), described(64)], "forward's schedule for that size was made"
    assert torch.equal(both.forward_features(images(64)), features)
    with pytest.raises(gtp_fx.ScheduleError, match="forward_features"):
        both.forward_features(images(80))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = vit()
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale

    def rescale(self, by: float) -> None:
        self.scale = by


@pytest.mark.nightly
@torch.no_grad()
def test_changes_of_the_model_reach_every_size() -> None:
    model = Counted().eval()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    fast = optimised(model, example_inputs=[images(48), images(64)])
    calls.clear()
    before = fast(images(64))
    assert len(calls) == 1, "the model's own hook fires once a call"
    fast.rescale(2.0)
    torch.testing.assert_close(fast(images(64)), 2 * before)
    model.scale = 3.0
    for size in (48, 64):
        with pytest.raises(gtp_fx.InputError, match="scale changed"):
            fast(images(size))
    model.scale = 2.0
    follows = optimised(model, example_inputs=[images(48), images(64)], recapture=True)
    model.scale = 4.0
    torch.testing.assert_close(follows(images(64)), 4 * before)
    fast.scale = 4.0
    fast.to(torch.float64).train()
    assert fast(images(64).double()).dtype == torch.float64 and model.training
    torch.testing.assert_close(fast.eval()(images(64).double()).float(), 4 * before, rtol=1e-3, atol=1e-3)


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda fast: pickle.loads(pickle.dumps(fast))], ids=["copy", "pickle"])
def test_copies_have_every_size_and_one_set_of_parameters(how: Callable[[Any], Any]) -> None:
    fast = optimised(vit(), sizes="any")
    wanted = fast(images(64))
    twin = how(fast)
    assert list(twin.forms) == list(fast.forms)
    fast.head.weight.zero_()
    assert torch.equal(twin(images(64)), wanted)
    twin.head.weight.mul_(2)
    twin.head.bias.mul_(2)
    torch.testing.assert_close(twin(images(64)), 2 * wanted)
    assert twin(images(32)).shape == (2, 1000) and len(fast.forms) == 2


@pytest.mark.nightly
@torch.no_grad()
def test_counts_hold_for_as_many_tokens(model: nn.Module) -> None:
    fast = optimised(model, flops_budget=None, schedule=[10, 0], sizes="any")
    assert fast(images(32, 72)).shape == (2, 1000)
    assert fast.forms[described(32, 72)].schedule == fast.schedule
    with pytest.raises(gtp_fx.ScheduleError, match=r"64, 64.* has other tokens than .*48, 48"):
        fast(images(64))


@pytest.mark.nightly
@torch.no_grad()
def test_calibration_images_plan_the_sizes_that_they_have(model: nn.Module) -> None:
    def made(*sizes: int, **options: Any) -> gtp_fx.OptimizedModel:
        batches = [images(size, batch=4) for size in sizes]
        calibration = gtp_fx.Calibration(batches, points=2, cache=False, progress=False)
        return optimised(model, calibration=calibration, example_inputs=[images(48), images(64)], **options)

    auto = gtp_fx.strategies.Auto(["tome"])
    chosen = made(48, strategy=auto)
    assert len({form.strategy for form in chosen.forms.values()}) == 1, "chosen for the first form, and kept"
    assert chosen.report.contenders and not chosen.forms[described(64)].report.contenders

    def sources(fast: gtp_fx.OptimizedModel) -> list[str]:
        return [form.report.damage_from for form in fast.forms.values()]

    assert [source[:11] for source in sources(made(64))] == ["a prior wit", "measurement"]
    with pytest.raises(gtp_fx.InputError, match=r"calibration: .*32, 32"):
        made(32)


@pytest.mark.nightly
@torch.no_grad()
def test_compiled_by_torch_each_size_is_a_graph(model: nn.Module) -> None:
    """A new one is made between graph breaks, and refused by name where there may be none."""
    fast, compiled = optimised(model, example_inputs=[images(48), images(64)], sizes="any"), []

    def backend(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    torch.compiler.reset()
    whole = torch.compile(fast, backend=backend, fullgraph=True)
    for size in (48, 64, 48, 64):
        torch.testing.assert_close(whole(images(size)), fast(images(size)))
    assert len(compiled) == 2
    with pytest.raises(Exception, match="gtp_fx makes a graph for a new image size at its first call"):
        whole(images(32))
    broken = torch.compile(fast, backend=backend)
    torch.testing.assert_close(broken(images(32)), fast(images(32)))
    torch.testing.assert_close(whole(images(32)), fast(images(32)))
    with pytest.raises(gtp_fx.InputError, match="before exporting"):
        torch.export.export(fast, (images(56),))


@pytest.mark.nightly
@torch.no_grad()
def test_positions_of_hugging_face_are_interpolated_for_each_size() -> None:
    transformers = pytest.importorskip("transformers")
    sides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = enliven(transformers.ViTModel(transformers.ViTConfig(**sides, image_size=48, patch_size=8))).eval()
    call = {"pixel_values": images(48), "interpolate_pos_encoding": True}
    exact = optimised(model, flops_budget=1.0, example_inputs=call, sizes="any")
    fast = optimised(model, flops_budget=0.7, example_inputs=call, sizes="any")
    for size in (48, 64):
        wanted = model(images(size), interpolate_pos_encoding=True).last_hidden_state
        found = exact(interpolate_pos_encoding=True, pixel_values=images(size)).last_hidden_state
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert fast(images(size), interpolate_pos_encoding=True).last_hidden_state.shape == wanted.shape
    assert all(form.report.flops_ratio <= 0.7 for form in fast.forms.values()) and len(fast.forms) == 2
    with pytest.raises(gtp_fx.InputError, match="for another"):
        fast(images(64))


@pytest.mark.nightly
@pytest.mark.usefixtures("without_kernels")
@torch.no_grad()
def test_the_backend_plans_each_size_too(model: nn.Module, both: gtp_fx.OptimizedModel) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, backend="gtp", options={"flops_budget": 0.5})
    for size in (48, 64):
        torch.testing.assert_close(compiled(images(size)), both(images(size)), rtol=1e-3, atol=1e-3)


@pytest.mark.nightly
@torch.no_grad()
def test_taps_and_maps_are_of_the_size_that_is_called(model: nn.Module) -> None:
    fast = optimised(model, sizes="any", taps=["blocks.1"])
    output, tapped = fast.with_taps(images(64))
    assert tapped["blocks.1"].shape == (2, 65, 32) and torch.equal(fast(images(64)), output)
    assert fast.attention_maps([0], images(64))[0].shape == (2, 2, 65, 65)
