"""Vision-language models of transformers, small, with live weights, and prompts as their processors would make them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from bench.live_weights import enliven

IMAGE_TOKEN = 90


@dataclass(frozen=True)
class Size:
    """How large a model is: its images and patches in pixels, the tower's and the language model's width and blocks."""

    side: int = 64
    patch: int = 8
    width: int = 64
    blocks: int = 4
    text_width: int = 48
    text_blocks: int = 2

    @property
    def patches(self) -> int:
        return (self.side // self.patch) ** 2


TINY = Size()
SMALL = Size(side=224, patch=14, width=256, blocks=6, text_width=256, text_blocks=6)
"""Large enough for times to say something."""


@dataclass(frozen=True)
class Family:
    """One family.

    config: name of its configuration's class.
    tower: path of its vision tower.
    vision, text: configurations of the tower and the language model.
    extra: the whole configuration's own values.
    merged: patches that one image token stands for.
    """

    config: str
    tower: str
    vision: dict[str, Any]
    text: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)
    merged: int = 1

    def tokens(self, size: Size) -> int:
        """Return the image tokens of one image in a prompt."""
        return 1 + (size.side // 32) ** 2 if self.config == "Florence2Config" else size.patches // self.merged


def _vit(size: Size, model_type: str, **others: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": size.width,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": 4,
        "intermediate_size": 2 * size.width,
        "image_size": size.side,
        "patch_size": size.patch,
        **others,
    }


def _decoder(size: Size, model_type: str, **others: Any) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "vocab_size": 100,
        "hidden_size": size.text_width,
        "intermediate_size": 2 * size.text_width,
        "num_hidden_layers": size.text_blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": size.text_width // 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        **others,
    }


def _llava(size: Size, vision: dict[str, Any], text: str, layer: int, strategy: str) -> Family:
    extra = {
        "image_token_index": IMAGE_TOKEN,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
    }
    return Family("LlavaConfig", "model.vision_tower", vision, _decoder(size, text), extra)


def _llava_clip(size: Size) -> Family:
    return _llava(size, _vit(size, "clip_vision_model"), "llama", -2, "default")


def _llava_siglip(size: Size) -> Family:
    return _llava(size, _vit(size, "siglip_vision_model", vision_use_head=False), "llama", -2, "full")


def _pixtral(size: Size) -> Family:
    return _llava(size, _vit(size, "pixtral", head_dim=size.width // 4), "mistral", -1, "full")


def _paligemma(size: Size) -> Family:
    width = {"projection_dim": size.text_width}
    vision = _vit(size, "siglip_vision_model", vision_use_head=False, **width)
    extra = {"image_token_id": IMAGE_TOKEN, **width}
    return Family("PaliGemmaConfig", "model.vision_tower", vision, _decoder(size, "gemma"), extra)


def _internvl(size: Size) -> Family:
    sides = {"image_size": [size.side] * 2, "patch_size": [size.patch] * 2}
    vision = {**_vit(size, "internvl_vision", use_absolute_position_embeddings=True), **sides}
    extra = {"image_token_id": IMAGE_TOKEN}
    return Family("InternVLConfig", "model.vision_tower", vision, _decoder(size, "qwen2"), extra, merged=4)


def _smolvlm(size: Size) -> Family:
    extra = {"image_token_id": IMAGE_TOKEN, "scale_factor": 2}
    vision = _vit(size, "smolvlm_vision")
    return Family("SmolVLMConfig", "model.vision_model", vision, _decoder(size, "llama"), extra, merged=4)


_QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}


def _qwen(size: Size, config: str, vision: str, text: str, **others: Any) -> Family:
    shared = {"model_type": vision, "patch_size": size.patch, "spatial_merge_size": 2, "temporal_patch_size": 2}
    half = size.text_width // 8  # of a head
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    whole = {**shared, "depth": size.blocks, "num_heads": 4, **others}
    return Family(config, "model.visual", whole, _decoder(size, text, rope_parameters=rope), _QWEN_IDS, merged=4)


def _qwen2_vl(size: Size) -> Family:
    widths = {"embed_dim": size.width, "hidden_size": size.text_width, "mlp_ratio": 2}
    return _qwen(size, "Qwen2VLConfig", "qwen2_vl_vision", "qwen2_vl_text", **widths)


def _qwen2_5_vl(size: Size) -> Family:
    widths = {"hidden_size": size.width, "out_hidden_size": size.text_width, "intermediate_size": 2 * size.width}
    windows = {"window_size": 4 * size.patch, "fullatt_block_indexes": [1, 3]}
    return _qwen(size, "Qwen2_5_VLConfig", "qwen2_5_vl_vision", "qwen2_5_vl_text", **widths, **windows)


def _florence(size: Size) -> Family:
    width = size.width
    vision = {
        "model_type": "florence_vision",
        "embed_dim": (width // 4, width // 2, width // 2, width),
        "depths": (1, 1, 2, 1),
        "num_heads": (2, 2, 2, 4),
        "num_groups": (2, 2, 2, 4),
        "window_size": 2,
        "projection_dim": size.text_width,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    text = {
        "model_type": "bart",
        "vocab_size": 100,
        "d_model": size.text_width,
        "encoder_layers": size.text_blocks,
        "decoder_layers": size.text_blocks,
        "encoder_ffn_dim": 2 * size.text_width,
        "decoder_ffn_dim": 2 * size.text_width,
        **heads,
        **ends,
    }
    return Family("Florence2Config", "model.vision_tower", vision, text, {"image_token_id": IMAGE_TOKEN})


FAMILIES: dict[str, Callable[[Size], Family]] = {
    "LLaVA, CLIP": _llava_clip,
    "LLaVA, SigLIP": _llava_siglip,
    "PaliGemma": _paligemma,
    "InternVL": _internvl,
    "SmolVLM": _smolvlm,
    "Florence-2": _florence,
    "Pixtral": _pixtral,
    "Qwen2-VL": _qwen2_vl,
    "Qwen2.5-VL": _qwen2_5_vl,
}


def build(name: str, size: Size = TINY, seed: int = 0) -> nn.Module:
    """Return a family's model in evaluation mode."""
    family = FAMILIES[name](size)
    config = getattr(transformers, family.config)(
        vision_config=dict(family.vision), text_config=dict(family.text), **family.extra
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    return enliven(model, seed).eval()


def prompt(name: str, size: Size = TINY, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return prompts of one image each, with text before and behind."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 80, (batch, 9), generator=generator)
    image = torch.full((batch, FAMILIES[name](size).tokens(size)), IMAGE_TOKEN)
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    pixels = torch.randn(batch, 3, size.side, size.side, generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if name == "SmolVLM":
        made["pixel_values"] = pixels[:, None]
    if name == "Pixtral":
        made["image_sizes"] = torch.tensor([[size.side] * 2] * batch)
    if name.startswith("Qwen"):
        side = size.side // size.patch
        made["pixel_values"] = torch.randn(batch * size.patches, 3 * 2 * size.patch**2, generator=generator)
        made["image_grid_thw"] = torch.tensor([[1, side, side]] * batch)
        made["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if name == "PaliGemma":
        made["token_type_ids"] = torch.zeros_like(ids)
    return made
