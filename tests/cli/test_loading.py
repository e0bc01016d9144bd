"""Models by name and their weights: each test writes the small file it reads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gtp_fx.cli.checkpoints import fill, read_checkpoint
from gtp_fx.cli.weights import load_model
from gtp_fx.errors import GtpError, LoadError

NAME = "test_vit"  # timm's own for tests: 0.4 M parameters


@pytest.fixture
def state() -> dict[str, Tensor]:
    """Weights for NAME that no initialisation gives."""
    return {key: torch.full_like(value, 0.25) for key, value in timm.create_model(NAME).state_dict().items()}


def same(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def test_random_weights_are_named_as_such_repeat_and_leave_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first = load_model(NAME)
    assert torch.equal(torch.rand(1), expected)
    assert first.weights_origin == "random (seed 0), not a trained model"
    assert not first.model.training
    assert same(load_model(NAME).model, first.model.state_dict())


def test_safetensors_whatever_the_file_is_called(tmp_path: Path, state: dict[str, Tensor]) -> None:
    save_file(state, tmp_path / "blob")
    loaded = load_model(NAME, weights=tmp_path / "blob")
    assert same(loaded.model, state)
    assert loaded.weights_origin == f"file {tmp_path / 'blob'}"


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_a_torch_state_dict_at_the_top_or_nested(tmp_path: Path, state: dict[str, Tensor], key: str | None) -> None:
    torch.save(state if key is None else {"epoch": 3, key: state}, tmp_path / "weights.pth")
    assert same(load_model(NAME, weights=str(tmp_path / "weights.pth")).model, state)


def test_averaged_weights_come_first_and_it_is_said(tmp_path: Path, state: dict[str, Tensor]) -> None:
    """As timm's, DeiT's and torchvision's scripts leave them: options beside, EMA, wrappers' prefixes."""
    last = {f"module.{key}": torch.zeros_like(value) for key, value in state.items()}
    averaged = {"n_averaged": torch.tensor(3), **{f"module._orig_mod.{key}": value for key, value in state.items()}}
    file = tmp_path / "best.pth.tar"
    torch.save({"epoch": 3, "args": argparse.Namespace(lr=1e-3), "model": last, "model_ema": averaged}, file)
    loaded = load_model(NAME, weights=file)
    assert same(loaded.model, state)
    told = "(its EMA weights 'model_ema', not 'model', without 'n_averaged' and 'module.' and '_orig_mod.')"
    assert loaded.weights_origin == f"file {file} {told}"
    other = load_model(NAME, weights=file, weights_key="model")
    assert not any(value.any() for value in other.model.state_dict().values())
    assert other.weights_origin == f"file {file} (its 'model', not 'model_ema', without 'module.')"
    with pytest.raises(LoadError, match="no state dict under 'ema': give --weights-key model or model_ema"):
        load_model(NAME, weights=file, weights_key="ema")
    with pytest.raises(LoadError, match="is an entry of a file"):
        load_model(NAME, weights_key="model")


def test_an_only_state_dict_is_taken_under_any_name_and_of_several_one_is_asked_for(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    torch.save({"net": state, "epoch": 3}, tmp_path / "one.pth")
    assert load_model(NAME, weights=tmp_path / "one.pth").weights_origin.endswith("(its 'net')")
    torch.save({"student": state, "teacher": state}, tmp_path / "two.pth")
    with pytest.raises(LoadError, match="several state dicts: give --weights-key student or teacher"):
        load_model(NAME, weights=tmp_path / "two.pth")


def test_a_prefix_stays_where_the_model_has_it_or_some_names_lack_it(tmp_path: Path) -> None:
    inside = nn.Linear(2, 3)
    holder = nn.ModuleDict({"model": inside})
    torch.save({f"module.{key}": value for key, value in holder.state_dict().items()}, tmp_path / "a.pth")
    assert fill(holder, read_checkpoint(tmp_path / "a.pth"), "it").endswith("(without 'module.')")
    torch.save({"module.weight": inside.weight.detach(), "bias": inside.bias.detach()}, tmp_path / "b.pth")
    with pytest.raises(LoadError, match="don't fit"):
        fill(inside, read_checkpoint(tmp_path / "b.pth"), "it")


def test_a_head_for_other_classes_that_has_no_weights_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **others: create(name, **others))
    assert load_model(NAME, pretrained=True).weights_origin == f"pretrained (timm {timm.__version__})"
    seven = load_model(NAME, pretrained=True, built_with={"num_classes": 7}).weights_origin
    assert seven.endswith("; the head of 7 classes is random (seed 0)")


def test_weights_for_other_classes_say_what_to_give(tmp_path: Path) -> None:
    torch.save(timm.create_model(NAME, num_classes=7).state_dict(), tmp_path / "seven.pth")
    with pytest.raises(LoadError, match="weights for 7 classes: --num-classes 7 builds"):
        load_model(NAME, weights=tmp_path / "seven.pth")
    loaded = load_model(NAME, weights=tmp_path / "seven.pth", built_with={"num_classes": 7})
    assert loaded.model.num_classes == 7 and loaded.name == f"{NAME}(num_classes=7)"


def test_weights_of_another_model_name_a_few_keys(tmp_path: Path, state: dict[str, Tensor]) -> None:
    state["head.weight"] = torch.zeros(10, 64)
    for key in [key for key in state if key.startswith("blocks.0.")]:
        del state[key]
    state["extra.bias"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(LoadError) as raised:
        load_model(NAME, weights=tmp_path / "other.pth")
    text = str(raised.value)
    assert 'Unexpected key(s) in state_dict: "extra.bias"' in text
    assert "size mismatch for head.weight: copying a param with shape torch.Size([10, 64])" in text
    assert 'Missing key(s) in state_dict: "blocks.0.' in text
    assert 1 < text.count("blocks.0.") < 12 and " …" in text


class Opener:
    """Pickles into a call: what a hostile checkpoint does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"model": Opener(tmp_path / "touched")}, tmp_path / "hostile.pth")
    with pytest.raises(LoadError, match=r"no state dict.*could run any code"):
        load_model(NAME, weights=tmp_path / "hostile.pth")
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "hostile.pth", weights_only=False)  # so the file was able to
    assert (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("content", "told"), [({"epoch": 3}, "the entries epoch"), ([torch.zeros(1)], "weights"), ({}, "the entries")]
)
def test_a_checkpoint_without_a_state_dict(tmp_path: Path, content: Any, told: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(LoadError, match=f"{told}.*no state dict"):
        read_checkpoint(tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\x10\0\0\0\0\0\0\0{", b"PK\x03\x04 half an archive"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(LoadError, match="broken"):
        read_checkpoint(tmp_path / "broken")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere.*No such file"):
        load_model(NAME, weights=tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["deit_smal_patch16_224", "deit_small_patch16_224.fb_in1"])
def test_an_unknown_name_gets_close_ones(name: str) -> None:
    with pytest.raises(LoadError, match=r"did you mean .*deit_small_patch16_224"):
        load_model(name)


def test_both_sources_at_once(tmp_path: Path) -> None:
    with pytest.raises(GtpError, match="one of them"):
        load_model(NAME, pretrained=True, weights=tmp_path / "any")


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, pretrained: bool) -> None:
        raise OSError("no route to host\nlong trace")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(LoadError, match="can't be loaded: no route to host;"):
        load_model("deit_small_patch16_224", pretrained=True)
    with pytest.raises(LoadError, match="no pretrained weights"):
        load_model("vit_giant_patch14_224", pretrained=True)


def test_timm_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(LoadError, match="pip install timm"):
        load_model(NAME)
