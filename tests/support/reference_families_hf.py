"""`reference_families`, of HuggingFace: the same walks on transformers' own modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from support.reference_families import Outputs, scaled
from support.reference_stream import Heads, Stream, attention, rotated, split


def vit(model: Any, inputs: Tensor, schedule: Sequence[int]) -> Outputs:
    """ViT, MSN, DeiT, ViViT (tubelets), which read the class token alone; I-JEPA, which has none and takes the mean."""
    base = model.base_model
    stream = stream_of(base.embeddings(inputs), grid_of(base, inputs))
    for layer, removed in zip(base.layers, schedule, strict=True):
        vit_layer(stream, layer, removed)
    x_BNC = base.layernorm(stream.x_BNC)
    return {"logits": model.classifier(x_BNC[:, 0] if stream.prefix else x_BNC.mean(dim=1))}


def ast(model: Any, sounds_BTF: Tensor, schedule: Sequence[int]) -> Outputs:
    """AST: overlapping patches on frequency x time, two prefix tokens that are averaged."""
    base = model.audio_spectrogram_transformer
    stream = Stream(base.embeddings(sounds_BTF), tuple(base.embeddings.get_shape(model.config)), prefix=2)
    for layer, removed in zip(base.layers, schedule, strict=True):
        vit_layer(stream, layer, removed)
    return {"logits": model.classifier(base.layernorm(stream.x_BNC)[:, :2].mean(dim=1))}


def beit(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """BEiT: a relative-position bias in each layer, LayerScale, average pooling."""
    base = model.beit
    grid = grid_of(base, images_BCHW)
    stream = Stream(base.embeddings(images_BCHW), grid, prefix=1)
    for layer, removed in zip(base.layers, schedule, strict=True):
        (bias_HNN,) = layer.relative_position_bias(grid)
        vit_layer(stream, layer, removed, stream.pairs(bias_HNN), layer.lambda_1, layer.lambda_2)
    return {"logits": model.classifier(base.pooler.layernorm(base.layernorm(stream.x_BNC)[:, 1:].mean(dim=1)))}


def data2vec(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """Data2Vec-Vision: BEiT with one bias that all layers share."""
    base = model.data2vec_vision
    x_BNC, grid = base.embeddings(images_BCHW)
    stream = Stream(x_BNC, tuple(grid), prefix=1)
    (bias_HNN,) = base.encoder.relative_position_bias(grid)
    for layer, removed in zip(base.encoder.layer, schedule, strict=True):
        older_layer(stream, layer, removed, stream.pairs(bias_HNN), layer.lambda_1, layer.lambda_2)
    return {"logits": model.classifier(base.pooler.layernorm(stream.x_BNC[:, 1:].mean(dim=1)))}


def videomae(model: Any, videos_BTCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """VideoMAE: tubelets on time x height x width, each with up to 26 neighbours; no prefix, average pooling."""
    base = model.videomae
    stream = Stream(base.embeddings(videos_BTCHW, None), grid_of(base, videos_BTCHW), prefix=0)
    for layer, removed in zip(base.encoder.layer, schedule, strict=True):
        older_layer(stream, layer, removed)
    return {"logits": model.classifier(model.fc_norm(stream.x_BNC.mean(dim=1)))}


def yolos(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """YOLOS: detection tokens behind the patches, which alone are read; positions added again between the layers."""
    base = model.vit
    stream = Stream(base.embeddings(images_BCHW), grid_of(base, images_BCHW), prefix=1)
    again_ENC = base.encoder.interpolation(images_BCHW.shape[-2:])[:, 0]
    for index, (layer, removed) in enumerate(zip(base.encoder.layer, schedule, strict=True)):
        older_layer(stream, layer, removed)
        if index < len(again_ENC):
            stream.x_BNC = stream.x_BNC + stream.tokens(again_ENC[index])
    x_BNC = base.layernorm(stream.x_BNC)
    found_BSC = x_BNC[:, -model.config.num_detection_tokens :]
    boxes_BS4 = model.bbox_predictor(found_BSC).sigmoid()
    logits_BSV = model.class_labels_classifier(found_BSC)
    return {"logits": logits_BSV, "pred_boxes": boxes_BS4, "last_hidden_state": stream.recovered(x_BNC)}


def clip(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """CLIP's vision tower: the projected class token, and a map of all tokens that was not normalised."""
    base = model.vision_model
    x_BNC = base.pre_layrnorm(base.embeddings(images_BCHW))
    stream = stream_of(x_BNC, map_of(base.embeddings.patch_embedding, images_BCHW))
    for layer, removed in zip(base.encoder.layers, schedule, strict=True):
        clip_layer(stream, layer, removed)
    embeds_BC = model.visual_projection(base.post_layernorm(stream.x_BNC[:, 0]))
    return {"image_embeds": embeds_BC, "last_hidden_state": stream.recovered(stream.x_BNC)}


