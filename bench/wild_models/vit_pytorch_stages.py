"""vit-pytorch: the classes with stages, windows, or two streams."""

from __future__ import annotations

from typing import Any

from bench.wild_models import Shape, WildModel, of

_IMAGE = (3, 64, 64)
_CCT = {"img_size": 64, "embedding_dim": 32, "num_layers": 3, "num_heads": 2, "mlp_ratio": 2, "num_classes": 10}


def _other(module: str, name: str, /, *shapes: Shape, called: str = "", **settings: Any) -> WildModel:
    told = called or f"{module}.{name}"
    return of("vit-pytorch", f"vit_pytorch.{module}:{name}", *(shapes or (_IMAGE,)), name=told, **settings)


MODELS = (
    _other("vat_siglip", "SigLIP", image_size=64, patch_size=8, dim=32, depth=3, heads=2, mlp_dim=64),
    _other(
        "look_vit",
        "LookViT",
        (3, 96, 96),
        dim=32,
        image_size=96,
        num_classes=10,
        depth=2,
        heads=2,
        dim_head=16,
        cross_attn_heads=2,
        cross_attn_dim_head=16,
    ),
    _other(
        "looped_vit",
        "LoopedViT",
        image_size=64,
        patch_size=8,
        num_classes=10,
        dim=32,
        pre_loop_depth=1,
        num_looped_blocks=1,
        post_loop_depth=1,
        loop_depth=2,
        heads=2,
        dim_head=16,
        mlp_dim=64,
    ),
    _other(
        "wwt",
        "WWT",
        image_size=64,
        patch_size=8,
        num_classes=10,
        dim=32,
        depth=3,
        num_slots=4,
        heads=2,
        dim_head=16,
        mlp_dim=64,
    ),
    _other("cct", "CCT", **_CCT),
    _other("cct_3d", "CCT", (3, 8, 32, 32), **{**_CCT, "img_size": 32}, num_frames=8),
    _other(
        "cvt", "CvT", num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=32, s2_heads=2, s3_heads=2, s3_depth=3
    ),
    _other(
        "levit",
        "LeViT",
        (3, 128, 128),
        image_size=128,
        num_classes=10,
        dim=(32, 48),
        depth=2,
        heads=2,
        mlp_mult=2,
        stages=2,
        dim_key=16,
        dim_value=16,
    ),
    _other(
        "nest",
        "NesT",
        image_size=64,
        patch_size=4,
        dim=32,
        heads=2,
        num_hierarchies=3,
        block_repeats=(1, 1, 2),
        num_classes=10,
        dim_head=16,
    ),
    _other(
        "cross_vit",
        "CrossViT",
        image_size=64,
        num_classes=10,
        sm_dim=32,
        lg_dim=48,
        sm_patch_size=8,
        sm_enc_depth=1,
        sm_enc_heads=2,
        sm_enc_mlp_dim=64,
        sm_enc_dim_head=16,
        lg_patch_size=16,
        lg_enc_depth=2,
        lg_enc_heads=2,
        lg_enc_mlp_dim=64,
        lg_enc_dim_head=16,
        cross_attn_depth=1,
        cross_attn_heads=2,
        cross_attn_dim_head=16,
        depth=2,
    ),
    _other(
        "crossformer",
        "CrossFormer",
        (3, 224, 224),
        num_classes=10,
        dim=(32, 32, 64, 64),
        depth=(1, 1, 2, 1),
    ),
    _other("max_vit", "MaxViT", (3, 112, 112), num_classes=10, dim=16, depth=(1, 1), dim_head=16, dim_conv_stem=16),
    _other(
        "max_vit_with_registers",
        "MaxViT",
        (3, 112, 112),
        num_classes=10,
        dim=16,
        depth=(1, 1),
        dim_head=16,
        dim_conv_stem=16,
    ),
    _other(
        "mobile_vit",
        "MobileViT",
        image_size=(64, 64),
        dims=[32, 48, 64],
        num_classes=10,
        channels=[8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
    ),
    _other(
        "regionvit", "RegionViT", (3, 112, 112), dim=(16, 16, 32, 32), depth=(1, 1, 2, 1), window_size=7, num_classes=10
    ),
    _other(
        "scalable_vit",
        "ScalableViT",
        num_classes=10,
        dim=16,
        heads=(1, 2, 2, 2),
        depth=(1, 1, 2, 1),
        reduction_factor=(8, 4, 2, 1),
        window_size=(8, 8, None, None),
    ),
    _other(
        "sep_vit", "SepViT", (3, 224, 224), num_classes=10, dim=16, dim_head=16, heads=(1, 2, 2, 2), depth=(1, 1, 2, 1)
    ),
    _other(
        "twins_svt",
        "TwinsSVT",
        (3, 224, 224),
        num_classes=10,
        s1_emb_dim=16,
        s2_emb_dim=16,
        s3_emb_dim=32,
        s4_emb_dim=32,
        s3_depth=2,
        s4_depth=1,
    ),
    _other(
        "t2t",
        "T2TViT",
        dim=32,
        image_size=64,
        depth=3,
        heads=2,
        mlp_dim=64,
        dim_head=16,
        num_classes=10,
        t2t_layers=((7, 4), (3, 2)),
    ),
)
