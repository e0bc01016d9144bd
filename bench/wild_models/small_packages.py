"""Packages that hold one architecture or a few: ports of a paper, and what people published for themselves."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from bench.wild_models import WildModel, of

_IMAGE = (3, 64, 64)
_EINOPS: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 32,
    "depth": 3,
    "heads": 2,
    "mlp_dim": 64,
    "dim_head": 16,
}
_EMB: dict[str, Any] = {
    "image_size": (64, 64),
    "patch_size": 8,
    "emb_dim": 32,
    "mlp_dim": 64,
    "num_heads": 2,
    "num_layers": 3,
    "num_classes": 10,
}
_DINO: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}
_SWIN: dict[str, Any] = {
    "hidden_dim": 32,
    "layers": (2, 2, 2, 2),
    "heads": (1, 2, 2, 2),
    "num_classes": 10,
    "head_dim": 16,
}


def _clip() -> nn.Module:
    """CLIP's vision tower; the whole model's text tower would only be carried along."""
    settings = {"input_resolution": 64, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "output_dim": 16}
    tower: nn.Module = importlib.import_module("clip.model").VisionTransformer(**settings)
    return tower


def _prisma() -> nn.Module:
    config = importlib.import_module("vit_prisma.configs.HookedViTConfig").HookedViTConfig(
        n_layers=3,
        d_model=32,
        d_head=16,
        d_mlp=64,
        n_heads=2,
        image_size=64,
        patch_size=8,
        n_classes=10,
        activation_name="gelu",
    )
    model: nn.Module = importlib.import_module("vit_prisma.models.base_vit").HookedViT(config)
    for name, parameter in model.named_parameters():
        if "b_" in name:  # the library leaves biases as the memory was
            nn.init.zeros_(parameter)
    return model


MODELS = (
    of(
        "vision-transformers",
        "vision_transformers.models.vit:ViT",
        _IMAGE,
        img_size=64,
        patch_size=8,
        num_classes=10,
        embed_dim=32,
        mlp_in=32,
        mlp_ratio=2,
        mlp_out=32,
        depth=3,
        num_heads=2,
        dim_head=16,
    ),
    of(
        "vision-transformers",
        "vision_transformers.models.swin_transformer:SwinTransformer",
        (3, 112, 112),
        img_size=112,
        num_classes=10,
        embed_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 2],
    ),
    of(
        "hiera-transformer",
        "hiera.hiera:Hiera",
        (3, 224, 224),
        embed_dim=32,
        num_heads=1,
        stages=(1, 1, 2, 1),
        num_classes=10,
    ),
    of(
        "fastervit",
        "fastervit.models.faster_vit:FasterViT",
        (3, 224, 224),
        depths=[1, 1, 2, 1],
        num_heads=[2, 2, 2, 2],
        window_size=[7, 7, 7, 7],
        ct_size=2,
        dim=16,
        in_dim=16,
        mlp_ratio=2,
        resolution=224,
        num_classes=10,
    ),
    of(
        "distillable-vision-transformer",
        "distillable_vision_transformer.model:DistillableVisionTransformer",
        _IMAGE,
        **_EMB,
    ),
    of("vit-hk", "ViT.core:ViT", _IMAGE, img_size=64, patch_size=8, num_classes=10, embed_dim=32, depth=3, num_heads=2),
    of("mega-vit", "mega_vit.main:MegaVit", _IMAGE, **_EINOPS),
    of(
        "rvit",
        "rvit.registered_vision_transformer:RegisteredVisionTransformer",
        _IMAGE,
        image_size=64,
        patch_size=8,
        num_layers=3,
        num_heads=2,
        hidden_dim=32,
        num_registers=4,
        mlp_dim=64,
        num_classes=10,
    ),
    of(
        "s2vit",
        "s2vit.transformer:S2ViT",
        _IMAGE,
        depths=(1, 1, 2, 1),
        dims=(16, 16, 32, 32),
        dim_head=16,
        window_sizes=(8, 4, 2, 2),
        num_classes=10,
        global_pool=True,
    ),
    of(
        "visionkan",
        "VisionKAN.kit:vit_models",
        _IMAGE,
        img_size=64,
        patch_size=8,
        num_classes=10,
        embed_dim=32,
        depth=3,
        num_heads=2,
        qkv_bias=True,
    ),
    of("swin-transformer-pytorch", "swin_transformer_pytorch.swin_transformer:SwinTransformer", (3, 224, 224), **_SWIN),
    of(
        "dinov2",
        "dinov2.models.vision_transformer:DinoVisionTransformer",
        _IMAGE,
        **_DINO,
        block_chunks=0,
        init_values=1.0,
    ),
    of(
        "dinov2",
        "dinov2.models.vision_transformer:DinoVisionTransformer",
        _IMAGE,
        name="DinoVisionTransformer, SwiGLU",
        **_DINO,
        block_chunks=1,
        ffn_layer="swiglufused",
    ),
    of(
        "depth-anything-3",
        "depth_anything_3.model.dinov2.vision_transformer:DinoVisionTransformer",
        (1, 3, 64, 64),
        name="DinoVisionTransformer",
        how=lambda module, x: module.get_intermediate_layers(x, n=[2]),
        **_DINO,
        block_chunks=0,
    ),
    of(
        "sam3",
        "sam3.model.vitdet:ViT",
        (3, 128, 128),
        img_size=128,
        patch_size=8,
        embed_dim=32,
        depth=3,
        num_heads=2,
        window_size=4,
        global_att_blocks=(1, 2),
        rel_pos_blocks=(),
        use_rope=True,
        pretrain_img_size=128,
    ),
    WildModel("openai-clip", "VisionTransformer", _clip, (_IMAGE,)),
    WildModel("vit-prisma", "HookedViT", _prisma, (_IMAGE,)),
    of(
        "pytorchvideo",
        "pytorchvideo.models.vision_transformers:create_multiscale_vision_transformers",
        (3, 8, 64, 64),
        name="MultiscaleVisionTransformers",
        spatial_size=64,
        temporal_size=8,
        depth=3,
        patch_embed_dim=32,
        num_heads=2,
        head_num_classes=10,
    ),
    of(
        "pytorchvideo",
        "pytorchvideo.models.vision_transformers:create_multiscale_vision_transformers",
        (3, 64, 64),
        name="MultiscaleVisionTransformers, images",
        spatial_size=64,
        temporal_size=1,
        depth=3,
        patch_embed_dim=32,
        num_heads=2,
        head_num_classes=10,
        use_2d_patch=True,
        conv_patch_embed_kernel=(7, 7),
        conv_patch_embed_stride=(4, 4),
        conv_patch_embed_padding=(3, 3),
    ),
)