def siglip(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """SigLIP's vision tower: no prefix; the head's probe attends over the short stream, so it is told the scales."""
    stream = stream_of(model.embeddings(images_BCHW), map_of(model.embeddings.patch_embedding, images_BCHW))
    for layer, removed in zip(model.encoder.layers, schedule, strict=True):
        clip_layer(stream, layer, removed)
    x_BNC = model.post_layernorm(stream.x_BNC)

    pool = model.head.attention
    probe_B1C = model.head.probe.expand(len(x_BNC), -1, -1)
    layers = zip((probe_B1C, x_BNC, x_BNC), pool.in_proj_weight.chunk(3), pool.in_proj_bias.chunk(3), strict=True)
    qkv = split([inputs @ weight.T + bias for inputs, weight, bias in layers], pool.num_heads)
    pooled_B1C = pool.out_proj(attention(*qkv, stream.key_bias_BN)[0])
    pooled_B1C = pooled_B1C + model.head.mlp(model.head.layernorm(pooled_B1C))
    return {"pooler_output": pooled_B1C[:, 0], "last_hidden_state": stream.recovered(x_BNC)}


def dinov2(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """DINOv2, with registers or without: LayerScale; the normalised map of all tokens."""
    stream = stream_of(model.embeddings(images_BCHW), grid_of(model, images_BCHW))
    for layer, removed in zip(model.encoder.layer, schedule, strict=True):
        qkv = projections(layer.attention, layer.norm1(stream.x_BNC))
        stream.x_BNC = stream.x_BNC + layer.layer_scale1(layer.attention.o_proj(stream.attend(*qkv)))
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + layer.layer_scale2(layer.mlp(layer.norm2(stream.x_BNC)))
    x_BNC = model.layernorm(stream.x_BNC)
    return {"pooler_output": x_BNC[:, 0], "last_hidden_state": stream.recovered(x_BNC)}


def dinov3(model: Any, images_BCHW: Tensor, schedule: Sequence[int]) -> Outputs:
    """DINOv3: rotary positions of the patches, in halves; a class token and registers without; the normalised map."""
    stream = stream_of(model.embeddings(images_BCHW), map_of(model.embeddings.patch_embeddings, images_BCHW))
    cos_GD, sin_GD = model.rope_embeddings(images_BCHW)
    for layer, removed in zip(model.model.layer, schedule, strict=True):
        q_BHND, k_BHND, v_BHND = projections(layer.attention, layer.norm1(stream.x_BNC))
        turn = (stream.rows(sin_GD[None]), stream.rows(cos_GD[None]), stream.prefix, True)
        out_BNC = stream.attend(rotated(q_BHND, *turn), rotated(k_BHND, *turn), v_BHND)
        stream.x_BNC = stream.x_BNC + layer.layer_scale1(layer.attention.o_proj(out_BNC))
        stream.leave(removed)
        stream.x_BNC = stream.x_BNC + layer.layer_scale2(layer.mlp(layer.norm2(stream.x_BNC)))
    x_BNC = model.norm(stream.x_BNC)
    return {"pooler_output": x_BNC[:, 0], "last_hidden_state": stream.recovered(x_BNC)}


def vit_layer(
    stream: Stream,
    layer: Any,
    removed: int,
    bias: Tensor | float = 0.0,
    gamma_1: Tensor | None = None,
    gamma_2: Tensor | None = None,
) -> None:
    """The layer of ViT, AST and BEiT."""
    qkv = projections(layer.attention, layer.layernorm_before(stream.x_BNC))
    stream.x_BNC = stream.x_BNC + scaled(gamma_1, layer.attention.o_proj(stream.attend(*qkv, bias)))
    stream.leave(removed)
    stream.x_BNC = stream.x_BNC + scaled(gamma_2, layer.mlp(layer.layernorm_after(stream.x_BNC)))


def older_layer(
    stream: Stream,
    layer: Any,
    removed: int,
    bias: Tensor | float = 0.0,
    gamma_1: Tensor | None = None,
    gamma_2: Tensor | None = None,
) -> None:
    """Run a layer of VideoMAE, YOLOS or Data2Vec: older modules, whose MLP is `intermediate` and `output`."""
    inner, x_BNC = layer.attention.attention, layer.layernorm_before(stream.x_BNC)
    qkv = split((inner.query(x_BNC), inner.key(x_BNC), inner.value(x_BNC)), inner.num_attention_heads)
    stream.x_BNC = stream.x_BNC + scaled(gamma_1, layer.attention.output.dense(stream.attend(*qkv, bias)))
    stream.leave(removed)
    hidden_BNC = layer.intermediate(layer.layernorm_after(stream.x_BNC))
    stream.x_BNC = stream.x_BNC + scaled(gamma_2, layer.output.dense(hidden_BNC))


def clip_layer(stream: Stream, layer: Any, removed: int) -> None:
    """The layer of CLIP and SigLIP."""
    qkv = projections(layer.self_attn, layer.layer_norm1(stream.x_BNC))
    stream.x_BNC = stream.x_BNC + layer.self_attn.out_proj(stream.attend(*qkv))
    stream.leave(removed)
    stream.x_BNC = stream.x_BNC + layer.mlp(layer.layer_norm2(stream.x_BNC))


def projections(layer: Any, x_BNC: Tensor) -> Heads:
    """q, k, v."""
    return split((layer.q_proj(x_BNC), layer.k_proj(x_BNC), layer.v_proj(x_BNC)), layer.config.num_attention_heads)


def stream_of(x_BNC: Tensor, grid: tuple[int, ...]) -> Stream:
    """A stream that ends with its patches: what stands before them is the prefix."""
    return Stream(x_BNC, grid, prefix=x_BNC.shape[1] - math.prod(grid))


def grid_of(base: Any, inputs: Tensor) -> tuple[int, ...]:
    return map_of(base.embeddings.patch_embeddings.projection, inputs)


def map_of(convolution: nn.Module, inputs: Tensor) -> tuple[int, ...]:
    """The grid that a model's patch convolution makes; of videos, which come as [B, T, C, H, W], one of three sides."""
    return tuple(convolution(inputs.transpose(1, 2) if inputs.ndim == 5 else inputs).shape[2:])
