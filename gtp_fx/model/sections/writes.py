"""Whether a graph writes to tensors in place: then sections would have to know which of their inputs share memory.

A tensor counts what is written to it. An operator that is several others may write to its result while it makes it, and
that does no harm. So where a value was written to, its node is run again, alone and on copies of the same counts: what
the node writes to these, or what is missing of its result's count then, is a write that others see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from gtp_fx.graph.torch_internals import is_fake, mode_of, times_written
from gtp_fx.model.sections.cut import OUTSIDE
from gtp_fx.model.sections.values import leaves, value_of


def writes_in_place(graph: fx.Graph) -> bool:
    """Return whether a node of a graph, all of whose values are known, may write to a value of another node."""
    return any(_may_write(node) for node in graph.nodes if node.op not in OUTSIDE)


def _may_write(node: fx.Node) -> bool:
    noted = [value for value in leaves(value_of(node)) if isinstance(value, Tensor)]
    written = [times_written(value) for value in noted]
    if not any(written):
        return False
    if not all(map(is_fake, noted)) or node.op not in ("call_function", "call_method"):
        return True
    copies = {operand: _copy(value_of(operand)) for operand in node.all_input_nodes}
    args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)  # type: ignore[misc]
    try:
        with mode_of(noted[0]), torch.no_grad():
            if node.op == "call_method":
                again = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                again = node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # whatever else it needs, it isn't alone
        return True
    if any(times_written(mine) != times_written(value_of(theirs)) for theirs, mine in copies.items()):
        return True
    return written != [times_written(value) for value in leaves(again) if isinstance(value, Tensor)]


def _copy(value: Any) -> Any:
    """Return a fake tensor of the same form, written to as often; anything else itself."""
    if not isinstance(value, Tensor) or not is_fake(value):
        return value
    with mode_of(value), torch.no_grad():
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        for _ in range(times_written(value)):
            copy.zero_()
        return copy
