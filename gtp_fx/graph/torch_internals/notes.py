"""What torch.fx notes with each node while a model is traced, as far as this package reads it.

That is a fifth of an export: the stack of calls, by which a node says where in the model's source it comes from, and a
description of its value, `meta["tensor_meta"]`, beside the value itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary
from types import CodeType, FrameType
from typing import Any


@contextlib.contextmanager
def brief_notes() -> Iterator[None]:
    """Let torch.fx note the same stacks in less time, and no descriptions of values, in this context.

    A stack is a hundred frames, nearly all of which are those of the node before, and torch makes each anew. A
    description says in which memory format a value is, for which torch compares products of symbols. Export reads none.

    Other threads get the same stacks, and their descriptions. Public: none; `torch.fx.config.do_not_emit_stack_traces`
    leaves nodes without a place.
    """
    from torch.fx import proxy
    from torch.fx.experimental import proxy_tensor

    of_nodes: Any = proxy
    of_values: Any = proxy_tensor
    me, describe = threading.get_ident(), of_values._extract_tensor_metadata

    def described(*args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == me else describe(*args, **kwargs)

    stacks, of_nodes.CapturedTraceback = of_nodes.CapturedTraceback, _Stacks()
    of_values._extract_tensor_metadata = described
    try:
        yield
    finally:
        of_nodes.CapturedTraceback, of_values._extract_tensor_metadata = stacks, describe


class _Stacks:
    """What torch.fx takes of `torch.utils._traceback.CapturedTraceback`: `extract().summary()`, outermost first."""

    def __init__(self) -> None:
        # By a code's identity and the place in it. Comparing two codes, or finding a place's line, takes longer than
        # all else here; so each code is held, that no other takes its identity.
        self._known: dict[tuple[int, int], tuple[FrameSummary, CodeType]] = {}

    def extract(self) -> _Stacks:
        return self

    def summary(self) -> StackSummary:
        """Return the stack of the caller."""
        known, found = self._known, []
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            place = (id(code), frame.f_lasti)
            if place not in known:
                known[place] = FrameSummary(code.co_filename, frame.f_lineno, code.co_name), code
            found.append(known[place][0])
            frame = frame.f_back
        return StackSummary(reversed(found))
