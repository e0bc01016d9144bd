"""Exact: remove attention masks that hide nothing, also those written into a value, added zeros and factors of one.

Libraries build an all-true mask from `arange` and pass it to every attention. It costs memory and, worse, the fast
kernels, which take no mask. To recognise such masks, values that depend on no argument, parameter or buffer are
computed here. They may depend on the batch size, since a value that is expanded over images is the same for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph import edit, nodes
from gtp_fx.graph.operators import CHOICES, CONSTANTS, LIKE_ANOTHER, MASK_ARITHMETIC, MASKED_FILLS
from gtp_fx.graph.symbols import per_image, shape_of

_NEUTRAL = {aten.add.Tensor: 0, aten.mul.Tensor: 1}
"""What each of these operators may add or multiply by without effect."""
_LARGEST = 1 << 24
"""Most elements of a value that is computed here; larger ones aren't worth the memory."""


def drop_trivial_masks(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` without masks that hide nothing; `gm` itself where it creates no constants."""
    if not nodes.count_nodes(gm.graph, (*CONSTANTS, *LIKE_ANOTHER)):
        return gm
    gm = edit.copy_of(gm)
    known = known_values(gm.graph)
    for node in list(gm.graph.nodes):
        if node.target is aten.scaled_dot_product_attention.default:
            args = list(node.args)
            if len(args) > 3 and _hides_nothing(known.get(args[3])):
                args[3] = None
                edit.set_args(node, tuple(args))
            if _hides_nothing(known.get(node.kwargs.get("attn_mask"))):  # type: ignore[arg-type]
                node.kwargs = {**node.kwargs, "attn_mask": None}
                node.meta.pop("val", None)
        elif node.target in _NEUTRAL and not node.kwargs:
            for x, other in (node.args, node.args[::-1]):
                if _is_full_of(_NEUTRAL[node.target], known.get(other)) and _same_value(x, node):
                    node.replace_all_uses_with(x)
                    break
        elif node.target in (*MASKED_FILLS, *CHOICES):
            kept = _written_over_by_nothing(node, known)
            if kept is not None and _same_value(kept, node):
                node.replace_all_uses_with(kept)
    return edit.finish(gm)


def known_values(graph: fx.Graph) -> dict[Any, Tensor]:
    """Compute the values that depend on no input, for one image: a dimension that is the batch has size 1."""
    known: dict[Any, Tensor] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor):
            continue
        if per_image(value.numel()) > _LARGEST:
            continue
        if node.target in LIKE_ANOTHER:  # the other's shape says all
            shape = [per_image(size) for size in value.shape]
            known[node] = node.target(torch.empty(shape, dtype=value.dtype), *node.args[1:])
            continue
        creates = node.target in CONSTANTS
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if not (creates or (node.target in MASK_ARITHMETIC and tensors and all(n in known for n in tensors))):
            continue
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known.get(n, _for_one_image(n)))
        if any(isinstance(leaf, fx.Node) for leaf in torch.utils._pytree.tree_leaves((args, kwargs))):
            continue
        # Compute on the default device, the CPU, wherever the model is.
        here = {name: value for name, value in kwargs.items() if name not in ("device", "pin_memory", "layout")}
        known[node] = node.target(*args, **here)
    return known


def _for_one_image(node: fx.Node) -> Any:
    """Return a size for a batch of one; other values that aren't known stay nodes."""
    value = node.meta.get("val")
    return per_image(value) if isinstance(value, int) and not isinstance(value, bool) else node


def _hides_nothing(mask: Tensor | None) -> bool:
    """Tell whether a mask is known and lets attention see everything."""
    if mask is None:
        return False
    return bool(mask.all()) if mask.dtype == torch.bool else _is_full_of(0, mask)


def _written_over_by_nothing(node: fx.Node, known: dict[Any, Tensor]) -> Any:
    """Return the value that a masked_fill or where returns as it is, by a mask that is known; None where it doesn't."""
    if node.target in MASKED_FILLS:
        value, mask = node.args[:2]
        return value if mask in known and not bool(known[mask].any()) else None
    mask, *sides = node.args
    if mask in known and bool(known[mask].all()):
        return sides[0]
    return sides[1] if mask in known and not bool(known[mask].any()) else None


def _is_full_of(number: int, value: Tensor | None) -> bool:
    """Tell whether a value is known and this number everywhere."""
    return value is not None and value.dtype != torch.bool and bool((value == number).all())


def _same_value(x: Any, total: fx.Node) -> bool:
    """Tell whether `x` has the shape and dtype of the sum or product `total`, so that neither is changed."""
    if not isinstance(x, fx.Node):
        return False
    return shape_of(x) == shape_of(total) and x.meta["val"].dtype == total.meta["val"].dtype
