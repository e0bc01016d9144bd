"""Convolutions: where a patch grid is born."""

from __future__ import annotations

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import Grid, GridAxis, Plain, TensorType, is_plain
from gtp_fx.rules.registry import Call, NoRule, Typed, rule


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def convolution(call: Call) -> Typed:
    """[B, C, *sides] -> [B, C', *sides']: a new grid, whose flattening makes a token domain.

    Its input may be an image or an older grid, whole in either case: a convolution needs every neighbour in place.
    """
    x = call.type(0)
    shape = call.output_shape()
    if not is_plain(x[0]):
        raise NoRule("a convolution over tokens that were moved into the batch")
    grid = Grid(call.node.name, shape[2:])
    sides = tuple((GridAxis(grid, side),) for side in range(len(grid.shape)))
    output: TensorType = ((Plain(shape[0]),), (Plain(shape[1]),), *sides)
    return Typed(output, operands={call.operand(0): x}, barrier="a convolution needs the whole grid")


@rule(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default, aten.group_norm.default)
def channel_norm(call: Call) -> Typed:
    """Statistics are over the grid (group norm) or fixed (batch norm in eval); either way the layout stays."""
    x = call.type(0)
    return Typed(x, operands={call.operand(0): x})
