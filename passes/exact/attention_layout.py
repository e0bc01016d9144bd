"""Which dimensions of an attention's operands are images, windows and heads, and how they become two.

[images * heads, …]                      ->   [images, heads, …]
[images, windows, …, heads, …], any order ->   [images * windows, heads, …]
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.edit import Emitter
from gtp_fx.graph.symbols import shape_of, written
from gtp_fx.passes.exact.build_attention import Shape, Sized, seen_as
from gtp_fx.types.axes import Plain, holds_images, is_plain, whole_size
from gtp_fx.types.grids import GridAxis
from gtp_fx.types.infer import WholeTyping


@dataclass(frozen=True)
class Layout:
    """How the leading dimensions of an attention become those of images (and windows) and of heads.

    lead: the leading dimensions as they are.
    order: their permutation.
    goal: the two that they are then reshaped to.
    """

    lead: Shape
    order: tuple[int, ...]
    goal: Shape

    def arranged(self, emit: Emitter, x: Sized, like: fx.Node) -> fx.Node:
        """Insert what brings a value that broadcasts to [*lead, rows, columns] to the new dimensions.

        like: a tensor with the leading dimensions.
        """
        if self.lead == self.goal:
            return x.node
        rank = len(self.lead) + 2
        tail = (1, 1, *x.shape)[-2:]
        full = (1,) * (rank - len(x.shape)) + x.shape
        node = x.node
        if self.order != tuple(range(len(self.lead))):
            node = emit(aten.reshape.default, node, written(full)) if full != x.shape else node
            node = emit(aten.permute.default, node, [*self.order, rank - 2, rank - 1])
        turned = tuple(full[d] for d in self.order)
        lead = tuple(self.lead[d] for d in self.order)
        return seen_as(emit, Sized(node, (*turned, *tail)), (*lead, *tail), (*self.goal, *tail), like).node

    def restored(self, emit: Emitter, x: fx.Node, tail: Shape) -> fx.Node:
        """Insert what brings the attention's output [*goal, *tail] back to [*lead, *tail]."""
        if self.lead == self.goal:
            return x
        x = emit(aten.reshape.default, x, written((*(self.lead[d] for d in self.order), *tail)))
        rank = len(self.lead)
        if self.order == tuple(range(rank)):
            return x
        return emit(aten.permute.default, x, [*(self.order.index(d) for d in range(rank)), rank, rank + 1])


def layout_of(q: fx.Node, value: fx.Node, typing: WholeTyping) -> Layout | None:
    """Return the layout of an attention's operands; None where heads can't be told from images, as a site needs."""
    lead = shape_of(q)[:-2]
    same = tuple(range(len(lead)))
    if len(lead) == 1:
        number = merged_heads(q, typing) or merged_heads(value, typing)
        return None if number is None else Layout(lead, same, (lead[0] // number, number))
    if len(lead) == 2:
        return Layout(lead, same, lead)
    kind = typing.types.get(q)
    if not isinstance(kind, tuple):
        return None
    batch = _images(typing)
    images = [d for d in same if holds_images(kind[d])] or [d for d in same if whole_size(kind[d]) in batch][:1]
    if len(images) != 1:
        return None
    others = [d for d in same if d not in images]
    windows, heads = [[d for d in others if is_plain(kind[d]) is plain] for plain in (False, True)]
    first = math.prod(lead[d] for d in (*images, *windows))
    return Layout(lead, (*images, *windows, *heads), (first, math.prod(lead[d] for d in heads)))


def merged_heads(q: fx.Node, typing: WholeTyping) -> int | None:
    """Return the heads of q [images * heads, tokens, features], from its type; None where the type doesn't show them.

    The type has the first dimension's factors, as the view that merged them had. Heads might come before the images, so
    the outer factor has to be known as the images.
    """
    kind = typing.types.get(q)
    if not isinstance(kind, tuple):
        return None
    images, *rest = kind[0]
    known = (
        images.images if holds_images(kind[0]) and isinstance(images, Plain) else images.whole_size in _images(typing)
    )
    if _batch_of_one(typing) and not holds_images(kind[0]):
        known, rest = True, list(kind[0])  # a batch of one doesn't appear in a type
    if not known:
        return None
    while rest and not isinstance(rest[0], Plain):  # skip the windows, which are between images and heads
        rest = rest[1:]
    return math.prod(factor.whole_size for factor in rest) if all(isinstance(f, Plain) for f in rest) else None


def _batch_of_one(typing: WholeTyping) -> bool:
    """Tell whether every dimension of images in the graph has size 1."""
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    sizes = {f.size for kind in kinds for dim in kind for f in dim if isinstance(f, Plain) and f.images}
    return sizes == {1}


def _images(typing: WholeTyping) -> set[int]:
    """Return the batch sizes of values over patch grids."""
    kinds = [kind for kind in typing.types.values() if isinstance(kind, tuple)]
    return {whole_size(kind[0]) for kind in kinds if any(isinstance(f, GridAxis) for dim in kind for f in dim)}
