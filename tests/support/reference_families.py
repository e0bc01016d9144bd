"""GTP by hand on each family's own modules: what every compiled model that isn't timm's plain ViT is compared with.

One function a family: `walk(model, inputs, schedule)` runs the model's own layers in the order of its own forward,
attention spelled out, and removes schedule[i] patches after the i-th attention's residual add, before the MLP (arXiv
2311.03035). It returns the model's outputs by name. Whatever a family indexes by position follows: rotary tables and
relative-position biases are gathered by the patches present (`Stream.rows`, `Stream.pairs`), maps that the model
returns come back at full length (`Stream.recovered`). Module names are timm 1.0's and transformers 5's.

Letters in tensor names are those of `reference`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from support.reference import attention as timm_attention
from support.reference_stream import Heads, Stream, attention, rotated, split

Outputs = dict[str, Tensor]
Walk = Callable[[Any, Tensor, Sequence[int]], Outputs]


def eva(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """EVA-02, RoPE-ViT (axial: one table; mixed: one per block and head), DINOv3. Rotary, absolute or no positions."""
    x_BNC, rope = model._pos_embed(model.patch_embed(images_BCHW))
    stream = Stream(model.norm_pre(x_BNC), grid_of(model, images_BCHW), model.num_prefix_tokens)
    for index, (block, removed) in enumerate(zip(model.blocks, schedule, strict=True)):
        layer = block.attn
        assert layer.gate is None
        q_BHND, k_BHND, v_BHND = eva_projections(layer, block.norm1(stream.x_BNC))
        sin, cos = stream.rows(rope[index] if model.rope_mixed else rope[None]).chunk(2, dim=-1)
        turn = (sin, cos, stream.prefix, layer.rotate_half)
        q_BHND, k_BHND = rotated(layer.q_norm(q_BHND), *turn), rotated(layer.k_norm(k_BHND), *turn)
        branch_BNC = layer.proj(layer.norm(stream.attend(q_BHND, k_BHND, v_BHND)))
        stream.x_BNC = stream.x_BNC + scaled(block.gamma_1, branch_BNC)
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + scaled(block.gamma_2, block.mlp(block.norm2(stream.x_BNC)))
    return {"logits": model.forward_head(model.norm(stream.x_BNC))}


def eva_projections(layer: Any, x_BNC: Tensor) -> Heads:
    """q, k, v: from one projection, whose key bias is a buffer of zeros, or from three."""
    if layer.qkv is None:
        return split((layer.q_proj(x_BNC), layer.k_proj(x_BNC), layer.v_proj(x_BNC)), layer.num_heads)
    qkv = layer.qkv(x_BNC)
    if getattr(layer, "q_bias", None) is not None:
        qkv = qkv + torch.cat([layer.q_bias, torch.zeros_like(layer.q_bias), layer.v_bias])
    return split(qkv.chunk(3, dim=-1), layer.num_heads)


def beit(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """BEiT: a table of relative positions for each block, with rows of its own for the class token."""
    patch_BGC = model.patch_embed(images_BCHW)
    x_BNC = torch.cat([model.cls_token.expand(len(patch_BGC), -1, -1), patch_BGC], dim=1)
    stream = Stream(x_BNC, grid_of(model, images_BCHW), prefix=1)
    for block, removed in zip(model.blocks, schedule, strict=True):
        layer = block.attn
        bias_HNN = layer.relative_position_bias_table[layer.relative_position_index].permute(2, 0, 1)
        qkv = eva_projections(layer, block.norm1(stream.x_BNC))
        branch_BNC = layer.proj(stream.attend(*qkv, stream.pairs(bias_HNN)))
        stream.x_BNC = stream.x_BNC + scaled(block.gamma_1, branch_BNC)
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + scaled(block.gamma_2, block.mlp(block.norm2(stream.x_BNC)))
    return {"logits": model.forward_head(model.norm(stream.x_BNC))}


def relpos(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """ViT with a bias that an MLP makes of log-coordinates: of each block, or one that all share. No class token."""
    stream = Stream(model.patch_embed(images_BCHW), grid_of(model, images_BCHW), prefix=0)
    for block, removed in zip(model.blocks, schedule, strict=True):
        layer = block.attn
        (bias_HNN,) = (model.shared_rel_pos or layer.rel_pos).get_bias()
        qkv = layer.qkv(block.norm1(stream.x_BNC)).chunk(3, dim=-1)
        q_BHND, k_BHND, v_BHND = split(qkv, layer.num_heads)
        branch_BNC = stream.attend(layer.q_norm(q_BHND), layer.k_norm(k_BHND), v_BHND, stream.pairs(bias_HNN))
        stream.x_BNC = stream.x_BNC + block.ls1(layer.proj(branch_BNC))
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + block.ls2(block.mlp(block.norm2(stream.x_BNC)))
    return {"logits": model.forward_head(model.norm(stream.x_BNC))}


def crossvit(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """CrossViT: two streams over two grids, each with a graph and scales of its own.

    Their class tokens cross over: each asks the other's patches, whose scales it is told. No patch asks there, so none
    leaves: the schedule has no entry for it.
    """
    counts = iter(schedule)
    streams = []
    for x_BNC, layer in zip(model._embed(images_BCHW), model.patch_embed, strict=True):
        grid = tuple(side // patch for side, patch in zip(layer.img_size, layer.patch_size, strict=True))
        streams.append(Stream(x_BNC, grid, prefix=1))
    for level in model.blocks:
        for stream, blocks in zip(streams, level.blocks, strict=True):
            for block in blocks:
                plain_block(stream, block, next(counts))
        class_tokens = [project(stream.x_BNC[:, :1]) for project, stream in zip(level.projs, streams, strict=True)]
        for i, (fusion, revert) in enumerate(zip(level.fusion, level.revert_projs, strict=True)):
            other, layer = streams[1 - i], fusion.attn
            x_BNC = fusion.norm1(torch.cat([class_tokens[i], other.x_BNC[:, 1:]], dim=1))
            qkv = split((layer.wq(x_BNC[:, :1]), layer.wk(x_BNC), layer.wv(x_BNC)), layer.num_heads)
            out_B1C, _ = attention(*qkv, other.key_bias_BN)
            class_tokens[i] = revert(class_tokens[i] + layer.proj(out_B1C))
        for stream, class_token in zip(streams, class_tokens, strict=True):
            stream.x_BNC = torch.cat([class_token, stream.x_BNC[:, 1:]], dim=1)
    assert next(counts, None) is None
    return {
        "logits": model.forward_head([norm(stream.x_BNC) for norm, stream in zip(model.norm, streams, strict=True)])
    }


def pit(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """PiT: strided convolutions between stages need the whole map, so tokens are restored: new grid, scales of 1."""
    counts = iter(schedule)
    patch_BChw = model.patch_embed(images_BCHW) + model.pos_embed
    class_BNC = model.cls_token.expand(len(images_BCHW), -1, -1)
    prefix = class_BNC.shape[1]
    for stage in model.transformers:
        if stage.pool is not None:
            patch_BChw, class_BNC = stage.pool.conv(patch_BChw), stage.pool.fc(class_BNC)
        grid = tuple(patch_BChw.shape[2:])
        x_BNC = stage.norm(torch.cat([class_BNC, patch_BChw.flatten(2).transpose(1, 2)], dim=1))
        stream = Stream(x_BNC, grid, prefix)
        for block in stage.blocks:
            plain_block(stream, block, next(counts))
        class_BNC = stream.x_BNC[:, :prefix]
        patch_BChw = stream.recovered(stream.x_BNC)[:, prefix:].transpose(1, 2).unflatten(-1, grid)
    assert next(counts, None) is None
    return {"logits": model.forward_head(model.norm(class_BNC))}


def hiera(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """Hiera: of the blocks that attend over a whole stage, between those that pool their queries.

    Tokens come unrolled, so that pooling takes the maximum of equal parts, one after the other. It needs every token's
    query and projection, while keys are those of the tokens that are left.
    """
    counts = iter(schedule)
    x_BNC = model.unroll(model._pos_embed(model.patch_embed(images_BCHW)))
    sides = torch.tensor(model.unroll.size)
    number_1N1 = torch.arange(int(sides.prod()))[None, :, None]
    where_NR = torch.cartesian_prod(*map(torch.arange, sides.tolist()))[model.unroll(number_1N1)[0, :, 0]]
    stream = None
    for block in model.blocks:
        attn = block.attn
        if attn.q_stride > 1 or attn.use_mask_unit_attn:
            x_BNC, stream = block(x_BNC) if stream is None else pooling_block(stream, block), None
            assert attn.q_stride > 1 or next(counts) == 0, "its tokens can only skip the MLP"
            continue
        if stream is None:
            shrunk = math.isqrt(len(where_NR) // x_BNC.shape[1])
            places_GR = where_NR[: x_BNC.shape[1]] // shrunk
            stream = Stream(x_BNC, tuple((sides // shrunk).tolist()), 0, places_GR)
        heads = split(attn.qkv(block.norm1(stream.x_BNC)).chunk(3, dim=-1), attn.heads)
        stream.x_BNC = stream.x_BNC + block.ls1(attn.proj(stream.attend(*heads)))
        stream.leave(next(counts))
        stream.x_BNC = stream.x_BNC + block.ls2(block.mlp(block.norm2(stream.x_BNC)))
    assert stream is None and next(counts, None) is None
    return {"logits": model.forward_head(x_BNC)}


def pooling_block(stream: Stream, block: Any) -> Tensor:
    """Hiera's block that begins a stage, after one that tokens have left: [B, G / strides, C]."""
    attn, normed_BNC = block.attn, block.norm1(stream.x_BNC)

    def pooled(x_BNC: Tensor) -> Tensor:
        return stream.recovered(x_BNC).unflatten(1, (attn.q_stride, -1)).amax(dim=1)

    q_BNC, k_BNC, v_BNC = attn.qkv(normed_BNC).chunk(3, dim=-1)
    heads = split((pooled(q_BNC), k_BNC, v_BNC), attn.heads)
    x_BNC: Tensor = pooled(block.proj(normed_BNC)) + block.ls1(attn.proj(stream.attend(*heads)))
    return x_BNC + block.ls2(block.mlp(block.norm2(x_BNC)))


def plain_block(stream: Stream, block: Any, removed: int) -> None:
    """timm's `Block`, as `reference` has it."""
    normed_BNC = block.norm1(stream.x_BNC)
    branch_BNC, stream.attn_BHNN = timm_attention(block.attn, normed_BNC, stream.key_bias_BN, sparsity=1.0)
    stream.x_BNC = stream.x_BNC + block.ls1(branch_BNC)
    stream.leave(removed)
    stream.x_BNC = stream.x_BNC + block.ls2(block.mlp(block.norm2(stream.x_BNC)))


def grid_of(model: Any, images_BCHW: Tensor) -> tuple[int, ...]:
    grid: tuple[int, ...] = model.patch_embed.dynamic_feat_size(tuple(images_BCHW.shape[-2:]))
    return grid


def scaled(gamma_C: Tensor | None, branch_BNC: Tensor) -> Tensor:
    """LayerScale, where there is one."""
    return branch_BNC if gamma_C is None else gamma_C * branch_BNC
