"""Small models whose blocks attend within windows, or to pooled keys, each with its walk by hand.

Grids are no squares wherever the library takes that. Every block that can has tokens skip its branch, so that a block
sees what those before it made of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers
from timm.models.hieradet_sam2 import HieraDet
from timm.models.nest import Nest
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer

from bench.live_weights import enliven

from support import reference_windows as oracles
from support.reference_windows import Oracle
from support.zoo import in_groups


@dataclass(frozen=True, eq=False)
class Family:
    """blocks: by the name of each attention block's module, in graph order, tokens of each window that skip its branch.

    oracle: of the model, what takes a block's call to its parts. shape: of an image.
    """

    name: str
    build: Callable[[], nn.Module]
    oracle: Callable[[nn.Module], Oracle]
    blocks: dict[str, int]
    shape: tuple[int, ...]

    @property
    def branched(self) -> list[str]:
        """The blocks that have a branch to skip: all but those after which tokens leave the stream."""
        return [name for name, count in self.blocks.items() if count]

    @property
    def schedule(self) -> list[int]:
        return list(self.blocks.values())

    def inputs(self, batch: int = 2) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return enliven(self.build()).eval()


def family(
    name: str, oracle: Oracle, make: Callable[..., nn.Module], size: tuple[int, int], blocks: dict[str, int], **kw: Any
) -> Family:
    return Family(name, partial(make, **kw), lambda _: oracle, blocks, (3, *size))


def from_timm(arch: str, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(timm.create_model, arch, num_classes=10, **kwargs)


def from_hf(name: str, **config: Any) -> Callable[[], nn.Module]:
    of_class = getattr(transformers, name)
    return lambda: of_class(of_class.config_class(**config))


ONE: dict[str, Any] = {"depths": (2,), "num_heads": (2,), "embed_dim": 32}


PLAIN: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "window_size": 7}


SWIN = family(
    "swin",
    oracles.swin,
    from_timm("swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2, 1), num_heads=(2, 4), embed_dim=32),
    (56, 84),
    {"layers.0.blocks.0": 20, "layers.0.blocks.1": 26, "layers.1.blocks.0": 44},
)


def samvit(name: str, size: tuple[int, int], blocks: dict[str, int], global_blocks: tuple[int, ...]) -> Family:
    """SAM's trunk in two blocks, of windows of 7 x 7."""
    narrow = {"depth": 2, "embed_dim": 64, "num_heads": 2, "window_size": 7}
    build = from_timm("samvit_base_patch16", img_size=size, global_attn_indexes=global_blocks, **narrow)
    return family(name, oracles.sam, build, size, blocks)


SAM = samvit("samvit", (160, 192), {"blocks.0": 24, "blocks.1": 70}, global_blocks=(1,))


PADDED = family(
    "swin rolled, then padded",
    oracles.swin,
    from_timm(
        "swin_tiny_patch4_window7_224",
        img_size=(64, 80),
        window_size=7,
        strict_img_size=False,
        always_partition=True,
        **ONE,
    ),
    (64, 80),
    {"layers.0.blocks.0": 20, "layers.0.blocks.1": 30},
)


TORCHVISION = family(
    "torchvision swin, padded, then rolled",
    oracles.swin_torchvision,
    partial(SwinTransformer, [4, 4], 32, [2], [2], [7, 7], num_classes=10),
    (64, 80),
    {"features.1.0": 20, "features.1.1": 30},
)


HF_SWIN = family(
    "transformers swin, padded, then rolled",
    oracles.swin_hf,
    from_hf(
        "SwinForImageClassification",
        image_size=[64, 80],
        depths=[2],
        num_heads=[2],
        embed_dim=32,
        window_size=7,
        num_labels=10,
    ),
    (64, 80),
    {"swin.encoder.layers.0.blocks.0": 20, "swin.encoder.layers.0.blocks.1": 30},
)


