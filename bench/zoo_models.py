"""The zoo: vision models of every kind that users bring, each in full and at reduced depth.

What it holds is a matter of the bench alone; the compiler knows none of these names.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Call = Mapping[str, Tensor]
"""Keyword arguments of one call, two images; empty where the model's own configuration tells."""


@dataclass(frozen=True)
class ZooModel:
    """One row. build(reduced) makes it in eval mode; call is how it is called, in full and reduced alike."""

    name: str
    library: str
    family: str
    build: Callable[[bool], nn.Module]
    call: Call | None = None


def timm_model(name: str, family: str, /, **reduced: Any) -> ZooModel:
    """reduced: arguments of timm.create_model that make it small; none where it is small enough as it is."""
    return ZooModel(name, "timm", family, partial(_timm, name, reduced))


def hf_model(
    name: str, family: str, model: str, config: str, call: Call | None = None, full: Any = None, **reduced: Any
) -> ZooModel:
    """model, config: names of transformers' classes. full: arguments of the configuration, also when reduced."""
    return ZooModel(name, "transformers", family, partial(_hf, model, config, full or {}, reduced), call)


def _timm(name: str, reduced: dict[str, Any], small: bool) -> nn.Module:
    model: nn.Module = importlib.import_module("timm").create_model(name, **(reduced if small else {}))
    return model.eval()


def _hf(model: str, config: str, full: dict[str, Any], reduced: dict[str, Any], small: bool) -> nn.Module:
    transformers = importlib.import_module("transformers")
    settings = getattr(transformers, config)(**{**full, **(reduced if small else {})})
    return getattr(transformers, model)(settings).eval()


def _torchvision(name: str, small: bool) -> nn.Module:
    model = getattr(importlib.import_module("torchvision.models"), name)().eval()
    if small and hasattr(model, "encoder"):
        del model.encoder.layers[3:]
    return model


def _open_clip(name: str, small: bool) -> nn.Module:
    whole = importlib.import_module("open_clip").create_model(name)
    if small and hasattr(whole.visual, "transformer"):
        del whole.visual.transformer.resblocks[3:]
    return whole.visual.eval()


def _scratch(small: bool) -> nn.Module:
    from bench.scratch_vit import ScratchViT

    return ScratchViT(depth=3 if small else 12).eval()


_THREE = {"depth": 3}
_LAYERS = {"num_hidden_layers": 3}
_STAGES = {"depths": (1, 1, 2, 1)}
_VIDEO = {"pixel_values": torch.zeros(2, 16, 3, 224, 224)}
_PIXELS = {"pixel_values": torch.zeros(2, 3, 224, 224)}

