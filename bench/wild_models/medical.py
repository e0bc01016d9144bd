"""MONAI: vision transformers for volumes and slices of medical imaging."""

from __future__ import annotations

from typing import Any

from bench.wild_models import Shape, WildModel, of

_NARROW: dict[str, Any] = {"hidden_size": 48, "mlp_dim": 96, "num_heads": 2}
_VOLUME = (1, 32, 32, 32)


def _net(path: str, shape: Shape, /, name: str = "", **settings: Any) -> WildModel:
    return of("monai", f"monai.networks.nets.{path}", shape, name=name, **settings)


MODELS = (
    _net("vit:ViT", _VOLUME, in_channels=1, img_size=(32,) * 3, patch_size=8, num_layers=3, **_NARROW),
    _net(
        "vit:ViT",
        _VOLUME,
        name="ViT, classification",
        in_channels=1,
        img_size=(32,) * 3,
        patch_size=8,
        num_layers=3,
        classification=True,
        **_NARROW,
    ),
    _net(
        "vit:ViT",
        (3, 64, 64),
        name="ViT, 2D",
        in_channels=3,
        img_size=64,
        patch_size=8,
        num_layers=3,
        spatial_dims=2,
        classification=True,
        pos_embed_type="sincos",
        **_NARROW,
    ),
    _net(
        "vit:ViT",
        (3, 64, 64),
        name="ViT, perceptron",
        in_channels=3,
        img_size=64,
        patch_size=8,
        num_layers=3,
        spatial_dims=2,
        proj_type="perceptron",
        **_NARROW,
    ),
    _net(
        "vit:ViT",
        (3, 64, 64),
        name="ViT, keeps attention",
        in_channels=3,
        img_size=64,
        patch_size=8,
        num_layers=3,
        spatial_dims=2,
        save_attn=True,
        **_NARROW,
    ),
    _net("vitautoenc:ViTAutoEnc", _VOLUME, in_channels=1, img_size=(32,) * 3, patch_size=4, num_layers=3, **_NARROW),
    _net(
        "vitautoenc:ViTAutoEnc",
        (1, 64, 64),
        name="ViTAutoEnc, 2D",
        in_channels=1,
        img_size=(64, 64),
        patch_size=4,
        num_layers=3,
        spatial_dims=2,
        **_NARROW,
    ),
    _net("unetr:UNETR", _VOLUME, in_channels=1, out_channels=2, img_size=32, feature_size=8, **_NARROW),
    _net(
        "unetr:UNETR",
        (1, 64, 64),
        name="UNETR, 2D",
        in_channels=1,
        out_channels=2,
        img_size=64,
        feature_size=8,
        spatial_dims=2,
        **_NARROW,
    ),
    _net("swin_unetr:SwinUNETR", (1, 32, 32, 32), in_channels=1, out_channels=2, feature_size=12, depths=(1, 1, 1, 1)),
    _net(
        "swin_unetr:SwinUNETR",
        (1, 128, 128),
        name="SwinUNETR, 2D",
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        spatial_dims=2,
    ),
    _net(
        "swin_unetr:SwinUNETR",
        (1, 128, 128),
        name="SwinUNETR, V2",
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(1, 1, 1, 1),
        spatial_dims=2,
        use_v2=True,
    ),
    _net(
        "swin_unetr:SwinTransformer",
        (1, 112, 112),
        in_chans=1,
        embed_dim=24,
        window_size=(7, 7),
        patch_size=(2, 2),
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 2, 2),
        spatial_dims=2,
    ),
    _net(
        "restormer:Restormer", (3, 32, 32), dim=16, num_blocks=(1, 1, 1, 1), heads=(1, 1, 2, 2), num_refinement_blocks=1
    ),
    _net(
        "masked_autoencoder_vit:MaskedAutoEncoderViT",
        (1, 64, 64),
        in_channels=1,
        img_size=64,
        patch_size=8,
        spatial_dims=2,
        num_layers=3,
        decoder_hidden_size=32,
        decoder_mlp_dim=64,
        decoder_num_layers=2,
        decoder_num_heads=2,
        **_NARROW,
    ),
    _net(
        "autoencoderkl:AutoencoderKL",
        (1, 32, 32),
        spatial_dims=2,
        num_res_blocks=(1, 1),
        channels=(16, 32),
        attention_levels=(False, True),
        norm_num_groups=8,
    ),
)
