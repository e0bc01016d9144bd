"""vformer: classic architectures from one set of encoder parts."""

from __future__ import annotations

from typing import Any

from bench.wild_models import Shape, WildModel, of

_IMAGE = (3, 64, 64)
_FORMER: dict[str, Any] = {"img_size": 64, "patch_size": 8, "n_classes": 10, "in_channels": 3}


def _vformer(path: str, name: str = "", shape: Shape = _IMAGE, **settings: Any) -> WildModel:
    return of("vformer", f"vformer.models.{path}", shape, name=name, **settings)


MODELS = (
    _vformer(
        "classification:VanillaViT", **_FORMER, embedding_dim=32, head_dim=16, depth=3, num_heads=2, encoder_mlp_dim=64
    ),
    _vformer(
        "classification:CCT", **_FORMER, embedding_dim=32, head_dim=16, num_layers=3, num_heads=2, decoder_config=(32,)
    ),
    _vformer(
        "classification:CVT", **_FORMER, embedding_dim=32, head_dim=16, num_layers=3, num_heads=2, decoder_config=(32,)
    ),
    _vformer(
        "classification:ConViT",
        **_FORMER,
        embedding_dim=32,
        head_dim=16,
        depth_sa=1,
        depth_gpsa=2,
        attn_heads_sa=2,
        attn_heads_gpsa=2,
        encoder_mlp_dim=64,
    ),
    _vformer(
        "classification:CrossViT",
        img_size=64,
        patch_size_s=8,
        patch_size_l=16,
        n_classes=10,
        latent_dim_s=32,
        latent_dim_l=32,
        head_dim_s=16,
        head_dim_l=16,
        cross_dim_head_s=16,
        cross_dim_head_l=16,
        depth_s=2,
        depth_l=2,
        attn_heads_s=2,
        attn_heads_l=2,
        cross_head_s=2,
        cross_head_l=2,
        encoder_mlp_dim_s=64,
        encoder_mlp_dim_l=64,
    ),
    _vformer(
        "classification:PVTClassification",
        shape=(3, 224, 224),
        img_size=224,
        n_classes=10,
        embed_dims=[16, 16, 32, 32],
        num_heads=[1, 1, 2, 2],
        mlp_ratio=[2, 2, 2, 2],
        depths=[1, 1, 2, 1],
    ),
    _vformer(
        "classification:SwinTransformer",
        img_size=64,
        patch_size=4,
        in_channels=3,
        n_classes=10,
        embedding_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 2],
        window_size=4,
    ),
    _vformer(
        "classification:ConvVT",
        img_size=64,
        n_classes=10,
        embedding_dim=[16, 16, 32],
        num_heads=[1, 1, 2],
        depth=[1, 1, 3],
    ),
    _vformer(
        "classification:ViViTModel2",
        shape=(8, 3, 32, 32),
        img_size=32,
        in_channels=3,
        patch_size=8,
        embedding_dim=32,
        num_frames=8,
        depth=2,
        num_heads=2,
        head_dim=16,
        n_classes=10,
        mlp_dim=64,
    ),
)