PLAIN = (
    timm_model("vit_base_patch16_224", "ViT", **_THREE),
    timm_model("vit_large_patch16_384", "ViT", **_THREE, embed_dim=256, num_heads=4),
    timm_model("deit_small_patch16_224", "DeiT", **_THREE),
    timm_model("deit_base_distilled_patch16_224", "DeiT", **_THREE),
    timm_model("deit3_base_patch16_224", "DeiT III", **_THREE),
    timm_model("vit_base_patch16_clip_224", "CLIP", **_THREE),
    timm_model("vit_base_patch16_siglip_224", "SigLIP", **_THREE),
    timm_model("vit_base_patch16_siglip_gap_224", "SigLIP", **_THREE),
    timm_model("vit_base_patch14_dinov2", "DINOv2", **_THREE, img_size=224),
    timm_model("vit_base_patch14_reg4_dinov2", "DINOv2", **_THREE, img_size=224),
    timm_model("vit_medium_patch16_gap_256", "ViT", **_THREE),
    timm_model("vit_betwixt_patch16_reg4_gap_256", "ViT", **_THREE),
    timm_model("vit_base_patch16_rpn_224", "ViT, norms behind", **_THREE),
    timm_model("vit_small_patch16_18x2_224", "ViT, parallel blocks", **_THREE),
    timm_model("vit_base_patch16_xp_224", "ViT, parallel branches", **_THREE),
    timm_model("vit_pe_core_base_patch16_224", "Perception Encoder", **_THREE),
    timm_model("vit_pe_spatial_base_patch16_512", "Perception Encoder", **_THREE, img_size=224),
    timm_model("aimv2_large_patch14_224", "AIMv2", **_THREE, embed_dim=256, num_heads=4),
    timm_model("beit3_base_patch16_224", "BEiT-3", **_THREE),
    timm_model("flexivit_base", "FlexiViT", **_THREE),
    timm_model("naflexvit_base_patch16_gap", "NaFlexViT", **_THREE),
    timm_model("vit_small_r26_s32_224", "hybrid ViT", **_THREE),
    timm_model("eva_large_patch14_196", "EVA", **_THREE, embed_dim=256, num_heads=4),
    ZooModel("vit_b_16", "torchvision", "ViT", partial(_torchvision, "vit_b_16"), {"x": torch.zeros(2, 3, 224, 224)}),
    ZooModel("ViT-B-32", "open_clip", "CLIP", partial(_open_clip, "ViT-B-32"), {"x": torch.zeros(2, 3, 224, 224)}),
    ZooModel("scratch (einops)", "none", "ViT", _scratch, {"image": torch.zeros(2, 3, 224, 224)}),
    hf_model("ViT", "ViT", "ViTForImageClassification", "ViTConfig", **_LAYERS),
    hf_model("DeiT", "DeiT", "DeiTForImageClassification", "DeiTConfig", **_LAYERS),
    hf_model("ViT-MSN", "ViT", "ViTMSNForImageClassification", "ViTMSNConfig", **_LAYERS),
    hf_model("I-JEPA", "ViT", "IJepaForImageClassification", "IJepaConfig", **_LAYERS),
    hf_model("DINOv2", "DINOv2", "Dinov2ForImageClassification", "Dinov2Config", **_LAYERS),
    hf_model("DINOv2 + registers", "DINOv2", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **_LAYERS),
    hf_model("CLIP vision", "CLIP", "CLIPVisionModelWithProjection", "CLIPVisionConfig", **_LAYERS),
    hf_model("MetaCLIP 2 vision", "CLIP", "MetaClip2VisionModel", "MetaClip2VisionConfig", **_LAYERS),
    hf_model("AltCLIP vision", "CLIP", "AltCLIPVisionModel", "AltCLIPVisionConfig", **_LAYERS),
    hf_model("SigLIP vision", "SigLIP", "SiglipVisionModel", "SiglipVisionConfig", **_LAYERS),
    hf_model("AIMv2 vision", "AIMv2", "Aimv2VisionModel", "Aimv2VisionConfig", **_LAYERS, hidden_size=256),
    hf_model("MLCD vision", "MLCD", "MLCDVisionModel", "MLCDVisionConfig", **_LAYERS),
    hf_model("BLIP vision", "BLIP", "BlipVisionModel", "BlipVisionConfig", **_LAYERS),
    hf_model("InternVL vision", "InternVL", "InternVLVisionModel", "InternVLVisionConfig", **_LAYERS, hidden_size=256),
)

POSITIONS = (
    timm_model("eva02_base_patch14_224", "EVA-02 (rotary)", **_THREE),
    timm_model("vit_small_patch16_dinov3", "DINOv3 (rotary)", **_THREE),
    timm_model("vit_base_patch16_rope_224", "RoPE-ViT", **_THREE),
    timm_model("vit_base_patch16_rope_mixed_224", "RoPE-ViT (mixed)", **_THREE),
    timm_model("vit_mediumd_patch16_rope_reg1_gap_256", "RoPE-ViT", **_THREE),
    timm_model("beit_base_patch16_224", "BEiT (relative bias)", **_THREE),
    timm_model("beitv2_base_patch16_224", "BEiT (relative bias)", **_THREE),
    timm_model("vit_relpos_base_patch16_224", "relpos ViT", **_THREE),
    timm_model("vit_srelpos_medium_patch16_224", "shared relpos ViT (MLP)", **_THREE),
    hf_model("BEiT", "BEiT (relative bias)", "BeitForImageClassification", "BeitConfig", **_LAYERS),
    hf_model(
        "Data2Vec",
        "Data2Vec (shared bias)",
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        full={"use_shared_relative_position_bias": True},
        **_LAYERS,
    ),
    hf_model("DINOv3", "DINOv3 (rotary)", "DINOv3ViTModel", "DINOv3ViTConfig", **_LAYERS),
)

OTHER_GRIDS = (
    hf_model("VideoMAE", "tubelets", "VideoMAEForVideoClassification", "VideoMAEConfig", _VIDEO, **_LAYERS),
    hf_model(
        "ViViT",
        "tubelets",
        "VivitForVideoClassification",
        "VivitConfig",
        {"pixel_values": torch.zeros(2, 32, 3, 224, 224)},
        **_LAYERS,
        hidden_size=192,
        num_attention_heads=3,
        intermediate_size=384,
    ),
    hf_model(
        "AST",
        "spectrogram",
        "ASTForAudioClassification",
        "ASTConfig",
        {"input_values": torch.zeros(2, 1024, 128)},
        **_LAYERS,
    ),
    hf_model(
        "TimeSformer",
        "video",
        "TimesformerModel",
        "TimesformerConfig",
        {"pixel_values": torch.zeros(2, 8, 3, 224, 224)},
        **_LAYERS,
    ),
)

