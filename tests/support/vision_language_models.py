"""Small vision-language models with live weights, and prompts for them, from their configurations alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from bench.live_weights import enliven

SIDE, PATCH = 64, 8
GRID = (SIDE // PATCH) ** 2
IMAGE_TOKEN = 90
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": SIDE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    config: name of its configuration's class.
    vision: the tower's configuration: its model type, and what differs from `VISION`.
    text: model type of the language model's configuration.
    tower: path of the tower.
    tokens: image tokens that a prompt has for each image.
    extra: the whole configuration's own values.
    """

    config: str
    vision: tuple[str, dict[str, Any]]
    text: str
    tower: str
    tokens: int
    extra: dict[str, Any]


_INTERN = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH], "use_absolute_position_embeddings": True}
_QWEN = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 4, "num_heads": 4}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}}
_QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}

FAMILIES: dict[str, Family] = {
    "llava-clip": Family(
        "LlavaConfig", ("clip_vision_model", {}), "llama", "model.vision_tower", GRID, {"vision_feature_layer": -2}
    ),
    "llava-siglip": Family(
        "LlavaConfig",
        ("siglip_vision_model", {"vision_use_head": False}),
        "llama",
        "model.vision_tower",
        GRID,
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "full"},
    ),
    "internvl": Family("InternVLConfig", ("internvl_vision", _INTERN), "qwen2", "model.vision_tower", GRID // 4, {}),
    "smolvlm": Family(
        "SmolVLMConfig", ("smolvlm_vision", {}), "llama", "model.vision_model", GRID // 4, {"scale_factor": 2}
    ),
    "paligemma": Family(
        "PaliGemmaConfig",
        ("siglip_vision_model", {"vision_use_head": False, "projection_dim": 48}),
        "gemma",
        "model.vision_tower",
        GRID,
        {"projection_dim": 48},
    ),
    "pixtral": Family(
        "LlavaConfig",
        ("pixtral", {"head_dim": 16}),
        "mistral",
        "model.vision_tower",
        GRID,
        {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    ),
    "qwen2-vl": Family(
        "Qwen2VLConfig",
        ("qwen2_vl_vision", {**_QWEN, "embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2}),
        "qwen2_vl_text",
        "model.visual",
        GRID // 4,
        _QWEN_IDS,
    ),
    "qwen2.5-vl": Family(
        "Qwen2_5_VLConfig",
        (
            "qwen2_5_vl_vision",
            {
                **_QWEN,
                "hidden_size": 64,
                "out_hidden_size": 48,
                "intermediate_size": 128,
                "window_size": 32,
                "fullatt_block_indexes": [1, 3],
            },
        ),
        "qwen2_5_vl_text",
        "model.visual",
        GRID // 4,
        _QWEN_IDS,
    ),
    "florence-2": Family(
        "Florence2Config",
        (
            "florence_vision",
            {
                "embed_dim": (16, 32, 32, 64),
                "depths": (1, 1, 2, 1),
                "num_heads": (2, 2, 2, 4),
                "num_groups": (2, 2, 2, 4),
                "window_size": 2,
                "projection_dim": 48,
                "max_position_embeddings": 8,
                "patch_size": (7, 3, 3, 3),
            },
        ),
        "bart",
        "model.vision_tower",
        5,
        {},
    ),
}


def build(
    name: str, seed: int = 0, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> nn.Module:
    """Return a family's model in evaluation mode. text, vision: what differs from the small configurations."""
    family = FAMILIES[name]
    model_type, own = family.vision
    vision_config = {**VISION, "model_type": model_type, **own, **(vision or {})}
    text_config: dict[str, Any] = {**TEXT, "model_type": family.text, **(text or {})}
    if "qwen2" in family.text and "vl" in family.text:
        text_config |= _MROPE
    if family.text == "bart":
        text_config = {
            "model_type": "bart",
            "vocab_size": 100,
            "d_model": 48,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        }
    ids = {"image_token_index": IMAGE_TOKEN} if family.config == "LlavaConfig" else {"image_token_id": IMAGE_TOKEN}
    config = getattr(transformers, family.config)(
        vision_config=vision_config, text_config=text_config, **{**ids, **family.extra}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    return enliven(model, seed).eval()


def prompt(name: str, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Return what a family's processor would: one image in each prompt, with text before and behind."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(seed)
    text = torch.randint(3, 80, (batch, 9), generator=generator)
    image = torch.full((batch, family.tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :4], image, text[:, 4:]], dim=1)
    pixels = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    if name == "smolvlm":
        made["pixel_values"] = pixels[:, None]
    if name == "pixtral":
        made["image_sizes"] = torch.tensor([[SIDE, SIDE]] * batch)
    if name.startswith("qwen"):
        side = SIDE // PATCH
        made["pixel_values"] = torch.randn(batch * GRID, 3 * 2 * PATCH**2, generator=generator)
        made["image_grid_thw"] = torch.tensor([[1, side, side]] * batch)
        made["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    if name == "paligemma":
        made["token_type_ids"] = torch.zeros_like(ids)
    return made
