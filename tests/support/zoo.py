"""The plain vision transformers that the tests are run on: real timm architectures, cut to three blocks.

Base and large ones are narrowed too: what matters here is how each is put together (prefix, norms, position
embedding, pooling), not its width. Nothing is downloaded: `enliven` gives every parameter a spread, as in a
trained model, so that attention is selective, scores are apart, and no LayerScale of 1e-5 hides a branch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)

DEPTH = 3
WITH_DEAD_TOKENS = ["split_projections", "drop_dead_tokens"]
"""Passes to leave out for a graph that keeps the tokens that no output depends on."""
NARROW = {"embed_dim": 192, "num_heads": 3}


@dataclass(frozen=True, eq=False)
class Row:
    """One architecture. What a test expects of it (grid, prefix, pool) is stated, not computed."""

    name: str
    arch: str
    grid: tuple[int, int]
    prefix: int
    pool: str = "token"
    img_size: tuple[int, int] = (224, 224)
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> VisionTransformer:
        return build(self)

    def inputs(self) -> Tensor:
        return images(self)

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        return self.prefix + self.patches


ZOO = (
    Row("vit", "vit_tiny_patch16_224", (14, 14), 1),
    Row("deit", "deit_small_patch16_224", (14, 14), 1),
    Row("deit-distilled", "deit_tiny_distilled_patch16_224", (14, 14), 2, pool="token+distillation"),
    Row("deit3", "deit3_small_patch16_224", (14, 14), 1),
    Row("clip", "vit_base_patch32_clip_224", (7, 7), 1, kwargs=NARROW),
    Row("clip-quickgelu", "vit_base_patch16_clip_quickgelu_224", (14, 14), 1, kwargs=NARROW),
    Row("dinov2", "vit_small_patch14_dinov2", (9, 9), 1, img_size=(126, 126)),
    Row("dinov2-reg4", "vit_small_patch14_reg4_dinov2", (9, 9), 5, img_size=(126, 126)),
    Row("siglip-map", "vit_base_patch16_siglip_224", (14, 14), 0, pool="map", kwargs=NARROW),
    Row("siglip-gap", "vit_base_patch16_siglip_gap_224", (14, 14), 0, pool="avg", kwargs=NARROW),
    Row("vit-gap", "vit_medium_patch16_gap_256", (12, 12), 0, pool="avg", img_size=(192, 192)),
    Row("eva", "eva_large_patch14_196", (14, 14), 1, pool="avg", img_size=(196, 196), kwargs=NARROW),
    Row("qk-norm", "vit_tiny_patch16_224", (14, 14), 1, kwargs={"qk_norm": True, "scale_attn_norm": True}),
    Row("reg1-gap", "vit_little_patch16_reg1_gap_256", (16, 16), 1, pool="avg", img_size=(256, 256)),
    Row("reg4-gap", "vit_medium_patch16_reg4_gap_256", (12, 12), 4, pool="avg", img_size=(192, 192)),
    Row(
        "reg4-map",
        "vit_so150m_patch16_reg4_map_256",
        (12, 12),
        4,
        pool="map",
        img_size=(192, 192),
        kwargs=NARROW,
    ),
    Row("non-square", "vit_tiny_patch16_224", (14, 10), 1, img_size=(224, 160)),
    Row("no-classes", "vit_tiny_patch16_224", (14, 14), 1, kwargs={"num_classes": 0}),
)

BY_NAME = {row.name: row for row in ZOO}


def rows(*names: str, by_default: Collection[str] | None = None) -> pytest.MarkDecorator:
    """Parametrises a test by `row`: those named, or all; all tests of a row run in one process.

    by_default: the rows that are not left to the nightly tier; None for all.
    """
    by_default = BY_NAME if by_default is None else by_default
    params = [in_groups(BY_NAME[name], name, nightly=name not in by_default) for name in names or BY_NAME]
    return pytest.mark.parametrize("row", params)


def in_groups(value: Any, name: str, *, nightly: bool = False) -> Any:
    """A parameter whose tests run in one process, in the default tier or the nightly one."""
    marks = [pytest.mark.xdist_group(name), *([pytest.mark.nightly] if nightly else [])]
    return pytest.param(value, id=name, marks=marks)


def in_tiers(values: Iterable[Any], *nightly: Any) -> list[Any]:
    """Parameters of those values (tuples of several), of which those in `nightly` are like one of the default tier."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.nightly] if value in nightly else []
        )
        for value in values
    ]


def build(row: Row, *, seed: int = 0, depth: int = DEPTH) -> VisionTransformer:
    """The row's model in eval mode with live weights, the same ones for the same seed."""
    model = timm.create_model(row.arch, pretrained=False, depth=depth, img_size=row.img_size, **row.kwargs)
    assert isinstance(model, VisionTransformer)
    return enliven(model, seed).eval()


def images(row: Row, batch: int = 2, *, seed: int = 0) -> Tensor:
    """[B, 3, h, w]: large blobs under fine noise, so that neighbours are alike and none are equal."""
    generator = torch.Generator().manual_seed(seed)
    blobs = torch.randn(batch, 3, 5, 5, generator=generator)
    smooth = F.interpolate(blobs, size=row.img_size, mode="bicubic", align_corners=False)
    return smooth + 0.5 * torch.randn(batch, 3, *row.img_size, generator=generator)


@torch.no_grad()
def enliven(model: Module, seed: int = 0) -> Module:
    """Give every parameter real spread, in place; a layer's output stays about as large as its input."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, mean: float, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std + mean

    for name, parameter in model.named_parameters():
        kind = name.rsplit(".", 1)[-1]
        if kind == "gamma":  # LayerScale is initialised to 1e-5 or so: a network that does nothing
            parameter.copy_(0.5 + 0.5 * torch.rand(parameter.shape, generator=generator))
        elif kind == "pos_embed":
            parameter.copy_(normal(parameter, 0.0, 0.3))
        elif kind in ("cls_token", "reg_token", "dist_token", "latent"):
            parameter.copy_(normal(parameter, 0.0, 1.0))
        elif kind == "bias":
            parameter.copy_(normal(parameter, 0.0, 0.1))
        elif parameter.ndim == 1:  # norms
            parameter.copy_(normal(parameter, 1.0, 0.2))
        else:  # linear and convolution
            parameter.copy_(normal(parameter, 0.0, parameter[0].numel() ** -0.5))

    for module in model.modules():
        if isinstance(module, Attention):
            _sharpen(module)
    return model


def _sharpen(layer: Any) -> None:
    """Make attention logits spread by about two, a little higher where a token looks at itself."""
    query, key, _ = layer.qkv.weight.chunk(3)  # views: written in place
    key.add_(0.15 * query)  # q·k of a token with itself then stands out, as it does in a trained model
    query.mul_(1.4)
    key.mul_(1.4)
    for norm in (layer.q_norm, layer.k_norm):
        if not isinstance(norm, nn.Identity):
            norm.weight.mul_(1.4)  # the norm has undone the scaling above