DENSE = (
    hf_model("YOLOS", "detection", "YolosForObjectDetection", "YolosConfig", **_LAYERS),
    hf_model("DPT", "depth", "DPTForDepthEstimation", "DPTConfig", full={"is_hybrid": False}),
    hf_model("Depth Anything", "depth", "DepthAnythingForDepthEstimation", "DepthAnythingConfig", _PIXELS),
    hf_model(
        "ViTPose", "pose", "VitPoseForPoseEstimation", "VitPoseConfig", {"pixel_values": torch.zeros(2, 3, 256, 192)}
    ),
    hf_model("OWL-ViT vision", "detection", "OwlViTVisionModel", "OwlViTVisionConfig", **_LAYERS),
    hf_model("ViT-MAE", "masked autoencoder", "ViTMAEModel", "ViTMAEConfig", **_LAYERS),
)

TWO_STREAMS = (
    timm_model("crossvit_9_240", "CrossViT"),
    timm_model("crossvit_small_240", "CrossViT"),
    timm_model("cait_xxs24_224", "CaiT (talking heads)", **_THREE),
    timm_model("xcit_tiny_12_p16_224", "XCiT (channels)", **_THREE),
    timm_model("convit_tiny", "ConViT (gated)"),
    timm_model("tnt_s_patch16_224", "TNT", **_THREE),
    timm_model("volo_d1_224", "VOLO"),
    timm_model("mixer_b16_224", "MLP-Mixer"),
)

HIERARCHICAL = (
    timm_model("pit_b_224", "PiT"),
    timm_model("pit_s_distilled_224", "PiT"),
    timm_model("vitamin_small_224", "ViTamin"),
    timm_model("levit_128", "LeViT", depth=(1, 1, 1)),
    timm_model("visformer_small", "Visformer", depth=(1, 1, 1)),
    timm_model("coat_lite_tiny", "CoaT", serial_depths=(1, 1, 1, 1)),
    timm_model("efficientformer_l1", "EfficientFormer"),
    timm_model("mobilevit_s", "MobileViT"),
    timm_model("swin_tiny_patch4_window7_224", "Swin", **_STAGES),
    timm_model("swinv2_tiny_window8_256", "Swin V2", **_STAGES),
    timm_model("swin_s3_tiny_224", "Swin S3", **_STAGES),
    timm_model("maxvit_tiny_tf_224", "MaxViT", **_STAGES),
    timm_model("hiera_tiny_224", "Hiera"),
    timm_model("mvitv2_tiny", "MViT V2"),
    timm_model("pvt_v2_b0", "PVT V2"),
    timm_model("twins_svt_small", "Twins", **_STAGES),
    timm_model("davit_tiny", "DaViT", **_STAGES),
    timm_model("nest_tiny", "NesT"),
    timm_model("samvit_base_patch16", "SAM", **_THREE, img_size=224, global_attn_indexes=(1, 2)),
    timm_model("sam2_hiera_tiny", "SAM 2"),
    timm_model("tiny_vit_5m_224", "TinyViT"),
    timm_model("nextvit_small", "Next-ViT"),
    timm_model("gcvit_xxtiny", "GC ViT"),
    ZooModel("swin_t", "torchvision", "Swin", partial(_torchvision, "swin_t"), {"x": torch.zeros(2, 3, 224, 224)}),
    hf_model("Swin", "Swin", "SwinForImageClassification", "SwinConfig", depths=[1, 1, 2, 1]),
    hf_model("Swin V2", "Swin V2", "Swinv2ForImageClassification", "Swinv2Config", depths=[1, 1, 2, 1]),
    hf_model("Hiera", "Hiera", "HieraForImageClassification", "HieraConfig"),
    hf_model("PVT V2", "PVT V2", "PvtV2ForImageClassification", "PvtV2Config", _PIXELS),
    hf_model("SegFormer", "SegFormer", "SegformerForImageClassification", "SegformerConfig", _PIXELS),
    hf_model(
        "ViTDet",
        "ViTDet",
        "VitDetModel",
        "VitDetConfig",
        _PIXELS,
        full={"window_size": 7, "window_block_indices": [0, 1]},
        **_LAYERS,
    ),
    hf_model("SAM vision", "SAM", "SamVisionModel", "SamVisionConfig", full={"image_size": 512}, **_LAYERS),
)

NO_ATTENTION = (
    timm_model("resnet50", "convolutions alone"),
    timm_model("convnext_tiny", "convolutions alone", **_STAGES),
)

GROUPS = {
    "plain": PLAIN,
    "positions inside attention": POSITIONS,
    "video, audio": OTHER_GRIDS,
    "dense outputs": DENSE,
    "two streams, other mixers": TWO_STREAMS,
    "hierarchical, windowed": HIERARCHICAL,
    "without attention": NO_ATTENTION,
}
ZOO = tuple(model for group in GROUPS.values() for model in group)
