"""Vision-language models whose language model reads fewer image tokens, end to end, through their own `generate`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtp_fx
from bench.vision_language_models import FAMILIES, IMAGE_TOKEN, TINY, build, prompt
from gtp_fx.analysis.returned_tokens import ReturnedTokens
from gtp_fx.types.axes import TokenAxis, TokenDomain
from gtp_fx.types.grids import Grid

pytestmark = pytest.mark.xdist_group("image-tokens")
BUDGET = 0.6


def shortened(name: str, model: nn.Module, **options: Any) -> gtp_fx.ImageTokens:
    asked = {"flops_budget": BUDGET, "compile": False, **options}
    return gtp_fx.fewer_image_tokens(model, prompt(name), tower=FAMILIES[name](TINY).tower, **asked)


def generated(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, list[int]]:
    """The tokens generated greedily, and the tokens of each run of the language model."""
    lengths: list[int] = []

    def count(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append((args[0] if args else kwargs["inputs_embeds"]).shape[1])

    handle = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    handle.remove()
    return ids, lengths


@torch.no_grad()
def must_read_the_kept_features(name: str) -> None:
    """Prefill gets shorter by as many tokens, and reads the features that the whole optimised tower gives those.

    With the positions of what they were among all, where these are asked for.
    """
    model, inputs = build(name), prompt(name, batch=3)
    images = shortened(name, model)
    _, (whole_length, *_) = generated(model, inputs)
    assert images.before == FAMILIES[name](TINY).tokens(TINY) > images.after
    told = f"{images.after} tokens of an image instead of {images.before})"
    assert repr(images).endswith(told) and len(repr(images)) < 200
    kept = images.kept_tokens(inputs["pixel_values"])
    assert kept is not None and kept.positions.shape == (3, images.after)
    # The features of all tokens, by the same schedule, of which the kept ones are taken.
    original, called = model.get_submodule(images.path), images.tower.signature
    example = {"pixel_values": called.args[0], **called.kwargs}
    whole_tower = gtp_fx.optimize(original, schedule=images.tower.schedule, example_inputs=example, compile=False)
    model.set_submodule(images.path, whole_tower)
    features = torch.stack(
        list(model.base_model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output)
    )
    features = features.gather(1, kept.positions[..., None].expand(-1, -1, features.shape[-1]))
    model.set_submodule(images.path, images.tower)
    for short in (images.prompt(inputs), images.prompt(inputs, kept)):
        is_image = short["input_ids"] == IMAGE_TOKEN
        assert is_image.sum(dim=1).tolist() == [images.after] * 3
        embedded = model.get_input_embeddings()(short["input_ids"].masked_fill(is_image, 0))
        embedded = embedded.masked_scatter(is_image[..., None], features.to(embedded.dtype))
        rest = {key: value for key, value in short.items() if key not in ("input_ids", "pixel_values")}
        torch.testing.assert_close(
            model(**short).logits, model(inputs_embeds=embedded, **rest).logits, atol=1e-3, rtol=1e-3
        )
        ids, (length, *later) = generated(model, short)
        assert length == whole_length - (images.before - images.after) and later == [1, 1]
        assert ids.shape == (3, length + 3)


def test_llava_reads_the_features_of_the_kept_tokens() -> None:
    must_read_the_kept_features("LLaVA, CLIP")


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["LLaVA, SigLIP", "PaliGemma"])
def test_others_do_so_too(name: str) -> None:
    must_read_the_kept_features(name)


def test_prompts_that_no_image_fits_are_refused() -> None:
    """And rows of an image keep what stands between them."""
    output = ReturnedTokens(0, "output", 1, TokenAxis(TokenDomain(Grid("patches", (2, 3)), level=1)))
    images = gtp_fx.ImageTokens(None, "tower", output, IMAGE_TOKEN, before=6, after=4)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 90, 90, 90, 5, 90, 90, 90, 6, 2]])
    mask = torch.ones_like(ids)
    short = images.prompt({"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(1, 3, 2, 2)})
    assert short["input_ids"].tolist() == [[1, 90, 90, 5, 90, 90, 6, 2]] and short["attention_mask"].shape == (1, 8)
    assert short["pixel_values"].shape == (1, 3, 2, 2)
    kept = gtp_fx.KeptTokens((2, 3), torch.tensor([[0, 2, 3, 5]]), torch.zeros(1, 6, dtype=torch.long))
    placed = images.prompt({"input_ids": ids, "attention_mask": mask}, kept)["position_ids"]
    assert placed.tolist() == [[0, 1, 3, 4, 5, 7, 8, 9]]
    padded = images.prompt({"input_ids": ids, "attention_mask": torch.tensor([[0, *[1] * 9]])}, kept)["position_ids"]
    assert padded.tolist() == [[0, 0, 2, 3, 4, 6, 7, 8]]
    with pytest.raises(gtp_fx.InputError, match=r"have \[5\] image tokens \(90\), and an image of this model has 6"):
        images.prompt({"input_ids": ids[:, 2:]})
    with pytest.raises(gtp_fx.InputError, match=r"\[0, 6\] image tokens"):
        images.prompt({"input_ids": torch.cat([torch.full_like(ids, 3), ids])})
    with pytest.raises(gtp_fx.InputError, match="1 images of 3 patch tokens"):
        replace(images, around=(1, 0)).prompt({"input_ids": ids}, kept)
    # With CLS before the patches.
    around = replace(images, around=(1, 0))
    kept = gtp_fx.KeptTokens((5,), torch.tensor([[1, 2, 4]]), torch.zeros(1, 5, dtype=torch.long))
    assert around.prompt({"input_ids": ids}, kept)["position_ids"].tolist() == [[0, 1, 3, 4, 5, 7, 8, 9]]


REFUSED = {
    "InternVL": (0.7, gtp_fx.UnsupportedModelError, "of 64 patches it makes 16 features"),
    "SmolVLM": (0.7, gtp_fx.UnsupportedModelError, "of 64 patches it makes 16 features"),
    "Florence-2": (0.9, gtp_fx.UnsupportedModelError, "nothing that this model returns can have fewer tokens"),
    "Pixtral": (0.7, gtp_fx.UnsupportedModelError, "several pictures stand in one sequence"),
    "Qwen2-VL": (0.7, gtp_fx.UnsupportedModelError, "don't run over patch tokens"),
    "Qwen2.5-VL": (0.7, gtp_fx.UnsupportedModelError, "don't run over patch tokens"),
}
"""Why the language model can't get fewer tokens of two prompts' images, with the budget that is asked for."""
PACKED = ("Pixtral", "Qwen2-VL", "Qwen2.5-VL")
"""Families whose images are packed into one sequence; their towers lose tokens where there is one."""


@pytest.mark.nightly
@pytest.mark.parametrize("name", REFUSED)
def test_a_projector_that_merges_neighbours_is_refused(name: str) -> None:
    budget, error, why = REFUSED[name]
    model = build(name)
    before = generated(model, prompt(name))
    with pytest.raises(error, match=why):
        shortened(name, model, flops_budget=budget)
    assert torch.equal(generated(model, prompt(name))[0], before[0])


class _Mixing(nn.Module):
    """Adds each token's neighbour to it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.roll(1, dims=1))


