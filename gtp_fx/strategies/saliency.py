"""CageViT (arXiv 2305.09924): a map of the image decides before the first block; minor tokens are fused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError, UnsupportedModelError
from gtp_fx.graph.nodes import ancestors
from gtp_fx.graph.operators import CONVOLUTIONS
from gtp_fx.ops.autocast import without_autocast
from gtp_fx.ops.register import operator
from gtp_fx.strategies.grouping import Grouping
from gtp_fx.strategies.keys import enter, entered
from gtp_fx.strategies.registry import register_strategy
from gtp_fx.strategies.sites import AtSite, Emit
from gtp_fx.strategies.tokens import Groups, Tokens, averaged, split
from gtp_fx.types.axes import TokenAxis
from gtp_fx.types.places import home_of

SaliencyMap = Callable[[Tensor], Tensor]
"""A function from images [B, channels, *sides] to [B, *any sides]: how much each place matters."""

MAPS: dict[str, str] = {}
"""The key of each map's name."""

_ONTO_GRID: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
"""Pooling onto a grid, by its number of sides."""
_MEANS: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d}
"""Moving averages, by the number of sides."""
_FLAT = 2
"""Sides of a flat image."""
_AROUND = 7
"""Side of the neighbourhood that contrast is measured against, in pixels."""


def register_saliency(name: str) -> Callable[[SaliencyMap], SaliencyMap]:
    """Make `Saliency(map=name)` call the decorated function, which replaces an earlier one of the same name.

    The function is plain PyTorch of its images alone. A network's weights have to be part of the model, which shares
    them with its graph. Raises OptionError where `name` is no string.
    """
    if not isinstance(name, str) or not name:
        raise OptionError(f"register_saliency({name!r}): give a name, such as 'edges'")
    caller = sys._getframe(1)

    def register(function: SaliencyMap) -> SaliencyMap:
        MAPS[name] = enter(name, function, caller)
        return function

    return register


def _shapes(images, grid, key):  # type: ignore[no-untyped-def]
    return images.new_empty(images.shape[0], torch.Size(grid).numel(), dtype=torch.float32)


@operator(_shapes)
def saliency(images: Tensor, grid: list[int], key: str) -> Tensor:
    """Average the registered map of a key over each patch: images [B, channels, *sides] to [B, patches], float32.

    Raises OptionError where no map has that key, or it returns anything but [B, *sides].
    """
    with without_autocast(images):
        found = entered(key)(images)
    if found.ndim != images.ndim - 1 or found.shape[0] != images.shape[0]:
        raise OptionError(
            f"saliency map {key!r} gave {tuple(found.shape)} for images {tuple(images.shape)}: give [B, *sides]"
        )
    pooled: Tensor = _ONTO_GRID[len(grid)](found.float()[:, None], grid).flatten(1)
    return pooled


