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
from gtp_fx.errors import LoadError

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
    assert sum(json.loads(done.stdout)["plans"][0]["schedule"]["propagated"]) > 0
    done = CliRunner().invoke(cli.app, ["optimize", str(saved), "--flops-budget", "0.7", "--no-time", "--batch", "2"])
    assert done.exit_code == 0, done.output
    assert "on 2 views of the photograph" in done.stdout
