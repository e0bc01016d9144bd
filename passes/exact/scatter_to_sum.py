"""Exact: what is added to a part of a tensor in place is added to all of it, with zeros elsewhere.

    x[:, :, 1:, 1:] += bias      slice_scatter(x, slice_scatter(x[2], x[2][3] + bias, 3), 2)   ->   x + pad(bias)

An attention's logits then are a product plus a bias, as where nothing was written in place. The part may be seen in
another shape while something is added to it (positions by row and by column). Anything else that is written to a part
stays as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.nodes import count_nodes
from gtp_fx.graph.operators import VIEWS
from gtp_fx.graph.symbols import is_symbolic, shape_of, written

_SCATTER = aten.slice_scatter.default


class _Other(Exception):
    """What is written to the part is no sum of the part and something else."""


def scatter_to_sum(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` with such updates as sums; `gm` itself where there are none."""
    if not count_nodes(gm.graph, (_SCATTER,)):
        return gm
    copy = edit.copy_of(gm)
    changed = False
    # From the last one back: those inside another are read as parts of it.
    for node in reversed(list(copy.graph.nodes)):
        if node.target is not _SCATTER or not node.users:
            continue
        emit = edit.Emitter(copy.graph, like=node, before=node)
        try:
            added = _added(emit, node, node.args[0])
        except _Other:
            continue
        changed = True
        # A part may be written back as it is: what `x[:, 1:] += y` does after it has updated the part.
        node.replace_all_uses_with(node.args[0] if added is None else emit(aten.add.Tensor, node.args[0], added))
    return edit.finish(copy) if changed else gm


def _added(emit: edit.Emitter, node: Any, part: Any) -> fx.Node | None:
    """Return what `node` holds beyond `part`, in a shape that broadcasts to its own; None for nothing.

    Raises _Other where it isn't `part` plus something.
    """
    if not isinstance(node, fx.Node):
        raise _Other
    args: tuple[Any, ...] = node.args
    if node is part or _same_slice(node, part):
        return None
    if node.target is _SCATTER:
        base, update, *_ = args
        if base is not part and not _same_slice(base, part):
            raise _Other
        return _padded(emit, node, _filled(emit, _added(emit, update, _slice_of(node)), update))
    if node.target in VIEWS:
        inner: Any = node.args[0]
        found = _filled(emit, _added(emit, inner, part), inner)
        return None if found is None else _viewed(emit, found, inner, node)
    if node.target is aten.add.Tensor and not node.kwargs:
        for one, other in (args[:2], args[1::-1]):
            try:
                found = _added(emit, one, part)
            except _Other:
                continue
            if not isinstance(other, fx.Node) or shape_of(one) != shape_of(node):
                raise _Other
            return other if found is None else _sum(emit, found, other)
    raise _Other


def _slice_of(scatter: fx.Node) -> tuple[Any, ...]:
    """Return the arguments of the slice that a scatter writes to: the tensor, dimension, start, stop and step."""
    arguments: Any = scatter.args
    base, _, *rest = arguments
    return _bounds(base, *rest)


def _bounds(base: Any, dim: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> tuple[Any, ...]:
    """Return a slice's arguments, its bounds counted from the start and within the dimension."""
    shape = shape_of(base)
    dim %= len(shape)
    size = shape[dim]
    numbers = [0 if start is None else start, size if stop is None else stop]
    if is_symbolic(size) or not all(isinstance(number, int) for number in numbers):
        raise _Other
    start, stop = (max(0, min(size, n + size if n < 0 else n)) for n in numbers)
    return base, dim, start, stop, step


def _same_slice(node: Any, part: Any) -> bool:
    """Tell whether a node is the slice that `part` describes."""
    if not isinstance(part, tuple) or not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor:
        return False
    arguments: Any = node.args
    base, *rest = arguments
    if base is not part[0] and not (isinstance(base, fx.Node) and _alike(base, part[0])):
        return False
    return _bounds(base, *rest)[1:] == part[1:]


def _alike(one: Any, other: Any) -> bool:
    """Tell whether two nodes are the same slice of one tensor."""
    both = isinstance(other, fx.Node) and one.target is aten.slice.Tensor is other.target
    return both and one.args[0] is other.args[0] and _bounds(*one.args) == _bounds(*other.args)


def _filled(emit: edit.Emitter, added: fx.Node | None, like: fx.Node) -> fx.Node | None:
    """Expand what is added to the whole shape of `like`, but for images that it is the same for."""
    if added is None:
        return None
    own, wanted = shape_of(added), shape_of(like)
    own = (1,) * (len(wanted) - len(own)) + own
    shape = [1 if mine != size and is_symbolic(size) else size for mine, size in zip(own, wanted, strict=True)]
    if shape[1:] != list(wanted[1:]):
        raise _Other
    if shape_of(added) == tuple(shape):
        return added
    sizes = [-1 if is_symbolic(size) else size for size in shape]
    return _known(emit(aten.expand.default, added, sizes), added.meta["val"].expand(shape))


def _viewed(emit: edit.Emitter, added: fx.Node, inner: fx.Node, view: fx.Node) -> fx.Node:
    """View what is added to `inner` as `view` has that; all images may share it where they keep a dimension."""
    shape = list(shape_of(view))
    if shape_of(added) != shape_of(inner):
        if shape[0] != shape_of(inner)[0]:
            raise _Other
        shape[0] = 1
    return _known(emit(aten.reshape.default, added, written(shape)), added.meta["val"].reshape(shape))


def _padded(emit: edit.Emitter, scatter: fx.Node, added: fx.Node | None) -> fx.Node | None:
    """Pad what is added to a slice with zeros, to all of what the slice was taken from."""
    base, dim, start, stop, step = _slice_of(scatter)
    if added is None:
        return None
    if step != 1:
        raise _Other
    shape = shape_of(base)
    amounts = [0, 0] * (len(shape) - 1 - dim) + [start, shape[dim] - stop]
    return _known(emit(aten.constant_pad_nd.default, added, amounts), aten.constant_pad_nd(added.meta["val"], amounts))


def _sum(emit: edit.Emitter, one: fx.Node, other: fx.Node) -> fx.Node:
    return _known(emit(aten.add.Tensor, one, other), one.meta["val"] + other.meta["val"])


def _known(node: fx.Node, value: Tensor) -> fx.Node:
    """Return a new node that is known to have this value."""
    node.meta["val"] = value
    return node
