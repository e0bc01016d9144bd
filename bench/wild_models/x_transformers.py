"""x-transformers: one wrapper for images over an encoder with many options."""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

from torch import nn

from bench.wild_models import WildModel


def _wrapper(options: dict[str, Any], wrapped: dict[str, Any]) -> nn.Module:
    library = importlib.import_module("x_transformers")
    encoder = library.Encoder(**{"dim": 32, "depth": 3, "heads": 2, "attn_dim_head": 16, **options})
    settings = {"image_size": 64, "patch_size": 8, "num_classes": 10, **wrapped}
    model: nn.Module = library.ViTransformerWrapper(attn_layers=encoder, **settings)
    return model


def _with(told: str, wrapped: dict[str, Any] | None = None, **options: Any) -> WildModel:
    name = f"ViTransformerWrapper, {told}" if told else "ViTransformerWrapper"
    return WildModel("x-transformers", name, partial(_wrapper, options, wrapped or {}), ((3, 64, 64),))


MODELS = (
    _with(""),
    _with("registers", {"num_register_tokens": 4}),
    _with("flash", attn_flash=True),
    _with("rotary", rotary_pos_emb=True),
    _with("ALiBi", alibi_pos_bias=True, alibi_num_heads=1),
    _with("T5 bias", rel_pos_bias=True),
    _with("dynamic bias", dynamic_pos_bias=True),
    _with("qk_norm", attn_qk_norm=True),
    _with("talking heads", attn_pre_talking_heads=True),
    _with("one key head", attn_one_kv_head=True),
    _with("gated values", attn_gate_values=True),
    _with("gated residual", gate_residual=True),
    _with("memory keys", attn_num_mem_kv=4),
    _with("sparse top-k", attn_sparse_topk=8),
    _with("value residual", learned_value_residual_mix=True, add_value_residual=True),
    _with("hyper-connections", num_residual_streams=2),
)
