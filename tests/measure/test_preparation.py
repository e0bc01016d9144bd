"""Pictures prepared as the model's library does it."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from gtp_fx.cli.photo import load_photo
from gtp_fx.measure.preparation import preparation_of

from support.tiny_vit import TinyViT

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 48}
SQUASHED = {"size": {"height": 48, "width": 48}, "resample": 2, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2] * 3}
CROPPED = {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 48}, "resample": 3}


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("processor", "settings"),
    [("ViTImageProcessor", SQUASHED), ("CLIPImageProcessor", CROPPED)],
    ids=["squash", "crop"],
)
def test_a_hugging_face_model_has_the_processor_beside_its_weights(
    tmp_path: Path, processor: str, settings: dict[str, object]
) -> None:
    """As its own processor prepares it, but for the rounding of two implementations of the same resampling."""
    made = getattr(transformers, processor)(**settings)
    made.save_pretrained(tmp_path)
    transformers.ViTModel(transformers.ViTConfig(**SMALL)).save_pretrained(tmp_path)
    found = preparation_of(transformers.ViTModel.from_pretrained(tmp_path))
    assert found.source == f"the image processor of {tmp_path}"
    mine, theirs = found.transform()(load_photo()), made(load_photo(), return_tensors="pt")["pixel_values"][0]
    assert mine.shape == theirs.shape and (mine - theirs).abs().mean() < 0.02 * theirs.std()


def test_a_model_that_names_none_gets_a_default_that_is_told() -> None:
    model = TinyViT()
    model.config = transformers.ViTConfig(image_size=16)
    found = preparation_of(model)
    assert found.source.startswith("default") and found.transform()(load_photo()).shape == (3, 16, 16)
    model.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.1, 0.2, 0.3), "std": (1.0,) * 3, "crop_pct": 0.9}
    timm_s = preparation_of(model)
    assert timm_s.config["mean"] == (0.1, 0.2, 0.3) and timm_s.source == "timm's pretrained_cfg"
    assert str(timm_s) == "16 x 16 pixels, bicubic, crop 0.9 center, by timm's pretrained_cfg"
