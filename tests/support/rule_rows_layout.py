"""Rows, as in `rule_rows`, for what moves tokens about: views, ranges, grids. And what is refused outright."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

from support.rule_rows import STREAM, Refused, Row, flat, heads, kernel


def grid(x: Tensor) -> Tensor:
    """[B, 2 + 12, 8] -> [B, 8, 4, 3]"""
    return x[:, 2:].transpose(1, 2).reshape(x.shape[0], 8, 4, 3)


def with_suffix(x: Tensor) -> Tensor:
    """Two more tokens at the end."""
    return torch.cat([x, x[:, :1], 2 * x[:, :1]], dim=1)


# ---- layout


APART = "it takes a batch apart"


def layout() -> Iterator[Row]:
    merged = "B*(2+n1), 8"
    cuts = "the view cuts through a token axis"
    for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        yield Row(op, lambda x, op=op: op(x, [x.shape[0], x.shape[1], 2, 4]), "B, 2+n1, 2, 4")
        yield Row(op, lambda x, op=op: op(x, [x.shape[0], -1, 4, 2]), "B, 2+n1, 4, 2")
        yield Row(op, lambda x, op=op: op(flat(x), [x.shape[0], x.shape[1], 8]), STREAM)
        yield Row(op, lambda x, op=op: op(op(x, [-1, 8]).relu(), [-1, x.shape[1], 8]), STREAM)
        yield Row(op, lambda x, op=op: op(x[:, 2:].contiguous(), [x.shape[0], 4, 3, 8]), "B, g0, g1, 8", cuts)
        yield Row(op, lambda x, op=op: op(x, [x.shape[0], 8, x.shape[1]]), "B, 8, 14", cuts)
    reshape = aten.reshape.default
    yield Row(reshape, lambda x: flat(x).relu().mean(0), merged)
    yield Row(
        reshape,
        lambda x: x.reshape(x.shape[0] * x.shape[1], -1).mean(0),
        merged,
    )
    yield Row(reshape, lambda x: (x @ x.transpose(1, 2)).reshape(x.shape[0], -1).mean(1), "B, (2+n1)*(2+n1)")
    yield Row(reshape, lambda x: heads(x).reshape(-1, x.shape[1], 4).mean(1), "2B, 2+n1, 4")
    yield Row(reshape, lambda x: grid(x).relu().flatten(2).reshape(-1, 2, 4, 12), "B, 2, 4, n0", cuts)
    yield Row(reshape, lambda x: grid(x).reshape(x.shape[0], 8, 2, 2, 3), "B, 8, g0/2by2, g0/2by1, g1", cuts)
    unevenly = "the view divides a patch grid unevenly"
    yield Row(reshape, lambda x: grid(x).reshape(x.shape[0], 8, 6, 2), "B, 8, 6, 2", unevenly)
    yield Row(
        reshape,
        lambda x: torch.cat([x, x, x], 2).unflatten(2, (4, 6)).reshape(x.shape[0], x.shape[1], 6, 4),
        "B, 2+n1, 6, 4",
    )
    yield Row(
        reshape,
        lambda x: x + x[:, :0].reshape(x.shape[0], 0).sum(1)[:, None, None],
        "B, 0",
        "it holds nothing",
        "left",
    )
    yield Row(aten.permute.default, lambda x: x.permute(2, 0, -2), "8, B, 2+n1")
    yield Row(aten.transpose.int, lambda x: x.transpose(-1, 1), "B, 8, 2+n1")
    yield Row(aten.t.default, lambda x: flat(x).t().mean(1), "8, B*(2+n1)")
    yield Row(aten.numpy_T.default, lambda x: x[0].T.mean(1), "8, 2+m0", APART)
    yield Row(aten.select.int, lambda x: flat(x)[3], "8", "selecting from a merged token axis")
    yield Row(aten.slice.Tensor, lambda x: flat(x)[2:4], "2, 8", "slicing a merged token axis")
    yield Row(aten.unflatten.int, lambda x: flat(x).unflatten(0, (x.shape[0], 14)), "B, 14, 8", "it names a number of")
    yield Row(
        aten.conv2d.default,
        lambda x, w: F.conv2d(flat(x).unflatten(1, (2, 2, 2)), w[:2].reshape(2, 2, 2, 2)),
        "14B, 2, 1, 1",
        "a convolution over tokens that were moved into the batch",
    )
    yield Row(
        aten.conv2d.default,
        lambda x, w: F.conv2d(flat(x).unflatten(1, (2, 2, 2)), w[:2, :2].reshape(2, 2, 1, 1)).mean(0),
        "B*(2+n1), 2, 2, 2",
    )
    yield Row(aten.view_as_complex.default, lambda x: torch.view_as_complex(x.unflatten(2, (4, 2))).abs(), "B, 2+n1, 4")
    yield Row(
        aten.view_as_real.default,
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(2, (4, 2)))),
        "B, 2+n1, 4, 2",
    )
    yield Row(aten.unsqueeze.default, lambda x: x.unsqueeze(1), "B, 1, 2+n1, 8")
    yield Row(aten.unsqueeze.default, lambda x: x.unsqueeze(-2), "B, 2+n1, 1, 8")
    yield Row(aten.squeeze.dim, lambda x: x.unsqueeze(1).squeeze(1), STREAM)
    yield Row(aten.squeeze.dims, lambda x: x[:, None, :, None].squeeze((1, -2)), STREAM)
    yield Row(aten.squeeze.dim, lambda x: x[:, 1:].squeeze(-2), "B, 1+n1, 8")
    yield Row(aten.squeeze.dims, lambda x: x[:, None, 1:].squeeze((1, 2)), "B, 1+n1, 8")
    yield Row(
        aten.expand.default,
        lambda x: x[:, None].expand(-1, 3, -1, -1),
        "B, 3, 2+n1, 8",
    )
    yield Row(aten.expand.default, lambda x: x[:, None].expand(x.shape[0], 3, -1, 8), "B, 3, 2+n1, 8")
    yield Row(aten.expand.default, lambda x: x.expand(3, x.shape[0], x.shape[1], 8), "3, B, 2+n1, 8")
    yield Row(aten.expand.default, lambda x: x + x[:, :1].expand(x.shape), "B, 14, 8")
    each = aten.repeat_interleave.self_int
    yield Row(each, lambda x: x.unflatten(2, (2, 4)).repeat_interleave(3, 2), "B, 2+n1, 6, 4")
    yield Row(each, lambda x: x.repeat_interleave(2, 1), "B, 28, 8", "what is repeated run over tokens")
    yield Row(each, lambda x: x.repeat_interleave(2), "224B", "it flattens what it repeats")
    yield Row(aten.flatten.using_ints, lambda x: x.flatten(0, 1).mean(0), merged)
    yield Row(aten.flatten.using_ints, lambda x: x.unflatten(2, (2, 4)).flatten(-2), STREAM)
    yield Row(aten.unflatten.int, lambda x: x.unflatten(-1, (2, 4)), "B, 2+n1, 2, 4")
    yield Row(aten.unflatten.int, lambda x: x[:, 2:].unflatten(1, (4, 3)), "B, g0, g1, 8", cuts)
    yield Row(aten.unflatten.int, lambda x: x.unflatten(1, (1, 14)), "B, 1, 14, 8", "it names a number of tokens")
    for op in (aten.reshape_as.default, aten.view_as.default):
        yield Row(op, lambda x, op=op: op(x.unflatten(2, (2, 4)), x), STREAM)
        other = "it takes the shape of a tensor with other tokens"
        yield Row(
            op, lambda x, memory, op=op: op(x[:, :, None], memory.unflatten(2, (2, 4)).flatten(2)), "B, 2+n0, 8", other
        )
        yield Row(
            op,
            lambda x, w, op=op: op(F.linear(x, w), x),
            STREAM,
        )


# ---- ranges


def ranges() -> Iterator[Row]:
    yield Row(operator.getitem, lambda x: heads(x).unbind(1)[1], "B, 2+n1, 4")
    yield Row(aten.unbind.int, lambda x: heads(x).unbind(1)[1], "B, 2+n1, 4 | B, 2+n1, 4")
    yield Row(aten.unbind.int, lambda x: x.unbind(1)[3], " | ".join(["B, 8"] * 14), "unbinding takes tokens apart")
    yield from splits()
    yield from selects()
    yield from slices()
    yield Row(aten.cat.default, lambda x: torch.cat([x[:, :1], x], 1), "B, 3+n1, 8")
    yield Row(aten.cat.default, lambda x: torch.cat([x[:, 2:], x[:, :1], x[:, :1]], -2), "B, n1+2, 8")
    yield Row(aten.cat.default, lambda x: with_suffix(x), "B, 2+n1+2, 8")
    yield Row(aten.cat.default, lambda x, old: torch.cat([x, old], -1), "B, 2+n1, 16")
    yield Row(
        aten.cat.default,
        lambda x: torch.cat([x.new_empty(0), x], 1),
        STREAM,
    )
    yield Row(aten.cat.default, lambda x: torch.cat([x, x], 1), "B, 28, 8", "token axes are joined end to end")
    yield Row(aten.stack.default, lambda x, old: torch.stack([x, old], 1), "B, 2, 2+n1, 8")
    yield Row(aten.stack.default, lambda x: torch.stack([x, 2 * x, x], -1), "B, 2+n1, 8, 3")
    for op in (aten.pad.default, aten.constant_pad_nd.default):
        yield Row(op, lambda x, op=op: op(x, [1, 2]), "B, 2+n1, 11")
        yield Row(op, lambda x, op=op: op(x, [0, 0, 0, 0, 0, 0]), STREAM)
        yield Row(op, lambda x, op=op: op(x, [0, 1, 1, 0]), "B, 3+n1, 9")
        yield Row(op, lambda x, op=op: op(x, [0, 0, -1, 0]), "B, 13, 8", "it cuts the token axis")


def splits() -> Iterator[Row]:
    sizes = aten.split_with_sizes.default
    yield Row(aten.chunk.default, lambda x: x.chunk(2, -1)[1], "B, 2+n1, 4 | B, 2+n1, 4")
    yield Row(aten.split.Tensor, lambda x: x.split(3, 2)[2], "B, 2+n1, 3 | B, 2+n1, 3 | B, 2+n1, 2")
    yield Row(sizes, lambda x: x.split([3, 5], 2)[1], "B, 2+n1, 3 | B, 2+n1, 5")
    yield Row(sizes, lambda x: x.split([1, x.shape[1] - 1], 1)[1], "B, 1, 8 | B, 1+n1, 8")
    yield Row(sizes, lambda x: x.split([1, x.shape[1] - 1], 1)[0], "B, 1, 8 | B, 1+n1, 8")
    yield Row(
        sizes,
        lambda x: with_suffix(x).split([x.shape[1] + 1, 1], 1)[0],
        "B, 2+n1+1, 8 | B, 1, 8",
    )
    yield Row(
        sizes, lambda x: x.split([3, 11], 1)[0], "B, 3, 8 | B, 11, 8", "tokens 0 to 3 are taken by their position"
    )
    for op, size in ((aten.split.Tensor, 7), (aten.chunk.default, 2)):
        through = "splitting cuts through a token axis"
        yield Row(op, lambda x, op=op, size=size: op(x, size, 1)[0], "B, 7, 8 | B, 7, 8", through)


def selects() -> Iterator[Row]:
    op = aten.select.int
    yield Row(op, lambda x: x[:, 0], "B, 8")
    yield Row(op, lambda x: x.select(-1, 3), "B, 2+n1")
    yield Row(op, lambda x: with_suffix(x)[:, -2], "B, 8")
    yield Row(op, lambda x: with_suffix(x)[:, x.shape[1] + 1], "B, 8")
    yield Row(op, lambda x: x[:, 3], "B, 8", "one patch token (number 3) is selected by its position")
    yield Row(op, lambda x: x[:, -1], "B, 8", "one patch token (number -1) is selected by its position")


def slices() -> Iterator[Row]:
    op = aten.slice.Tensor
    yield Row(op, lambda x: x[:, 2:], "B, n1, 8")
    yield Row(op, lambda x: x[:, :1], "B, 1, 8")
    yield Row(op, lambda x: x[:, :, 2:-1], "B, 2+n1, 5")
    yield Row(op, lambda x: op(x, 1, 0, x.shape[1]), STREAM)
    yield Row(op, lambda x: op(x, 1, None, None), STREAM)
    yield Row(op, lambda x: with_suffix(x)[:, 1 : x.shape[1] + 1], "B, 1+n1+1, 8")
    yield Row(op, lambda x: with_suffix(x)[:, :-2], STREAM)
    yield Row(op, lambda x: with_suffix(x)[:, -2:], "B, 2, 8")
    yield Row(op, lambda x: with_suffix(x)[:, -2:-1], "B, 1, 8")
    yield Row(op, lambda x: with_suffix(x)[:, x.shape[1] : x.shape[1] + 1], "B, 1, 8")
    yield Row(op, lambda x: x[:, 2:5], "B, 3, 8", "tokens 2 to 5 are taken by their position")
    yield Row(op, lambda x: x[:, ::2], "B, 7, 8", "a strided slice of tokens")
    yield Row(op, lambda x: x[:, : x.shape[0]].mean(1), "B, B, 8", "a slice with a bound known only when it runs")
    yield Row(op, lambda x: x[:, 1 - x.shape[1] :].mean(1), "B, 1+n1, 8")
    yield Row(op, lambda x: x[:, : 1 - x.shape[1]].mean(1), "B, 1, 8")


# ---- grids


def windows(x: Tensor, apart: bool = False) -> Tensor:
    """[B, 8, 4, 3] -> [B, 2, 6, 8]: two windows of 2 x 3; apart: of every other row."""
    rows = x.permute(0, 2, 3, 1).reshape(x.shape[0], 2, 2, 3, 8)
    return (rows.transpose(1, 2) if apart else rows).reshape(x.shape[0], 2, 6, 8)


def grids() -> Iterator[Row]:
    cuts, roll, cut = "the view cuts through a token axis", aten.roll.default, aten.slice.Tensor
    same, other = "B, 8, g0, g1", "B, 8, h0, h1"
    yield Row(roll, lambda x: grid(x).roll((1, -1), (2, 3)), other, cuts)
    yield Row(roll, lambda x: grid(x).roll((1, -1), (2, 3)).relu().roll((-1, 1), (2, 3)), same, cuts)
    yield Row(roll, lambda x: x.roll(3, 2), STREAM)
    yield Row(roll, lambda x: x.roll(1, 1), "B, 14, 8", "the sides of a grid aren't whole here")
    yield Row(roll, lambda x: x.roll(1), "B, 14, 8", "it rolls all dimensions as one")
    flip = aten.flip.default
    yield Row(flip, lambda x: grid(x).flip(3), other, cuts)
    yield Row(flip, lambda x: grid(x).flip(3, 2).relu().flip(2).flip(3), same, cuts)
    yield Row(flip, lambda x: x[:, 2:].flip(1), "B, m0, 8", "it flips prefix tokens")
    yield Row(flip, lambda x: x.flip(1), "B, 14, 8", "it flips prefix tokens")
    yield Row(flip, lambda x: x.flip(2), STREAM)
    yield Row(cut, lambda x: F.pad(grid(x), (0, 1)).flip(3)[:, :, :, 1:], "B, 8, 4, 3", "that was rolled or flipped")
    yield Row(aten.pad.default, lambda x: F.pad(grid(x), (0, 1, 0, 2)), other, cuts)
    yield Row(aten.pad.default, lambda x: F.pad(grid(x), (1, 1)), "B, 8, 4, 5", "it pads a grid in front")
    yield Row(cut, lambda x: F.pad(grid(x), (0, 1, 0, 2)).relu()[:, :, :4, :3], same, cuts)
    yield Row(cut, lambda x: F.pad(grid(x), (0, 1))[:, :, :, :2], "B, 8, 4, 2", "places 0 to 2 of a grid")
    yield Row(cut, lambda x: grid(x)[:, :, 1::2], other, cuts)
    reshape = aten.reshape.default
    yield Row(reshape, lambda x: windows(grid(x)), "B, g0/2by2, m0, 8", cuts)
    yield Row(reshape, lambda x: windows(grid(x), apart=True), "B, g0/2by1, m0, 8", cuts)
    yield Row(reshape, lambda x: windows(grid(x)).relu().reshape(x.shape[0], 4, 3, 8), "B, g0, g1, 8", cuts)
    yield Row(
        reshape,
        lambda x: grid(x).reshape(x.shape[0], 8, 2, 2, 3).permute(0, 2, 4, 3, 1).reshape(x.shape[0], 2, 3, 16),
        "B, h0, h1, 16",
        cuts,
    )
    yield Row(
        reshape,
        lambda x: grid(x).reshape(x.shape[0], 8, 2, 2, 3).permute(0, 2, 3, 4, 1).reshape(x.shape[0], 2, 2, 24),
        "B, g0/2by2, g0/2by1, 8*g1",
        cuts,
    )


# ---- spatial


def spatial() -> Iterator[Row]:
    needs, cuts = "it needs the whole grid", "the view cuts through a token axis"
    same, other = "B, 8, g0, g1", "B, 8, h0, h1"
    yield Row(aten.conv1d.default, lambda x, w: F.conv1d(x.transpose(1, 2), kernel(w, 1)), "B, 8, 2+n1")
    yield Row(
        aten.conv2d.default, lambda x, w: F.conv2d(x.transpose(1, 2).unsqueeze(3), kernel(w, 1, 1)), "B, 8, 2+n1, 1"
    )
    yield Row(aten.conv1d.default, lambda x, w: F.conv1d(x.transpose(1, 2), kernel(w, 1), stride=2), "B, 8, h0", needs)
    yield Row(
        aten.conv1d.padding, lambda x, w: F.conv1d(x.transpose(1, 2), kernel(w, 3), padding="same"), "B, 8, h0", needs
    )
    yield Row(aten.conv2d.default, lambda x, w: F.conv2d(grid(x), kernel(w, 3, 3)), other, cuts)
    yield Row(aten.conv2d.padding, lambda x, w: F.conv2d(grid(x), kernel(w, 3, 3), padding="same"), same, cuts)
    yield Row(
        aten.conv2d.padding,
        lambda x, w: x[:, 2:] + F.conv2d(grid(x), kernel(w, 3, 3), padding="same").flatten(2).transpose(1, 2),
        same,
        cuts,
        "kept",
    )
    yield Row(aten.im2col.default, lambda x: F.unfold(grid(x), (2, 1), stride=(2, 1)), "B, 16, m0", cuts)
    volume = "B, 8, h0, h1, h2"
    yield Row(aten.conv3d.default, lambda x, w: F.conv3d(grid(x)[:, :, None], kernel(w, 1, 3, 3)), volume, cuts)
    yield Row(
        aten.conv3d.padding,
        lambda x, w: F.conv3d(grid(x)[:, :, None], kernel(w, 1, 3, 3), padding="same"),
        volume,
        cuts,
    )
    yield Row(aten.avg_pool2d.default, lambda x: F.avg_pool2d(grid(x), 2), other, cuts)
    yield Row(
        aten.avg_pool2d.default,
        lambda x: F.avg_pool2d(x, 2),
        "B, 7, 4",
        "a grid without a batch",
    )
    yield Row(aten.max_pool2d.default, lambda x: F.max_pool2d(grid(x), 2), other, cuts)
    volume, slices = (lambda x: grid(x)[:, :, None]), "B, 8, h0, h1, h2"
    yield Row(aten.max_pool3d.default, lambda x: F.max_pool3d(volume(x), (1, 2, 2)), slices, cuts)
    yield Row(aten.avg_pool3d.default, lambda x: F.avg_pool3d(volume(x), (1, 2, 2)), slices, cuts)
    series, needs = "B, 8, h0", "it needs the whole grid"
    yield Row(aten.max_pool1d.default, lambda x: F.max_pool1d(x.transpose(1, 2), 2), series, needs)
    yield Row(aten.adaptive_avg_pool2d.default, lambda x: F.adaptive_avg_pool2d(grid(x), 2), other, cuts)
    for op, mode, antialias in (
        (aten.upsample_bilinear2d.vec, "bilinear", False),
        (aten.upsample_bicubic2d.vec, "bicubic", False),
        (aten.upsample_nearest2d.vec, "nearest", False),
        (aten._upsample_bilinear2d_aa.vec, "bilinear", True),
        (aten._upsample_bicubic2d_aa.vec, "bicubic", True),
    ):
        size = lambda y, mode=mode, aa=antialias: F.interpolate(y, (8, 6), mode=mode, antialias=aa)  # noqa: E731
        yield Row(op, lambda x, size=size: size(grid(x)), other, cuts)
        table = "it resamples a table"
        yield Row(op, lambda x, w, size=size: x * size(w[None, None]).mean(), "1, 1, 8, 6", table, reads="left")
    fixed = aten.batch_norm.default
    yield Row(fixed, lambda x, w: F.batch_norm(x.transpose(1, 2), w[0], w[1].abs()), "B, 8, 2+n1")
    yield Row(fixed, lambda x, w: F.batch_norm(flat(x), w[0], w[1].abs()).mean(0), "B*(2+n1), 8")
    yield Row(
        fixed,
        lambda x: F.batch_norm(x.transpose(1, 2), None, None, training=True),
        "B, 8, 14",
        "run over tokens",
    )
    yield Row(fixed, lambda x: F.batch_norm(grid(x), None, None, training=True), same, cuts)
    legit = aten._native_batch_norm_legit_no_training.default
    yield Row(
        legit,
        lambda x, w: legit(x.transpose(1, 2), None, None, w[0], w[1].abs(), 0.1, 1e-5)[0],
        "B, 8, 2+n1 | 0 | 0",
    )
    channels = "the channels of a norm run over tokens"
    yield Row(fixed, lambda x, table: F.batch_norm(x, table[:, 0], table[:, 1].abs()), "B, 14, 8", channels)
    yield Row(aten.group_norm.default, lambda x: F.group_norm(grid(x), 2), same, cuts)
    averages = "the values that a group norm averages run over tokens"
    yield Row(aten.group_norm.default, lambda x: F.group_norm(x.transpose(1, 2), 2), "B, 8, 14", averages)


def images() -> Iterator[Row]:
    """Operators that take a batch apart, join two or mix one's images: each image has tokens of its own."""
    yield Row(aten.select.int, lambda x: x[0] + 1.0, "2+m0, 8", APART)
    yield Row(aten.slice.Tensor, lambda x: x[1:3], "2, 2+m0, 8", APART)
    yield Row(aten.slice.Tensor, lambda x: x[: x.shape[0]], STREAM)
    yield Row(
        aten.split.Tensor, lambda x: x.repeat_interleave(2, 0).split(x.shape[0])[1], "B, 2+m0, 8 | B, 2+m0, 8", APART
    )
    yield Row(aten.split.Tensor, lambda x: x.split(x.shape[0])[0], STREAM)
    yield Row(
        aten.unbind.int,
        lambda x: x.repeat_interleave(2, 0).unflatten(0, (-1, 2)).unbind(1)[1],
        "B, 2+m0, 8 | B, 2+m0, 8",
        APART,
    )
    yield Row(aten.repeat_interleave.self_int, lambda x: x.repeat_interleave(2, 0), "2B, 2+m0, 8", APART)
    yield Row(aten.roll.default, lambda x: x.roll(1, 0), "B, 2+m0, 8", APART)
    yield Row(aten.cat.default, lambda x, old: torch.cat([x, old]), "2B, 2+m0, 8", APART)
    yield Row(aten.stack.default, lambda x, old: torch.stack([x, old], 1), "B, 2, 2+n1, 8")
    yield Row(aten.mean.dim, lambda x: x.mean(0), "2+m0, 8", APART)
    yield Row(aten.amax.default, lambda x: x.amax((0, 1)), "8")
    yield Row(aten.softmax.int, lambda x: x.softmax(0), "B, 2+n0, 8", "the values of a softmax run over images")
    pairs = "the rows or columns of a product run over images"
    yield Row(aten.matmul.default, lambda x: x.transpose(0, 1) @ x.permute(1, 2, 0), "2+m0, B, B", pairs)
    yield Row(aten.matmul.default, lambda x, w: x.transpose(0, 1) @ w, "2+n1, B, 8")
    yield Row(
        aten.scaled_dot_product_attention.default,
        lambda x: F.scaled_dot_product_attention(*[heads(x).transpose(0, 2)] * 3),
        "2+n0, 2, B, 4",
        "the queries and keys of an attention run over images",
    )
    adds = "what an einsum adds up or pairs run over images"
    yield Row(aten.einsum.default, lambda x: torch.einsum("bnc,anc->abn", x, x), "B, B, 2+m0", adds)
    yield Row(aten.add.Tensor, lambda x: x[None] + x[:, None], "B, B, 2+m0, 8", APART)
    grid_alone = "a grid without a batch"
    yield Row(aten.conv1d.default, lambda x, w: F.conv1d(x[0].transpose(0, 1), kernel(w, 1)), "8, 14", grid_alone)
    yield Row(aten.linear.default, lambda x: F.linear(x, x[0]), "B, 14, 14", "run over tokens")


