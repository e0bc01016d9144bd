"""Wrappers around a model: the example inputs are found by the model inside, or what to give instead is told."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from torch import nn

import gtp_fx

from support.small_models import NAME, noise
from support.zoo import enliven


def model() -> nn.Module:
    return enliven(timm.create_model(NAME, depth=2)).eval()


def exact(given: nn.Module) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(given, flops_budget=1.0, compile=False)


@torch.no_grad()
def test_the_module_that_was_compiled_is_optimised() -> None:
    inside = model()
    compiled = torch.compile(inside)
    fast = exact(compiled)
    assert type(fast).__name__ == "VisionTransformer" and fast.blocks is inside.blocks
    torch.testing.assert_close(fast(noise()), inside(noise()), rtol=1e-4, atol=1e-4)
    with pytest.raises(gtp_fx.OptionError, match="optimised already"):
        gtp_fx.optimize(torch.compile(fast), flops_budget=0.7)
    compiled.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks on what torch\.compile returned don't run"):
        exact(compiled)


@torch.no_grad()
@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel])
def test_wrappers_that_pass_on_their_arguments(wrapper: type[nn.Module]) -> None:
    """What is optimised is what was given."""
    given = wrapper(model())
    fast = exact(given)
    assert type(fast).__name__ == wrapper.__name__ and fast.module is given.module
    torch.testing.assert_close(fast(noise()), given(noise()), rtol=1e-4, atol=1e-4)


def test_a_model_that_may_change_its_images_is_asked_for_them() -> None:
    with pytest.raises(gtp_fx.CaptureError, match="give example_inputs"):
        exact(nn.Sequential(nn.Upsample(scale_factor=2), model()))


@contextlib.contextmanager
def one_process(folder: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.nightly
@torch.no_grad()
def test_distributed_models_are_refused_by_name(tmp_path: Path) -> None:
    with one_process(tmp_path):
        given = nn.parallel.DistributedDataParallel(model())
        for wrapped in (given, torch.compile(given)):
            with pytest.raises(gtp_fx.CaptureError, match=r"DistributedDataParallel\(gtp_fx\.optimize\(model\.module"):
                exact(wrapped)
        fast = nn.parallel.DistributedDataParallel(exact(given.module))
        torch.testing.assert_close(fast(noise()), given(noise()), rtol=1e-4, atol=1e-4)


@pytest.mark.nightly
@torch.no_grad()
def test_adapted_models() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["qkv"], init_lora_weights=False)
    given = peft.get_peft_model(model(), config).eval()
    fast = exact(given)
    assert type(fast).__name__ == "PeftModel"
    torch.testing.assert_close(fast(noise()), given(noise()), rtol=1e-4, atol=1e-4)
