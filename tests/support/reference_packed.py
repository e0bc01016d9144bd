"""`reference_families`, of towers that pack images into one sequence: the same walks, on one image.

Rows of tokens that come without a grid have no neighbours but similar ones, and the first five of them stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from support.reference import normalise, semantic
from support.reference_families import Outputs
from support.reference_families_hf import projections
from support.reference_stream import NEIGHBORS, Heads, Stream, attention, rotated, split

GUARDED = 5


def pixtral(tower: Any, called: dict[str, Any], schedule: Sequence[int]) -> Outputs:
    """Pixtral: patches of a convolution, positions by rotation over both sides."""
    map_BCHW = tower.patch_conv(called["pixel_values"])
    grid = tuple(map_BCHW.shape[2:])
    stream = Stream(tower.ln_pre(map_BCHW.flatten(2).transpose(1, 2)), grid, prefix=0)
    cos_GD, sin_GD = tower.patch_positional_embedding(stream.x_BNC, stream.places_GR)
    for layer, removed in zip(tower.transformer.layers, schedule, strict=True):
        q, k, v = projections(layer.attention, layer.attention_norm(stream.x_BNC))
        turned = (rotated(x, stream.rows(sin_GD)[:, None], stream.rows(cos_GD)[:, None], 0, True) for x in (q, k))
        stream.x_BNC = stream.x_BNC + layer.attention.o_proj(stream.attend(*turned, v))
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + layer.feed_forward(layer.ffn_norm(stream.x_BNC))
    return {"last_hidden_state": stream.recovered(stream.x_BNC)}


def qwen2_vl(tower: Any, called: dict[str, Any], schedule: Sequence[int]) -> Outputs:
    """Qwen2-VL: patches that are cut already, and a merger that reads the tokens that are put back."""
    x_NC = tower.patch_embed(called["hidden_states"])
    position_ids = get_vision_position_ids(called["grid_thw"], tower.spatial_merge_size)
    stream, tables = _row(x_NC), tower.rotary_pos_emb(x_NC, position_ids)
    for block, removed in zip(tower.blocks, schedule, strict=True):
        stream.x_BNC = stream.x_BNC + block.attn.proj(stream.attend(*_turned(stream, block, tables)))
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + block.mlp(block.norm2(stream.x_BNC))
    return {"last_hidden_state": stream.recovered(stream.x_BNC)[0], "pooler_output": _merged(stream, tower)}


def qwen2_5_vl(tower: Any, called: dict[str, Any], schedule: Sequence[int]) -> Outputs:
    """Qwen2.5-VL: some blocks attend within windows, whose queries, keys and values are put back for that."""
    grid_thw, merge = called["grid_thw"], tower.spatial_merge_size
    order_M, ends = get_vision_window_index(grid_thw, merge, tower.window_size, tower.patch_size)

    def in_windows(x_NC: Tensor) -> Tensor:
        return x_NC.unflatten(0, (-1, merge**2))[order_M].flatten(0, 1)

    x_NC = tower.patch_embed(called["hidden_states"])
    tables = [in_windows(t) for t in tower.rotary_pos_emb(x_NC, get_vision_position_ids(grid_thw, merge))]
    stream, counts = _row(in_windows(x_NC)), iter(schedule)
    for number, block in enumerate(tower.blocks):
        if not stream.removals:  # a graph's tokens are compared where the first block begins at which they may leave
            _connect(stream)
        heads = _turned(stream, block, tables)
        if number in tower.fullatt_block_indexes:
            stream.x_BNC = stream.x_BNC + block.attn.proj(stream.attend(*heads))
            stream.leave(next(counts))
        else:
            put_back = [stream.recovered(x.transpose(1, 2).flatten(2)) for x in heads]
            q, k, v = split(put_back, heads[0].shape[1])
            windows = [slice(a, b) for a, b in zip(ends.tolist(), ends.tolist()[1:], strict=False)]
            parts = [attention(q[:, :, w], k[:, :, w], v[:, :, w], torch.zeros(1, 1))[0] for w in windows]
            stream.x_BNC = stream.x_BNC + stream.tokens(block.attn.proj(torch.cat(parts, dim=1))[0])
        stream.x_BNC = stream.x_BNC + block.mlp(block.norm2(stream.x_BNC))
    merged_MC = _merged(stream, tower)[order_M.argsort()]
    return {"last_hidden_state": stream.recovered(stream.x_BNC)[0], "pooler_output": merged_MC}


def _row(x_NC: Tensor) -> Stream:
    """A stream of tokens on no known grid."""
    stream = Stream(x_NC[None], (len(x_NC) - GUARDED,), GUARDED)
    _connect(stream)
    return stream


def _connect(stream: Stream) -> None:
    """Connect tokens with those that are like them as they are now."""
    stream.weights_BGG = normalise(semantic(stream.x_BNC[:, GUARDED:], NEIGHBORS), stream.x_BNC.dtype)


def _merged(stream: Stream, tower: Any) -> Tensor:
    """The merger's result: tokens are put back for its reader of several, behind its norm."""
    merger = tower.merger
    normed_NC = stream.recovered(merger.ln_q(stream.x_BNC))[0]
    return merger.mlp(normed_NC.view(-1, merger.hidden_size))  # type: ignore[no-any-return]


def _turned(stream: Stream, block: Any, tables: Sequence[Tensor]) -> Heads:
    """q, k and v of a block, with the positions of the tokens that are present."""
    qkv = block.attn.qkv(block.norm1(stream.x_BNC)).chunk(3, dim=-1)
    q, k, v = split(qkv, block.attn.num_heads)
    cos, sin = (stream.tokens(table_ND)[:, None] for table_ND in tables)
    return rotated(q, sin, cos, 0, True), rotated(k, sin, cos, 0, True), v
