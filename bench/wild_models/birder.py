"""birder: a zoo of its own, built through its registry by the names of its smallest configurations."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from bench.wild_models import WildModel

_PLAIN: dict[str, Any] = {
    "patch_size": 16,
    "num_layers": 3,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 64,
    "drop_path_rate": 0.0,
}
_STAGES = {"depths": [1, 1, 2, 1]}
_FOUR = {"depth": [1, 1, 2, 1]}


def _net(name: str, /, side: int = 128, called: str = "", **changed: Any) -> WildModel:
    """name: in birder's registry. changed: keys of its configuration."""
    return WildModel("birder", called or name, partial(_build, name, side, changed), ((3, side, side),))


def _build(name: str, side: int, changed: dict[str, Any]) -> nn.Module:
    registry = importlib.import_module("birder.model_registry").registry
    importlib.import_module("birder.net")
    net: nn.Module = registry.net_factory(name, 10, config=dict(changed), size=(side, side))
    return net


def _masked(name: str, encoder: str, /, side: int = 128, **changed: Any) -> WildModel:
    return WildModel("birder", name, partial(_build_masked, name, encoder, side, changed), ((3, side, side),))


def _build_masked(name: str, encoder: str, side: int, changed: dict[str, Any]) -> nn.Module:
    importlib.import_module("birder.net.mim")
    registry = importlib.import_module("birder.model_registry").registry
    net: nn.Module = registry.mim_net_factory(name, _build(encoder, side, changed), size=(side, side))
    return net


PLAIN = (
    _net("vit_t16", **_PLAIN),
    _net("vit_reg1_t16", called="vit, registers", **_PLAIN, num_reg_tokens=4),
    _net("vit_t16", called="vit, mean", **_PLAIN, class_token=False),
    _net("vit_t16", called="vit, attention pooling", **_PLAIN, attn_pool_head=True),
    _net(
        "vit_t16",
        called="vit, RMSNorm, SwiGLU, qk_norm",
        **_PLAIN,
        norm_layer_type="RMSNorm",
        mlp_layer_type="SwiGLU_FFN",
        qk_norm=True,
        layer_scale_init_value=1.0,
    ),
    _net("vit_t16", called="vit, hmlp stem", **_PLAIN, stem_type="hmlp"),
    _net("rope_vit_t16", **_PLAIN),
    _net("rope_vit_t16", called="rope_vit, registers, no bias", **_PLAIN, num_reg_tokens=4, qkv_bias=False),
    _net("rope_vit5_reg4_t16", **_PLAIN),
    _net("rope_vit_moe_t16_4e1s_2k_last1_avg", **_PLAIN),
    _net("vit_moe_t16_4e1s1p_2k_last1o1", **_PLAIN),
    _net("vit_parallel_s16_18x2_ls", **_PLAIN),
    _net("vit_det_s16", side=224, **_PLAIN, window_size=(7, 7), global_attn_indexes=[1, 2]),
    _net("vit_windowed_s16", **_PLAIN, num_windows=(2, 2), global_attn_indexes=[1, 2]),
    _net("simple_vit_s16", **_PLAIN),
    _net("deit_t16", **_PLAIN),
    _net("deit3_t16", **_PLAIN),
    _net("flexivit_s16", **_PLAIN),
    _net("rope_flexivit_s16", **_PLAIN),
    _net("naflex_vit_t16", **_PLAIN),
    _net("naflex_rope_vit_t16", **_PLAIN),
    _net("cait_xxs24", embed_dim=32, depth=3, num_heads=2),
    _net("xcit_nano12_p16", embed_dim=32, depth=12, num_heads=2),
    _net("crossvit_t", side=240, embed_dim=[32, 48], num_heads=[2, 2], depths=[[1, 2, 0], [1, 2, 0]]),
    _net("volo_d1", layers=[1, 1, 2, 1], embed_dims=[32, 48, 48, 48], num_heads=[2, 2, 2, 2]),
    _net("pit_t", depths=[1, 2, 1], base_dims=[16, 16, 16]),
    _masked("mae_vit", "vit_t16", **_PLAIN),
    _masked("simmim", "vit_t16", **_PLAIN),
)

STAGES = (
    _net("biformer_t", side=224, **_STAGES, embed_dims=[32, 32, 64, 64]),
    _net("cas_vit_xs", **_STAGES),
    _net("coat_lite_tiny", serial_depths=[1, 1, 1, 1]),
    _net("coat_tiny", serial_depths=[1, 1, 1, 1], parallel_depth=1),
    _net("crossformer_t", side=224, embed_dim=32, depths=[1, 1, 2, 1]),
    _net("cswin_transformer_t", side=224, embed_dim=32, depths=[1, 1, 2, 1]),
    _net("davit_tiny", side=224, **_STAGES, dims=[32, 32, 64, 64], heads=[1, 2, 2, 2]),
    _net("edgenext_xxs", **_STAGES),
    _net("edgevit_xxs", **_FOUR),
    _net("efficientformer_v1_l1", side=224, depths=(1, 1, 1, 2), embed_dims=(16, 32, 32, 64)),
    _net("efficientformer_v2_s0", side=224),
    _net("efficientvit_mit_b0"),
    _net("efficientvit_msft_m0", side=224),
    _net("fastvit_sa12", layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 64)),
    _net("gc_vit_xxt", side=224, **_STAGES, embed_dim=32),
    _net("groupmixformer_mobile", **_STAGES),
    _net("hiera_tiny", side=224, depths=[1, 1, 2, 1], embed_dim=32),
    _net("hieradet_tiny", side=224, depths=[1, 1, 2, 1], embed_dim=32, global_att_blocks=[2, 3, 4]),
    _net("iformer_s", side=224, depths=[1, 1, 2, 1], attention_heads=[1, 3, 7, 9, 11]),
    _net("levit_128s", side=224, depths=[1, 1, 1]),
    _net("lit_v1_s", side=224, **_STAGES, embed_dim=48),
    _net("lit_v2_s", side=224, **_STAGES, embed_dim=48),
    _net("maxvit_t", side=224, block_layers=[1, 1, 1, 1], block_channels=[32, 32, 64, 64], stem_channels=32),
    _net("mobilevit_v1_xxs"),
    _net("mobilevit_v2_0_25"),
    _net("mvit_v1_s_d16", side=224, depths=[1, 1, 1], embed_dims=[32, 64, 128]),
    _net("mvit_v2_t", side=224, depths=[1, 1, 2, 1], embed_dim=32),
    _net("nextvit_s", side=224, depths=[1, 1, 2, 1]),
    _net("pvt_v1_t", side=224, depths=[1, 1, 1, 1]),
    _net("pvt_v2_b0", side=224, depths=[1, 1, 1, 1]),
    _net("pvt_v2_b0_li", side=224, depths=[1, 1, 1, 1]),
    _net("regionvit_t", side=224, depths=[1, 1, 2, 1], embed_dims=[32, 32, 64, 64, 64]),
    _net("shvit_s1", depths=[1, 1, 1]),
    _net("smt_t", side=224, depths=[1, 1, 2, 1]),
    _net("swin_transformer_v1_t", side=224, **_STAGES, embed_dim=48),
    _net("swin_transformer_v2_t", side=256, **_STAGES, embed_dim=48),
    _net("tiny_vit_5m", side=224, **_STAGES),
    _net("transnext_micro", side=224, **_FOUR),
    _net("uniformer_s", **_FOUR, embed_dim=[64, 64, 128, 128]),
)

MODELS = (*PLAIN, *STAGES)
