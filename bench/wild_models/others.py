"""torchvision, open_clip, lightly, segmentation-models-pytorch, RF-DETR, torchgeo."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.wild_models import Calling, WildModel, of

_IMAGE = (3, 64, 64)
_TORCHVISION: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 64,
}
_GEO: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0}


def _timm(**settings: Any) -> nn.Module:
    small = {"img_size": 64, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 0}
    model: nn.Module = importlib.import_module("timm").create_model("vit_tiny_patch16_224", **{**small, **settings})
    return model


def _masked_backbone() -> nn.Module:
    name = "lightly.models.modules.masked_vision_transformer_timm"
    model: nn.Module = importlib.import_module(name).MaskedVisionTransformerTIMM(vit=_timm())
    return model


def _dino_student() -> nn.Module:
    heads = importlib.import_module("lightly.models.modules.heads")
    head = heads.DINOProjectionHead(32, 64, 32, 128)
    return nn.Sequential(_timm(), head)


def _open_clip(**settings: Any) -> nn.Module:
    narrow = {
        "image_size": 64,
        "patch_size": 8,
        "width": 32,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 2.0,
        "output_dim": 16,
    }
    tower: nn.Module = importlib.import_module("open_clip.transformer").VisionTransformer(**{**narrow, **settings})
    return tower


def _whole_clip() -> nn.Module:
    library = importlib.import_module("open_clip.model")
    vision = library.CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=8, image_size=64)
    text = library.CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=2)
    model = library.CLIP(16, vision, text)
    return Calling(model, lambda module, image: module(image, torch.arange(8).repeat(image.shape[0], 1)))


def _rf_detr(num_windows: int) -> nn.Module:
    """RF-DETR's backbone: whole attention in one block of three where there are windows."""
    library = importlib.import_module("rfdetr.models.backbone.dinov2_with_windowed_attn")
    config = library.WindowedDinov2WithRegistersConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=64,
        patch_size=8,
        num_windows=num_windows,
        window_block_indexes=[0, 1] if num_windows > 1 else [],
        out_indices=[3],
    )
    name = "WindowedDinov2WithRegistersBackbone" if num_windows > 1 else "WindowedDinov2WithRegistersModel"
    model: nn.Module = getattr(library, name)(config)
    return model


def _wavelengths(module: nn.Module, image: Tensor) -> Any:
    return module(image, [0.665, 0.56, 0.49])


MODELS = (
    of("torchvision", "torchvision.models.vision_transformer:VisionTransformer", _IMAGE, **_TORCHVISION),
    of(
        "torchvision",
        "torchvision.models.swin_transformer:SwinTransformer",
        (3, 112, 112),
        patch_size=[4, 4],
        embed_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 2],
        window_size=[7, 7],
        num_classes=10,
    ),
    of(
        "torchvision",
        "torchvision.models.swin_transformer:SwinTransformer",
        (3, 128, 128),
        name="SwinTransformer, V2",
        how=None,
        patch_size=[4, 4],
        embed_dim=24,
        depths=[1, 1, 2],
        num_heads=[1, 2, 2],
        window_size=[8, 8],
        num_classes=10,
    ),
    of(
        "torchvision",
        "torchvision.models.maxvit:MaxVit",
        (3, 112, 112),
        input_size=(112, 112),
        stem_channels=16,
        partition_size=7,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=16,
        stochastic_depth_prob=0.0,
        num_classes=10,
    ),
    WildModel("open_clip", "VisionTransformer", _open_clip, (_IMAGE,)),
    WildModel(
        "open_clip",
        "VisionTransformer, attentional pooling",
        partial(_open_clip, attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=2),
        (_IMAGE,),
    ),
    WildModel("open_clip", "CLIP", _whole_clip, (_IMAGE,)),
    of("lightly", "lightly.models.modules.masked_autoencoder:MAEBackbone", _IMAGE, **_TORCHVISION),
    of("lightly", "lightly.models.modules.ijepa:IJEPABackbone", _IMAGE, **_TORCHVISION),
    WildModel("lightly", "MaskedVisionTransformerTIMM", _masked_backbone, (_IMAGE,)),
    WildModel("lightly", "DINOProjectionHead on ViT", _dino_student, (_IMAGE,)),
    of(
        "segmentation-models-pytorch",
        "segmentation_models_pytorch:Unet",
        (3, 64, 64),
        name="Unet on MiT-B0",
        encoder_name="mit_b0",
        encoder_weights=None,
    ),
    of(
        "segmentation-models-pytorch",
        "segmentation_models_pytorch:Segformer",
        (3, 64, 64),
        name="Segformer on MiT-B0",
        encoder_name="mit_b0",
        encoder_weights=None,
    ),
    of(
        "segmentation-models-pytorch",
        "segmentation_models_pytorch:DPT",
        (3, 224, 224),
        name="DPT on ViT-Ti",
        encoder_name="tu-vit_tiny_patch16_224",
        encoder_weights=None,
        decoder_intermediate_channels=(16, 16, 16, 16),
        decoder_fusion_channels=16,
    ),
    of(
        "torchgeo", "torchgeo.models.dofa:DOFA", _IMAGE, how=_wavelengths, **_GEO, num_classes=10, dynamic_embed_dim=128
    ),
    WildModel("rfdetr", "WindowedDinov2WithRegistersModel", partial(_rf_detr, num_windows=1), (_IMAGE,)),
    WildModel("rfdetr", "WindowedDinov2WithRegistersBackbone, windows", partial(_rf_detr, num_windows=2), (_IMAGE,)),
    of("torchgeo", "torchgeo.models.scale_mae:ScaleMAE", _IMAGE, **_GEO),
    of(
        "torchgeo",
        "torchgeo.models.croma:CROMA",
        (2, 64, 64),
        (12, 64, 64),
        encoder_dim=64,
        encoder_depth=4,
        num_heads=16,
        patch_size=8,
        image_size=64,
    ),
    of(
        "torchgeo", "torchgeo.models.changevit:ChangeViT", (2, 3, 64, 64), backbone="vit_small_patch16_224", img_size=64
    ),
    of(
        "torchgeo",
        "torchgeo.models.copernicusfm:CopernicusFM",
        _IMAGE,
        how=lambda module, image: module(
            image,
            torch.full((image.shape[0], 4), float("nan")),
            [665.0, 560.0, 490.0],
            [31.0, 36.0, 66.0],
            None,
            "spectral",
            8,
        ),
        **_GEO,
        num_classes=10,
    ),
)