HIERA = Family(
    "hiera",
    from_timm("hiera_tiny_224", img_size=(64, 96), stages=(2, 2, 2, 1), embed_dim=32, num_heads=1),
    oracles.hiera,
    {"blocks.0": 30, "blocks.1": 20, "blocks.3": 7, "blocks.5": 0},
    (3, 64, 96),
)


TWINS = family(
    "twins",
    oracles.twins,
    from_timm(
        "twins_svt_small",
        img_size=(64, 96),
        wss=(7,) * 4,
        depths=(2, 1, 1, 1),
        embed_dims=(32,) * 4,
        num_heads=(2,) * 4,
    ),
    (64, 96),
    {"blocks.0.0": 25, "blocks.0.1": 200, "blocks.1.0": 20, "blocks.2.0": 20, "blocks.3.0": 22},
)


FAMILIES = (
    SWIN,
    PADDED,
    family(
        "swin v2",
        oracles.swin_v2,
        from_timm("swinv2_tiny_window8_256", img_size=(64, 96), **ONE),
        (64, 96),
        {"layers.0.blocks.0": 30, "layers.0.blocks.1": 25},
    ),
    TORCHVISION,
    HF_SWIN,
    SAM,
    family(
        "transformers SAM",
        oracles.sam,
        from_hf(
            "SamVisionModel",
            **PLAIN,
            image_size=160,
            patch_size=16,
            global_attn_indexes=[1],
            output_channels=32,
            mlp_dim=128,
        ),
        (160, 160),
        {"vision_encoder.layers.0": 24, "vision_encoder.layers.1": 50},
    ),
    family(
        "transformers ViTDet",
        oracles.vitdet,
        from_hf(
            "VitDetModel",
            **PLAIN,
            image_size=[160, 192],
            pretrain_image_size=160,
            window_block_indices=[0],
            mlp_ratio=2,
        ),
        (160, 192),
        {"encoder.layer.0": 24, "encoder.layer.1": 70},
    ),
    family(
        "maxvit",
        oracles.maxvit,
        from_timm("maxvit_tiny_tf_224", img_size=(96, 128), depths=(1,), embed_dim=(64,), stem_width=32),
        (96, 128),
        {"stages.0.blocks.0.attn_block": 2, "stages.0.blocks.0.attn_grid": 4},
    ),
    HIERA,
    family(
        "hiera of sam 2, queries pooled within windows",
        oracles.hieradet,
        partial(HieraDet, num_classes=10, embed_dim=32, stages=(1, 2, 3, 2), global_att_blocks=(4,)),
        (96, 128),
        {"blocks.0": 30, "blocks.2": 7, "blocks.4": 20, "blocks.5": 160, "blocks.7": 42},
    ),
    TWINS,
    family(
        "nest",
        oracles.nest,
        partial(Nest, img_size=64, num_levels=2, embed_dims=(32, 64), num_heads=(2, 4), depths=(1, 1), num_classes=10),
        (64, 64),
        {"levels.0.transformer_encoder.0": 30, "levels.1.transformer_encoder.0": 20},
    ),
    family(
        "pvt v2",
        oracles.pvt,
        from_timm("pvt_v2_b0", depths=(1, 1, 1, 1)),
        (96, 128),
        {"stages.0.blocks.0": 300, "stages.1.blocks.0": 60, "stages.2.blocks.0": 12, "stages.3.blocks.0": 0},
    ),
)


def families(*chosen: Family, by_default: Sequence[Family] | None = None) -> pytest.MarkDecorator:
    """Parametrise a test by `family`; one process runs all tests of a family. by_default: as in `support.zoo.rows`."""
    by_default = chosen if by_default is None else by_default
    params = [in_groups(family, family.name, nightly=family not in by_default) for family in chosen]
    return pytest.mark.parametrize("family", params)


QUICK = tuple(family for family in FAMILIES if family.name in ("swin", "pvt v2"))
"""Windows, and pooled keys: what is captured by default."""

every_family = families(*FAMILIES)
families_in_tiers = families(*FAMILIES, by_default=QUICK)
