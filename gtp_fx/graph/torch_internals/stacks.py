"""Stacks of calls, by which a traced graph says where in the model's source each of its nodes comes from."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from traceback import FrameSummary, StackSummary
from types import CodeType, FrameType
from typing import Any


@contextlib.contextmanager
def frames_remembered() -> Iterator[None]:
    """Let torch.fx read this process's stacks from frames that it has met before, while a model is traced.

    A node's stack is a hundred frames, nearly all of which are those of the node before. Torch makes each anew, from
    text that C++ wrote, which is a tenth of an export. The stacks are the same in any thread. Public: none;
    `torch.fx.config.do_not_emit_stack_traces` leaves nodes without a place.
    """
    from torch.fx import proxy

    names: Any = proxy
    before, names.CapturedTraceback = names.CapturedTraceback, _Stacks()
    try:
        yield
    finally:
        names.CapturedTraceback = before


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