def picks() -> Iterator[Row]:
    """Operators that pick by numbers, which index all tokens: whatever they are, the row that they make is another."""
    select, gather, index = aten.index_select.default, aten.gather.default, aten.index.Tensor
    among_all, other = "it picks tokens by their numbers among all of them", "B, m0, 8"
    mixed = "pick among patches and tokens that are no patches"
    yield Row(select, lambda x: x[:, 2:].index_select(1, numbers(3)), other, among_all)
    yield Row(select, lambda x: x.index_select(1, numbers(3)), "B, 3, 8", mixed)
    yield Row(select, lambda x: x.index_select(2, numbers(4)), "B, 2+n1, 4")
    yield Row(select, lambda x: grid(x).index_select(2, numbers(3)), "B, 8, 3, 3", "along one side of a grid")
    yield Row(select, lambda x: x.index_select(0, numbers(3)), "3, 2+m0, 8", APART)
    each = "laid out as [batch, tokens, features]"
    yield Row(gather, lambda x: x[:, 2:].gather(1, numbers(3)[:, None].expand(x.shape[0], -1, 8)), other, among_all)
    yield Row(gather, lambda x: x.gather(2, numbers(3).expand(x.shape[0], 14, -1)), "B, 14, 3", each)
    yield Row(gather, lambda x: x[:, 2:].gather(1, numbers(3)[:, None].expand(2, -1, 8)), "2, 3, 8", "of some images")
    yield Row(gather, lambda x, w: x + w.gather(0, numbers(1)[:, None].expand(1, 8)), "1, 8")
    yield Row(index, lambda x: x[:, 2:][:, numbers(3)], other, among_all)
    yield Row(index, lambda x: x[:, 2:][rows(x), numbers(3).expand(x.shape[0], 3)], other, among_all)
    yield Row(index, lambda x: x[:, 2:][rows(x) * 0, numbers(3).expand(x.shape[0], 3)], "B, 3, 8", "by several tensors")
    yield Row(index, lambda x: x[:, 2:][:, numbers(4).view(2, 2)], "B, 2, 2, 8", "several tensors of numbers")
    yield Row(index, lambda x, w: x + w[numbers(1)], "1, 8")


def rows(x: Tensor) -> Tensor:
    return torch.arange(x.shape[0]).unsqueeze(1)


def numbers(count: int) -> Tensor:
    """So many numbers, at most four, none of them twice."""
    return torch.arange(count) * 3 % 4


ROWS = [*layout(), *ranges(), *grids(), *spatial(), *images(), *picks()]

MERGED, SHARED = "merged with another dimension", "no dimension for the images"

REFUSED = [
    Refused(aten.relu.default, lambda x: flat(x).relu(), "", MERGED),
    Refused(aten.einsum.default, lambda x, table: torch.einsum("bnc,nc->bnc", x, table), "", SHARED),
]
