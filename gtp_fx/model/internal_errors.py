"""The one place where an error that gtp_fx didn't foresee is reported: every way in has `internal_errors_reported`.

Passes, rules and terms don't keep account of the node that they work on. The traceback already has it: in the locals of
the frame that failed, and in those of its callers. So an error costs a look through the frames, and success nothing.
"""

from __future__ import annotations

import platform
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import fx

from gtp_fx.errors import CheckError, GtpError, InternalError
from gtp_fx.graph.nodes import layer_name, operator_name, source_line
from gtp_fx.graph.torch_internals import OUT_OF_MEMORY, restarts_dynamo
from gtp_fx.passes.order import Pass, optional_passes

_NOT_OURS = (GtpError, CheckError, *OUT_OF_MEMORY, OSError, Warning)
"""Errors that say all already, or that say what the machine lacks, and warnings that a user has made errors."""
_WAYS_IN = ("gtp_fx.model", "gtp_fx.cli")
"""Modules whose functions only call the steps that an error names."""


@contextmanager
def internal_errors_reported() -> Iterator[None]:
    """Raise an InternalError for an error within the context that nothing foresaw, from that error.

    Foreseen errors pass as they are, and so do a lack of memory, errors of files, and what isn't an Exception (an
    interrupt from the keyboard). Contexts nest: the innermost reports.
    """
    try:
        yield
    except _NOT_OURS:
        raise
    except Exception as error:
        if restarts_dynamo(error):
            raise
        raise internal_error(error) from error


def internal_error(error: Exception) -> InternalError:
    """Return the InternalError for `error`, described by what its traceback holds."""
    calls = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in calls if _module(frame).startswith("gtp_fx.") and not _is_this_file(frame)]
    frames = [frame for frame, _ in own]
    name, is_pass = _step(frames)
    where = ("in pass " if is_pass else "in ") + name + _at(_node(frames))
    lines = [
        f"gtp_fx met something that it did not foresee, {where}: {type(error).__name__}: {_text(error)}",
        "The fault is gtp_fx's" + _or_anothers(calls) + ", and the model is as it was."
        + (f" disabled_passes=[{name!r}] leaves this pass out." if is_pass and name in optional_passes() else ""),
        "To report it: this message with the traceback, how the model is built and called, and the files that the "
        "option dump_graphs='folder' writes before the error.",
        f"gtp_fx {_version()}, torch {torch.__version__}, Python {platform.python_version()}"
        + (f"; raised by {_place(*own[-1])}" if own else ""),
    ]  # fmt: skip
    return InternalError("\n".join(lines), where)


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_this_file(frame: FrameType) -> bool:
    return frame.f_code.co_filename == __file__


def _step(frames: list[FrameType]) -> tuple[str, bool]:
    """Return the step that failed, and whether it is a pass: else the outermost function that is no way in."""
    for frame in reversed(frames):
        step = frame.f_locals.get("step")
        if isinstance(step, Pass):
            return step.name, True
    named = [frame for frame in frames if not frame.f_code.co_name.startswith("<")]  # "<lambda>"
    inside = [frame for frame in named if not _module(frame).startswith(_WAYS_IN)] or named[-1:]
    return (inside[0].f_code.co_name if inside else "a way in"), False


def _node(frames: list[FrameType]) -> fx.Node | None:
    """Return the node at hand: of the innermost frame that has one in its locals, one named `node` first."""
    for frame in reversed(frames):
        for value in (frame.f_locals.get("node"), *frame.f_locals.values()):
            held = vars(value).get("node") if _is_own(value) else value  # a Call, a Coercion, a Term
            if isinstance(held, fx.Node):
                return held
    return None


def _is_own(value: Any) -> bool:
    """Return whether a value is an instance of one of this package's dataclasses."""
    kind = type(value)
    return kind.__module__.startswith("gtp_fx.") and hasattr(kind, "__dataclass_fields__")


def _at(node: fx.Node | None) -> str:
    """Return ", at aten.linear.default of blocks.3.mlp [model.py:31]", as far as known."""
    if node is None:
        return ""
    layer, line = layer_name(node), source_line(node)
    return f", at {operator_name(node)}" + (f" of {layer}" if layer else "") + (f" [{line}]" if line else "")


def _or_anothers(calls: list[tuple[FrameType, int]]) -> str:
    """Return ", or that of …" where gtp_fx had called other code, not of torch or Python: a user's rule or strategy."""
    below = (str(Path(torch.__file__).parent), str(Path(traceback.__file__).parent), "<")
    written = [call for call in calls if not call[0].f_code.co_filename.startswith(below)]
    if not written or _module(written[-1][0]).startswith("gtp_fx."):
        return ""
    return f", or that of {_place(*written[-1])}, which it called"


def _place(frame: FrameType, line: int) -> str:
    """Return "gtp_fx.plan.cost.chains:168", or "mine/rules.py:12" outside this package."""
    file = "/".join(Path(frame.f_code.co_filename).parts[-2:])
    return f"{_module(frame) if _module(frame).startswith('gtp_fx.') else file}:{line}"


def _text(error: Exception) -> str:
    """Return an error's text, three lines of it at most."""
    try:
        text = "\n".join(str(error).strip().splitlines()[:3])[:600]
    except Exception:  # an error whose own text fails
        return "(it has no text)"
    return text or "(it has no text)"


def _version() -> str:
    return str(getattr(sys.modules["gtp_fx"], "__version__", "unknown"))