class _Placing(_Mixing):
    """Adds a table of all places."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + torch.ones(TINY.patches, 1))


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("projector", "why"),
    [(_Mixing, "a patch's features depend on which others there are"), (_Placing, "of 64 patches it fails")],
)
def test_a_projector_that_reads_more_than_one_token_is_refused(projector: type[_Mixing], why: str) -> None:
    model: Any = build("LLaVA, CLIP")
    model.model.multi_modal_projector = projector(model.model.multi_modal_projector)
    with pytest.raises(gtp_fx.UnsupportedModelError, match=why):
        shortened("LLaVA, CLIP", model)


@pytest.mark.nightly
def test_features_may_begin_with_cls_and_layers_may_not_differ() -> None:
    model: Any = build("LLaVA, CLIP")
    model.config.vision_feature_select_strategy = "full"
    images = shortened("LLaVA, CLIP", model)
    assert images.around == (1, 0) and images.before == 65
    kept = images.kept_tokens(prompt("LLaVA, CLIP")["pixel_values"])
    assert kept is not None and images.after == 1 + kept.positions.shape[1]
    model.config.vision_feature_select_strategy = "default"
    model.config.vision_feature_layer = [-4, -2]
    model.model.multi_modal_projector.linear_1 = nn.Linear(2 * TINY.width, TINY.text_width)
    with pytest.raises(gtp_fx.UnsupportedModelError, match="reads several together, of which different ones are left"):
        shortened("LLaVA, CLIP", model)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PACKED[:-1]])
def test_the_same_output_goes_in_the_towers_place(name: str) -> None:
    """Exact at budget 1.0; below it, of the same form, and the prompt is as long as ever."""
    model, inputs = build(name), prompt(name, batch=1 if name in PACKED else 2)
    path = FAMILIES[name](TINY).tower
    tower, calls = model.get_submodule(path), []
    handle = tower.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    wanted, lengths = generated(model, inputs)
    handle.remove()
    (args, kwargs), *_ = calls
    called = {**inspect.signature(tower.forward).bind_partial(*args).arguments, **kwargs}
    for budget in (1.0, 0.9):
        fast = gtp_fx.optimize(tower, flops_budget=budget, example_inputs=called, compile=False)
        model.set_submodule(path, fast)
        ids, again = generated(model, inputs)
        assert ids.shape == wanted.shape and again == lengths
        assert budget < 1.0 or torch.equal(ids, wanted)
        assert budget == 1.0 or fast.report.sites
        model.set_submodule(path, tower)


@pytest.mark.nightly
def test_what_isnt_there_is_named() -> None:
    model = build("LLaVA, CLIP")
    with pytest.raises(gtp_fx.OptionError, match="give the path of the vision tower"):
        gtp_fx.fewer_image_tokens(model, prompt("LLaVA, CLIP"), tower="model.tower", flops_budget=BUDGET)
    with pytest.raises(gtp_fx.OptionError, match="always has output='reduced'"):
        gtp_fx.fewer_image_tokens(model, prompt("LLaVA, CLIP"), tower="model.vision_tower", output="full")
    with pytest.raises(gtp_fx.OptionError, match="has no get_image_features"):
        gtp_fx.fewer_image_tokens(nn.Sequential(nn.Identity()).eval(), {}, tower="0", image_token=1)
    with pytest.raises(gtp_fx.OptionError, match=r"call model\.eval\(\)"):
        shortened("LLaVA, CLIP", build("LLaVA, CLIP").train())
    with pytest.raises(gtp_fx.OptionError, match="inputs hold no images"):
        gtp_fx.fewer_image_tokens(model, {}, tower="model.vision_tower", flops_budget=BUDGET)
