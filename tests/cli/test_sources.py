"""Models by every kind of name: timm's, Hugging Face's directory or class, a function of the user's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner

from gtp_fx.cli import app as cli
from gtp_fx.cli.models import load_named, named_on_meta
from gtp_fx.cli.typed import built_with
from gtp_fx.errors import LoadError

from support.printed import in_one_line

TINY = transformers.ViTConfig(
    hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96, image_size=96, num_labels=7
)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    transformers.ViTForImageClassification(TINY).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@torch.no_grad()
def test_a_hugging_face_directory_has_its_own_weights(saved: Path) -> None:
    loaded = load_named(str(saved))
    assert loaded.weights_origin == f"pretrained ({saved})" and not loaded.model.training
    again = transformers.ViTForImageClassification.from_pretrained(saved).eval()
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.model(x).logits, again(x).logits)


def test_a_directory_of_a_configuration_alone_has_random_weights(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    loaded, again = load_named(str(saved)), load_named(str(saved))
    assert loaded.weights_origin == "random (seed 0), not a trained model"
    for mine, theirs in zip(loaded.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_class_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_here.py").write_text(
        "import timm\ndef tiny():\n    return timm.create_model('test_vit', num_classes=5)\n"
        "number = 3\ndef none():\n    return 1\ndef needs(depth):\n    return depth\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_named("mine_here:tiny").model.num_classes == 5
    assert {p.device.type for p in named_on_meta("mine_here:tiny").parameters()} == {"meta"}
    assert type(named_on_meta("ViTForImageClassification")) is transformers.ViTForImageClassification
    for name, message in (
        ("mine_here:none", r"mine_here:none\(\) returned int, no torch.nn.Module"),
        (
            "mine_here:needs",
            r"needs\(\) raised TypeError: .*'depth'; give a function that returns a model when it is called without",
        ),
        ("mine_here:number", "has no function 'number'"),
        ("not_here:tiny", "No module named 'not_here'"),
    ):
        with pytest.raises(LoadError, match=message):
            load_named(name)


def test_arguments_build_a_model_of_every_kind_or_are_refused_by_name(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "takes_arguments.py").write_text(
        "import timm\ndef tiny(num_classes, depth=2):\n"
        "    return timm.create_model('test_vit', num_classes=num_classes, depth=depth)\n"
    )
    monkeypatch.chdir(tmp_path)
    seven = {"num_classes": 7, "depth": 3}
    assert len(load_named("test_vit", built_with={**seven, "img_size": (96, 64)}).model.blocks) == 3
    assert named_on_meta("takes_arguments:tiny", seven).num_classes == 7
    small = {"num_classes": 7, "img_size": 64, "num_hidden_layers": 1}
    config = named_on_meta("ViTForImageClassification", small).config
    assert (config.num_labels, config.image_size, config.num_hidden_layers) == (7, 64, 1)
    assert load_named(str(saved), built_with={"hidden_act": "relu"}).model.config.hidden_act == "relu"
    for name, given, message in (
        ("test_vit", {"detph": 3}, r"test_vit\(detph=3\) can't be built: TypeError: .*'detph'"),
        ("test_vit", {"checkpoint_path": "x"}, "checkpoint_path: this is timm.create_model's own"),
        ("takes_arguments:tiny", {"width": 3}, "when it is called with width"),
        ("ViTForImageClassification", {"hiden_size": 48}, "has no field 'hiden_size'.*did you mean 'hidden_size'"),
        ("ViTForImageClassification", {"num_hidden_layers": "x"}, "num_hidden_layers=.x.. can.t be built"),
        (str(saved), {"num_classes": 9}, r"num_classes=9\) can't be loaded"),
    ):
        with pytest.raises(LoadError, match=message):
            load_named(name, built_with=given)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--img-size", "224x"], "--img-size 224x: give a side"),
        (["--num-classes", "-1"], "--num-classes -1"),
        (["--model-arg", "depth"], "--model-arg depth: give a name and a value"),
        (["--num-classes", "7", "--model-arg", "num_classes=8"], "num_classes is given twice"),
    ],
)
def test_arguments_of_another_form_are_named(typed: list[str], told: str) -> None:
    done = CliRunner().invoke(cli.app, ["inspect", "test_vit", *typed])
    assert done.exit_code == 2 and told in in_one_line(done.stderr)


def test_values_of_arguments_are_json_or_text() -> None:
    typed = ["depth=3", "qkv_bias=False", "global_pool=avg", "window=[7, 7]", "norm=null"]
    values = {"depth": 3, "qkv_bias": False, "global_pool": "avg", "window": [7, 7], "norm": None}
    assert built_with(None, "96x64", typed) == {"img_size": (96, 64), **values}


def test_what_is_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError, match=r"no configuration of .* can be had"):
        load_named(str(tmp_path))
    with pytest.raises(LoadError, match="transformers has no model class 'ViTForNothing'"):
        load_named("ViTForNothing")
    with pytest.raises(LoadError, match="takes input_ids: give its vision tower"):
        load_named("CLIPModel")


def test_commands_take_them(saved: Path) -> None:
    done = CliRunner().invoke(cli.app, ["plan", str(saved), "--flops-budget", "0.7", "--json"])
    assert done.exit_code == 0, done.output
    assert sum(json.loads(done.stdout)["plans"][0]["schedule"]["removed"]) > 0
    done = CliRunner().invoke(cli.app, ["optimize", str(saved), "--flops-budget", "0.7", "--no-timing", "--batch", "2"])
    assert done.exit_code == 0, done.output
    assert "on 2 views of the photograph" in in_one_line(done.stdout)


def test_folders_without_a_model_are_told_from_those_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "gtp_fx.json").write_text("{}")
    for load in (load_named, named_on_meta):
        with pytest.raises(LoadError, match=r"holds what save_pretrained wrote of an optimised model, .*gtp_fx\.load"):
            load(str(tmp_path))
        with pytest.raises(LoadError, match=r"there is no folder \./nowhere"):
            load("./nowhere")
