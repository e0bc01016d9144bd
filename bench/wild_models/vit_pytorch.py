"""vit-pytorch: a class a paper, in plain einops."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from bench.wild_models import Calling, Shape, WildModel, of

_IMAGE = (3, 64, 64)
_PLAIN: dict[str, Any] = {"num_classes": 10, "dim": 32, "depth": 3, "heads": 2, "mlp_dim": 64, "dim_head": 16}


def _vit(module: str, name: str, /, *shapes: Shape, called: str = "", **settings: Any) -> WildModel:
    """An entry with ViT's arguments: 64 patches of 8×8."""
    everything = {"image_size": 64, "patch_size": 8, **_PLAIN, **settings}
    kept = {key: value for key, value in everything.items() if value is not None}
    told = called or f"{module}.{name}"
    return of("vit-pytorch", f"vit_pytorch.{module}:{name}", *(shapes or (_IMAGE,)), name=told, **kept)


def _around(module: str, name: str, /, **settings: Any) -> nn.Module:
    """A class that takes a ViT as its first argument, or its encoder."""
    plain = importlib.import_module("vit_pytorch.vit").ViT(image_size=64, patch_size=8, **_PLAIN)
    return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(plain, **settings)


def _video_wrapper() -> nn.Module:
    return _around("accept_video_wrapper", "AcceptVideoWrapper", add_time_pos_emb=True, time_seq_len=4, dim_emb=10)


def _mae() -> nn.Module:
    vit = importlib.import_module("vit_pytorch.vit").ViT(image_size=64, patch_size=8, **_PLAIN)
    return importlib.import_module("vit_pytorch.mae").MAE(encoder=vit, decoder_dim=32, decoder_heads=2)


def _simmim() -> nn.Module:
    vit = importlib.import_module("vit_pytorch.vit").ViT(image_size=64, patch_size=8, **_PLAIN)
    return importlib.import_module("vit_pytorch.simmim").SimMIM(encoder=vit)


def _efficient() -> nn.Module:
    encoder = importlib.import_module("vit_pytorch.simple_vit").Transformer(32, 3, 2, 16, 64)
    vit = importlib.import_module("vit_pytorch.efficient").ViT
    return vit(image_size=64, patch_size=8, num_classes=10, dim=32, transformer=encoder)


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    vit = importlib.import_module("vit_pytorch.efficient").ViT
    return vit(image_size=64, patch_size=8, num_classes=10, dim=32, transformer=nn.TransformerEncoder(layer, 3))


def _distillable() -> nn.Module:
    distill = importlib.import_module("vit_pytorch.distill")
    student = distill.DistillableViT(image_size=64, patch_size=8, **_PLAIN)
    token = nn.Parameter(importlib.import_module("torch").randn(1, 32))
    whole = Calling(student, lambda module, image: module(image, distill_token=module.token))
    student.register_parameter("token", token)
    return whole


_SPACE = {"image_size": 32, "image_patch_size": 8, "patch_size": None, "frames": 8, "frame_patch_size": 2}
_VIDEO = (3, 8, 32, 32)
_ND: dict[str, Any] = {"image_size": None, "ndim": 2, "input_shape": (64, 64)}
_ND3: dict[str, Any] = {"image_size": None, "ndim": 3, "input_shape": (8, 32, 32), "patch_size": (2, 8, 8)}

