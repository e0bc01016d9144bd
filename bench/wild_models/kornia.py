"""kornia, Segment Anything and what was derived from it."""

from __future__ import annotations

from typing import Any

from bench.wild_models import WildModel, of

_SAM: dict[str, Any] = {"img_size": 128, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "out_chans": 16}
_WINDOWS = {"use_rel_pos": True, "window_size": 7, "global_attn_indexes": (1, 2)}


def _sam(library: str, path: str, name: str, **settings: Any) -> WildModel:
    return of(library, f"{path}:ImageEncoderViT", (3, 128, 128), name=name, **{**_SAM, **settings})


MODELS = (
    of(
        "kornia",
        "kornia.models.vit:VisionTransformer",
        (3, 64, 64),
        image_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
    ),
    of(
        "kornia",
        "kornia.models.vit:VisionTransformer",
        (3, 64, 64),
        name="VisionTransformer, first token",
        how=lambda module, image: module(image)[:, 0],
        image_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
    ),
    of("kornia", "kornia.models.vit_mobile:MobileViT", (3, 64, 64), mode="xxs"),
    of(
        "kornia",
        "kornia.models.tiny_vit:TinyViT",
        (3, 224, 224),
        embed_dims=(32, 32, 64, 64),
        depths=(1, 1, 2, 1),
        num_heads=(1, 2, 2, 2),
        num_classes=10,
    ),
    of(
        "kornia",
        "kornia.models.efficient_vit.backbone:EfficientViTBackbone",
        (3, 64, 64),
        width_list=[8, 16, 32, 32],
        depth_list=[1, 1, 1, 2],
        dim=16,
    ),
    of(
        "kornia",
        "kornia.feature.dedode.transformer.dinov2:DinoVisionTransformer",
        (3, 64, 64),
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2.0,
        block_chunks=0,
        init_values=1.0,
    ),
    of(
        "kornia",
        "kornia.feature.dedode.transformer.dinov2:DinoVisionTransformer",
        (3, 64, 64),
        name="DinoVisionTransformer, chunks",
        img_size=64,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        mlp_ratio=2.0,
        block_chunks=1,
        ffn_layer="swiglufused",
    ),
    _sam("kornia", "kornia.models.sam.architecture.image_encoder", "ImageEncoderViT"),
    _sam("kornia", "kornia.models.sam.architecture.image_encoder", "ImageEncoderViT, windows", **_WINDOWS),
    of(
        "kornia",
        "kornia.feature.loftr.loftr:LoFTR",
        (1, 64, 64),
        (1, 64, 64),
        pretrained=None,
        how=lambda module, a, b: module.backbone(a),
    ),
    _sam("segment-anything", "segment_anything.modeling.image_encoder", "ImageEncoderViT"),
    _sam("segment-anything", "segment_anything.modeling.image_encoder", "ImageEncoderViT, windows", **_WINDOWS),
    _sam("segment-anything-hq", "segment_anything_hq.modeling.image_encoder", "ImageEncoderViT", **_WINDOWS),
    _sam("mobile-sam", "mobile_sam.modeling.image_encoder", "ImageEncoderViT", **_WINDOWS),
)