@register_saliency("contrast")
def contrast(images: Tensor) -> Tensor:
    """Return each pixel's squared distance from the mean around it, in the last two dimensions; 0 where it is flat."""
    sides = min(images.ndim - 2, _FLAT)
    flat = images.float().flatten(0, -2 - sides)  # a video's frames are treated one by one
    around = _MEANS[sides](flat, _AROUND, stride=1, padding=_AROUND // 2, count_include_pad=False).reshape(images.shape)
    difference: Tensor = (images - around).square().sum(dim=1)
    return difference


@register_strategy
@dataclass(frozen=True)
class Saliency(Grouping):
    """Selection before the first block: the most salient patches are kept, and the minor ones are fused.

    The minor patches, in the order of their saliency, are cut into groups. Each group becomes its members' mean, in the
    place of its most salient member. The publication learns how to fuse them.

    token_scale: adds the log of a fused token's patch count to attention's logits.
    map: a name passed to `register_saliency`. "contrast" needs nothing; the publication takes a convolutional network's
        activations.
    fused: number of tokens that the minor ones become.
    """

    name: ClassVar[str] = "saliency"
    merges: ClassVar[bool] = True
    sized: ClassVar[bool] = True
    before_attention: ClassVar[bool] = True
    token_scale: bool = False
    map: str = "contrast"
    fused: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.map not in MAPS:
            raise OptionError(
                f"Saliency(map={self.map!r}) is unknown; give one of {', '.join(map(repr, MAPS))}, or register your "
                f"own with @gtp_fx.strategies.register_saliency({self.map!r})"
            )
        if isinstance(self.fused, bool) or not isinstance(self.fused, int) or self.fused < 1:
            raise OptionError(f"Saliency(fused={self.fused!r}): give an integer of 1 or more")

    @property
    def code_keys(self) -> tuple[str, ...]:
        return (*super().code_keys, MAPS[self.map])

    def refuse(self, axis: TokenAxis, skipping: bool = False) -> str:
        grid = axis.domain.grid
        if not grid.placed or home_of(grid) != grid:
            return (
                "it looks at the image that patches were cut from, row by row, and these tokens come in as an argument "
                "or aren't in that order"
            )
        return super().refuse(axis, skipping)

    def positions(self, blocks: int) -> Collection[int]:
        return [0]

    def refuse_stream(self, stream: fx.Node, axis: TokenAxis) -> str:
        try:
            images_of(stream, axis)
        except UnsupportedModelError as reason:
            return str(reason)
        return ""

    def ranking(self, emit: Emit, site: AtSite) -> fx.Node:
        grid = list(site.axis.domain.grid.shape)
        images = images_of(site.stream, site.axis)
        return emit(gtp_fx.saliency.default, images, grid, MAPS[self.map])

    def group(self, tokens: Tokens) -> Groups:
        score_Bn = tokens.score_Bn
        assert score_Bn is not None
        kept_BK, removed_BP = split(score_Bn, tokens.removed)
        fused = min(self.fused, kept_BK.shape[1], tokens.removed)
        # The least salient kept patches carry the groups: the most salient carrier gets the most salient group.
        carriers_BF = score_Bn.gather(1, kept_BK).argsort(dim=1, descending=True, stable=True)[:, -fused:]
        order_BP = score_Bn.gather(1, removed_BP).argsort(dim=1, descending=True, stable=True)
        rank_BP = order_BP.argsort(dim=1)
        into_BP = carriers_BF.gather(1, rank_BP * fused // tokens.removed)
        return averaged(tokens, kept_BK, removed_BP, into_BP)


def images_of(stream: fx.Node, axis: TokenAxis) -> fx.Node:
    """Return the images [B, channels, *sides] that a stream's patches were cut from.

    They are what the first convolution reads, whatever the layout of the model's input; in a model without one, the
    input itself. Raises UnsupportedModelError where no value, or more than one, could be them.
    """
    grid, batch = axis.domain.grid.shape, stream.meta["val"].shape[0]
    before = ancestors(stream)
    convolved = {node for node in before if node.target in (*CONVOLUTIONS, aten.convolution.default)}
    read = {node.args[0] for node in convolved if not convolved & ancestors(node)}
    if not convolved and len(grid) <= _FLAT:
        read = {node for node in before if node.op == "placeholder" and _could_be_images(node, grid, batch)}
    found = [node for node in read if isinstance(node, fx.Node) and _could_be_images(node, grid, batch)]
    if len(found) != 1 or len(read) != 1:
        raise UnsupportedModelError(
            f"saliency looks at the images, and {len(read)} values of this model could be a batch of them over a grid "
            f"of {' x '.join(map(str, grid))} patches: another strategy ranks tokens by themselves"
        )
    return found[0]


def _could_be_images(node: fx.Node, grid: tuple[int, ...], batch: int) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim != len(grid) + 2 or value.shape[0] != batch:
        return False
    return all(size >= side for size, side in zip(value.shape[2:], grid, strict=True))
