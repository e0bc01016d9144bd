"""The operators of nn.TransformerEncoderLayer and nn.MultiheadAttention that fuse a whole layer, in open form.

Where no gradients are needed, torch runs these layers as one operator each. Here they are what the layers call
otherwise, so that a graph under `torch.no_grad()` is the same as without. A mask is True where a key is hidden; one of
floats hides what isn't zero, as torch's operators read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gtp_fx.graph.torch_internals import FUSED_ATTENTION, FUSED_LAYER

_MASK_OF_KEYS = 1
"""The kind of masks [B, N]. Others are [N, N] or [B, H, N, N]."""


@contextlib.contextmanager
def without_fused_layers() -> Iterator[None]:
    """Switch off the operators that fuse layers of nn.Transformer. The switch is the process's; so is the tracing lock.

    Another thread that runs such a layer meanwhile gets the same numbers from the open layer.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def open_layers(graph: fx.Graph) -> bool:
    """Let Dynamo's graph call these functions in place of torch's operators; return whether it had any. In place."""
    found = [node for node in graph.nodes if node.target in _OPEN]
    for node in found:
        node.target = _OPEN[node.target]
    return bool(found)


def attention(
    query_BNC: Tensor,
    key_BMC: Tensor,
    value_BMC: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `torch._native_multi_head_attention`; return tokens [B, N, C] and the map, or None where it isn't needed.

    The map is [B, N, M] where it is averaged over heads, else [B, H, N, M].
    """
    query = query_BNC.transpose(0, 1)
    same = query_BNC is key_BMC and key_BMC is value_BMC
    key, value = (query, query) if same else (key_BMC.transpose(0, 1), value_BMC.transpose(0, 1))
    hidden = None if mask is None else mask.to(torch.bool)
    if hidden is not None and hidden.ndim == 4:
        hidden = hidden.flatten(0, 1)
    out_NBC, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        None,
        None,
        False,
        0.0,
        proj_weight,
        proj_bias,
        training=False,
        key_padding_mask=hidden if mask_type == _MASK_OF_KEYS else None,
        need_weights=need_weights,
        attn_mask=None if mask_type == _MASK_OF_KEYS else hidden,
        average_attn_weights=average_attn_weights,
    )
    return out_NBC.transpose(0, 1), weights


def encoder_layer(
    src_BNC: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """Compute `torch._transformer_encoder_layer_fwd`, on tokens [B, N, C]."""

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    def attend(x: Tensor) -> Tensor:
        projections = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return attention(x, x, x, embed_dim, num_heads, *projections, mask, False, True, mask_type)[0]

    def mlp(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    if norm_first:
        src_BNC = src_BNC + attend(first(src_BNC))
        return src_BNC + mlp(second(src_BNC))
    src_BNC = first(src_BNC + attend(src_BNC))
    return second(src_BNC + mlp(src_BNC))


_OPEN = {FUSED_LAYER: encoder_layer, FUSED_ATTENTION: attention}
