"""Frames of one grid told apart: the side that counts them becomes images, and each frame has a grid of its own.

A video's patches are born as one grid, [B, C, F, H, W]. Where no block attends across its frames, each frame is a
picture with tokens of its own (and often a CLS of its own): it may lose tokens that the others keep. With the side F
known as images, every rule that asks whose tokens these are knows what must not be mixed once some are removed.
"""

from __future__ import annotations

from dataclasses import replace

from gtp_fx.types.axes import Factor, Plain, TensorType
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.merging import merge_grids, split_tokens

FRAMES = "gtp_frames"
"""Meta key of a node at which a grid is born: the side of it that counts frames (`passes/exact/mark_frames.py`)."""


def separate_frames(kind: TensorType, birth: str, side: int) -> TensorType:
    """Return the type with a side of the grid that is born at `birth` as images, and the others as the frame's grid."""

    def change(factor: Factor) -> Factor:
        if not isinstance(factor, GridAxis) or factor.grid.birth != birth:
            return factor
        if factor.side == side:
            return Plain(factor.whole_size, images=True)
        shape = factor.grid.shape
        frame = replace(factor.grid, shape=(*shape[:side], *shape[side + 1 :]))
        return replace(factor, grid=frame, side=factor.side - (factor.side > side))

    return tuple(merge_grids(tuple(map(change, split_tokens(dim)))) for dim in kind)
