"""Optimised models among the other things that people do with models: each line of README's table, tried."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

import gtp_fx
from gtp_fx.cli.photo import load_photo

from support import hf_models
from support.distributed_worker import work
from support.small_models import NAME, apart, noise, small
from support.zoo import BY_NAME, build, enliven, images, in_tiers

# ---- quantisation


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "config",
    [
        "Int8WeightOnlyConfig",
        pytest.param("Int8DynamicActivationInt8WeightConfig", marks=pytest.mark.nightly),
        pytest.param("Float8WeightOnlyConfig", marks=pytest.mark.nightly),
    ],
)
@pytest.mark.parametrize("family", in_tiers(["timm", "hf"], "hf"))
@torch.no_grad()
def test_torchao_quantises_what_was_optimised(config: str, family: str) -> None:
    """Every linear layer, including those on a part of their weight (dead tokens) or joined with others (q, k, v)."""
    quantization = pytest.importorskip("torchao.quantization")
    options = {"flops_budget": 0.7, "compile": False, "strategy": "random"}  # which rounding doesn't sway
    fast = small(**options) if family == "timm" else gtp_fx.optimize(hf_models.build("vit"), **options)
    call: dict[str, Tensor] = {"x": noise()} if family == "timm" else hf_models.inputs("vit")
    layers = sum(isinstance(module, nn.Linear) for module in fast.modules())
    before = fast(**call)
    quantization.quantize_(fast, getattr(quantization, config)())
    quantised = sum(type(p).__module__.startswith("torchao") for p in fast.parameters())
    assert quantised == layers > 10
    after = fast(**call)
    before, after = (value if isinstance(value, Tensor) else value.logits for value in (before, after))
    assert 1e-6 < apart(after, before) < (0.1 if "Int8" in config else 0.3)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantised_weights_compile() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    quantization.quantize_(fast, quantization.Int8WeightOnlyConfig())
    # Torchao's tensors are what compiling has to see through, and that is done before there are kernels.
    assert apart(torch.compile(fast, backend="aot_eager")(noise()), fast(noise())) < 1e-2


# ---- autocast, and torch.compile's modes


@pytest.mark.nightly
@torch.no_grad()
def test_autocast() -> None:
    """The same classes and nearly the same logits, in bfloat16, eager; scores and ranks stay float32."""
    model = enliven(timm.create_model(NAME)).eval()
    exact = gtp_fx.optimize(model, flops_budget=1.0, compile=False)
    reduced = gtp_fx.optimize(model, flops_budget=0.7, compile=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(noise()).dtype == model(noise()).dtype == torch.bfloat16
        assert apart(exact(noise()), model(noise())) < 0.02
        assert apart(reduced(noise()), reduced(noise()).float()) < 1e-6
        low = reduced(noise())
    assert apart(low, reduced(noise())) < 0.2  # rounding may swap tokens that are nearly as good as each other


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("mode", ["reduce-overhead"])
def test_modes_of_torch_compile(mode: str) -> None:
    fast = small(depth=2, flops_budget=None, schedule=[30, 0])
    compiled: Any = torch.compile(fast, mode=mode)
    assert apart(compiled(noise()), fast(noise())) < 1e-3


# ---- several processes


@pytest.mark.nightly
def test_ddp_and_fsdp2(tmp_path: Path) -> None:
    mp.spawn(work, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]


# ---- Hugging Face


def test_pipeline(caplog: pytest.LogCaptureFixture) -> None:
    transformers = importlib.import_module("transformers")
    model = hf_models.build("vit")
    fast = gtp_fx.optimize(model, flops_budget=0.7, compile=False)
    side = {"height": hf_models.SIDE, "width": hf_models.SIDE}
    pipe = transformers.pipeline(
        "image-classification", model=fast, image_processor=transformers.ViTImageProcessor(size=side), device="cpu"
    )
    picture = load_photo()
    one, two = pipe([picture, picture.rotate(180)], batch_size=2)
    assert {entry["label"] for entry in one} == {"LABEL_0", "LABEL_1"} and one != two
    assert "is not supported" not in caplog.text


def test_trainer_evaluates(tmp_path: Path) -> None:
    transformers = importlib.import_module("transformers")
    pytest.importorskip("accelerate")
    pixels, labels = hf_models.inputs("vit", batch=5)["pixel_values"], torch.tensor([0, 1, 1, 0, 1])
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
    model = hf_models.build("vit")
    fast = gtp_fx.optimize(
        model, flops_budget=0.7, compile=False, example_inputs={"pixel_values": pixels, "labels": labels}
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], per_device_eval_batch_size=2, use_cpu=True
    )
    found = transformers.Trainer(model=fast, args=arguments, eval_dataset=rows).evaluate()
    with torch.no_grad():
        losses = [float(fast(pixel_values=pixels[i : i + 2], labels=labels[i : i + 2]).loss) for i in (0, 2, 4)]
    assert found["eval_loss"] == pytest.approx((2 * losses[0] + 2 * losses[1] + losses[2]) / 5, rel=1e-4)


# ---- timm


@torch.no_grad()
def test_timms_data_pipeline() -> None:
    fast = small()
    config = timm.data.resolve_data_config({}, model=fast)
    assert config["input_size"] == (3, 160, 160)
    batch = timm.data.create_transform(**config)(load_photo())[None]
    assert fast(batch).shape == (1, 1000)


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize(
    "arch", ["deit3", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("reg4-gap", "siglip-map"))]
)
def test_timms_forward_in_two_parts(arch: str) -> None:
    """`forward_features` is reduced and returns every token; a head on it equals forward where it reads CLS alone."""
    row = BY_NAME[arch]
    model, x = build(row), images(row, 3)
    fast = gtp_fx.optimize(model, flops_budget=0.7, compile=False)
    features = fast.forward_features(x)
    assert features.shape == model.forward_features(x).shape
    assert apart(features, model.forward_features(x)) > 1e-3, "reduced, not the original's"
    logits = fast.forward_head(features)
    assert apart(logits, fast(x)) < (1e-5 if arch == "deit3" else 0.5)
    torch.testing.assert_close(fast.forward_features(x[:1]), features[:1], rtol=1e-4, atol=1e-4)
    assert fast.forward_head(features, pre_logits=True).shape == model.forward_head(features, pre_logits=True).shape
    exact = gtp_fx.optimize(model, flops_budget=1.0, compile=False)
    assert apart(exact.forward_features(x), model.forward_features(x)) < 1e-5


@pytest.mark.nightly
@torch.no_grad()
def test_timms_classifier_is_read_and_replaced() -> None:
    fast = small()
    before = fast(noise())
    assert fast.get_classifier() is fast._gtp.original.head
    counts = fast.schedule
    fast.reset_classifier(7)
    assert fast(noise()).shape == (3, 7) and fast.num_classes == 7
    assert fast.schedule == counts
    assert dict(fast.named_parameters())["head.weight"].shape == (7, 64)
    assert [name for name, _ in fast.named_parameters()] == [name for name, _ in fast._gtp.original.named_parameters()]
    fast.reset_classifier(0)
    assert fast(noise()).shape == (3, 64) and before.shape == (3, 1000)
