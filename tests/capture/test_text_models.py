"""A whole vision-language model is refused at once, by the name of the tower that can be optimised."""

from __future__ import annotations

import pytest
import torch

import gtp_fx
from bench.vision_language_models import FAMILIES, TINY, build, prompt
from gtp_fx.capture.text_models import must_not_write_text, tower_of
from gtp_fx.errors import CaptureError


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tower_is_found(name: str) -> None:
    assert tower_of(build(name)) == FAMILIES[name](TINY).tower


def test_the_refusal_names_the_tower() -> None:
    model = build("SmolVLM")
    with pytest.raises(CaptureError) as raised:
        gtp_fx.optimize(model, flops_budget=0.8, example_inputs=prompt("SmolVLM"))
    told = str(raised.value)
    assert told.count("SmolVLMForConditionalGeneration generates text") == 1, "it is no matter of the call's integers"
    assert "fewer_image_tokens" in told and "model.get_submodule('model.vision_model')" in told


def test_what_returns_no_cache_is_tried() -> None:
    model = build("SmolVLM")
    must_not_write_text(model, {"use_cache": False})
    must_not_write_text(torch.nn.Linear(2, 2), {})
    model.config.get_text_config().use_cache = False
    must_not_write_text(model, {})
