"""Small HuggingFace vision models with live weights, from their configurations alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from bench.live_weights import enliven

SIDE, PATCH = 64, 8
COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": SIDE,
    "patch_size": PATCH,
}
VIDEO = {"num_frames": 4}
RELATIVE = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
AUDIO = {"num_mel_bins": 32, "max_length": 64, "frequency_stride": PATCH, "time_stride": PATCH}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {}),
    "beit": ("BeitForImageClassification", "BeitConfig", {"use_relative_position_bias": True}),
    "data2vec": ("Data2VecVisionForImageClassification", "Data2VecVisionConfig", RELATIVE),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}),
    "dinov2-registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {}),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "msn": ("ViTMSNForImageClassification", "ViTMSNConfig", {}),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", {}),
    "yolos": ("YolosForObjectDetection", "YolosConfig", {"image_size": [SIDE, SIDE], "num_detection_tokens": 10}),
    "videomae": ("VideoMAEForVideoClassification", "VideoMAEConfig", VIDEO),
    "vivit": ("VivitForVideoClassification", "VivitConfig", {**VIDEO, "tubelet_size": [2, PATCH, PATCH]}),
    "ast": ("ASTForAudioClassification", "ASTConfig", AUDIO),
}


def build(name: str, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """attention: transformers' attn_implementation, "sdpa" or "eager"."""
    class_name, config_name, extra = MODELS[name]
    config = getattr(transformers, config_name)(**{**COMMON, **extra}, attn_implementation=attention)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, class_name)(config)
    return enliven(model, seed).eval()


def inputs(name: str, batch: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "ast":
        return {"input_values": torch.randn(batch, 64, 32, generator=generator)}
    frames = (4,) if name in ("videomae", "vivit") else ()
    return {"pixel_values": torch.randn(batch, *frames, 3, SIDE, SIDE, generator=generator)}
