"""transformers: vision towers and models that bench.zoo doesn't have."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from bench.wild_models import Shape, WildModel

_IMAGE = (3, 64, 64)
_HF: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 64,
    "patch_size": 8,
}


def _hf(model: str, config: str, *shapes: Shape, **settings: Any) -> WildModel:
    """model, config: names of the library's classes; a narrow ViT unless settings say otherwise."""
    return _staged(model, config, *shapes, **{**_HF, **settings})


def _staged(model: str, config: str, *shapes: Shape, **settings: Any) -> WildModel:
    """A class whose configuration has lists, one entry a stage."""
    return WildModel("transformers", model, partial(_hf_built, model, config, settings), shapes or (_IMAGE,))


def _hf_built(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    library = importlib.import_module("transformers")
    built: nn.Module = getattr(library, model)(getattr(library, config)(**settings))
    return built


MODELS = (
    _hf("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig"),
    _hf("FlavaImageModel", "FlavaImageConfig"),
    _hf("GitVisionModel", "GitVisionConfig"),
    _hf(
        "GroupViTVisionModel",
        "GroupViTVisionConfig",
        depths=[2, 2, 2],
        num_group_tokens=[8, 4, 0],
        num_output_groups=[8, 4, 0],
    ),
    _hf("Blip2VisionModel", "Blip2VisionConfig"),
    _hf("InstructBlipVisionModel", "InstructBlipVisionConfig"),
    _hf("Idefics3VisionTransformer", "Idefics3VisionConfig"),
    _hf("Owlv2VisionModel", "Owlv2VisionConfig"),
    _hf("AlignVisionModel", "AlignVisionConfig"),
    _hf("JanusVisionModel", "JanusVisionConfig"),
    _hf(
        "MobileViTForImageClassification",
        "MobileViTConfig",
        (3, 64, 64),
        hidden_sizes=[32, 48, 64],
        patch_size=2,
        num_attention_heads=4,
    ),
    _hf(
        "PvtForImageClassification",
        "PvtConfig",
        hidden_sizes=[16, 16, 32, 32],
        depths=[1, 1, 2, 1],
        num_attention_heads=[1, 1, 2, 2],
        patch_sizes=[4, 2, 2, 2],
    ),
    _hf("VideoMAEModel", "VideoMAEConfig", (4, 3, 64, 64), num_frames=4),
    _hf("Sam3ViTModel", "Sam3ViTConfig", window_size=4, global_attn_indexes=[1], pretrain_image_size=64),
    _hf("LwDetrViTBackbone", "LwDetrViTConfig"),
    _staged(
        "LevitForImageClassification",
        "LevitConfig",
        (3, 128, 128),
        image_size=128,
        patch_size=16,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 2, 2],
        depths=[2, 2, 2],
        key_dim=[16, 16, 16],
    ),
    _staged(
        "DonutSwinModel",
        "DonutSwinConfig",
        (3, 112, 112),
        image_size=[112, 112],
        embed_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 2],
        patch_size=4,
    ),
)