MODELS = (
    _vit("vit", "ViT"),
    _vit("vit", "ViT", called="vit.ViT, mean", pool="mean"),
    _vit("simple_vit", "SimpleViT"),
    _vit("simple_vit_with_register_tokens", "SimpleViT"),
    _vit("simple_vit_with_qk_norm", "SimpleViT"),
    _vit("simple_vit_with_patch_dropout", "SimpleViT"),
    _vit("simple_vit_with_fft", "SimpleViT", freq_patch_size=8),
    _vit("simple_vit_with_hyper_connections", "SimpleViT", num_residual_streams=2),
    _vit("simple_vit_with_relative_proj_pos_bias", "SimpleViT"),
    _vit("simple_vit_with_sparse_gating", "SimpleViTWithSparseGating"),
    _vit("simple_vit_with_specialized_cls", "SimpleViT"),
    _vit("simple_vit_with_value_residual", "SimpleViT"),
    _vit("simple_vit_attn_residual", "SimpleViTAttnResidual"),
    _vit("attn_residual_with_dca_simple_vit", "SimpleViT"),
    _vit("simple_vit_orthog_residual_update", "SimpleViT"),
    _vit("simple_flash_attn_vit", "SimpleViT", use_flash=True),
    _vit("simple_flash_attn_vit_3d", "SimpleViT", _VIDEO, **_SPACE),
    _vit("simple_uvit", "SimpleUViT", depth=4),
    _vit("simple_vit_1d", "SimpleViT", (3, 256), image_size=None, seq_len=256),
    _vit("simple_vit_3d", "SimpleViT", _VIDEO, **_SPACE),
    _vit("vit_1d", "ViT", (3, 256), image_size=None, seq_len=256),
    _vit("vit_3d", "ViT", _VIDEO, **_SPACE),
    _vit("vit_5", "ViT"),
    _vit("vit_detpool", "ViTDetPool"),
    _vit("vit_for_small_dataset", "ViT"),
    _vit("vit_nd", "ViTND", **_ND),
    _vit("vit_nd", "ViTND", _VIDEO, called="vit_nd.ViTND, 3D", **_ND3),
    _vit("vit_nd_rotary", "ViTND", **_ND),
    _vit("vit_nd_rotary", "ViTND", _VIDEO, called="vit_nd_rotary.ViTND, 3D", **_ND3),
    _vit("vit_nd_pope", "ViTND", **_ND),
    _vit("vit_with_decorr", "ViT"),
    _vit("vit_with_keel_post_ln", "ViT"),
    _vit("vit_with_patch_dropout", "ViT"),
    _vit("vit_with_patch_merger", "ViT", depth=4, patch_merge_layer=2),
    _vit("parallel_vit", "ViT"),
    _vit("learnable_memory_vit", "ViT"),
    _vit("normalized_vit", "nViT"),
    _vit("deepvit", "DeepViT"),
    _vit("jumbo_vit", "JumboViT"),
    _vit("cait", "CaiT", cls_depth=1),
    _vit("xcit", "XCiT", cls_depth=1),
    _vit("rvt", "RvT"),
    _vit("mp3", "ViT"),
    _vit("vat", "ViT"),
    _vit("ats_vit", "ViT", max_tokens_per_depth=(48, 32, 16)),
    _vit("pit", "PiT", depth=(2, 2)),
    _vit("vivit", "ViViT", _VIDEO, **_SPACE, depth=None, spatial_depth=2, temporal_depth=2),
    _vit(
        "vivit",
        "ViViT",
        _VIDEO,
        called="vivit.ViViT, factorized attention",
        **_SPACE,
        depth=None,
        spatial_depth=2,
        temporal_depth=2,
        variant="factorized_self_attention",
    ),
    # Its default is causal with the class token first in time, which then doesn't depend on the video.
    _vit(
        "vivit_with_moss",
        "ViViT",
        _VIDEO,
        **_SPACE,
        depth=None,
        spatial_depth=2,
        temporal_depth=2,
        moss_causal=False,
    ),
    WildModel("vit-pytorch", "accept_video_wrapper.AcceptVideoWrapper", _video_wrapper, ((3, 4, 64, 64),)),
    WildModel("vit-pytorch", "extractor.Extractor", partial(_around, "extractor", "Extractor"), (_IMAGE,)),
    WildModel("vit-pytorch", "recorder.Recorder", partial(_around, "recorder", "Recorder"), (_IMAGE,)),
    WildModel("vit-pytorch", "mae.MAE", _mae, (_IMAGE,)),
    WildModel("vit-pytorch", "simmim.SimMIM", _simmim, (_IMAGE,)),
    WildModel("vit-pytorch", "efficient.ViT", _efficient, (_IMAGE,)),
    WildModel("vit-pytorch", "efficient.ViT, nn.TransformerEncoder", _torch_encoder, (_IMAGE,)),
    WildModel("vit-pytorch", "distill.DistillableViT", _distillable, (_IMAGE,)),
)
