"""Errors of torch.export in the user's terms: what went wrong, at which line of the model, and what to do about it."""

from __future__ import annotations

import contextlib
import re
import traceback
from pathlib import Path

import torch


def explained(error: Exception) -> str:
    """Return a message for an error of torch.export: what went wrong, where, and what to do about it."""
    if reads_values(error):
        return (
            f"its forward decides by what a tensor holds (an `if`, a loop or a shape that depends on values), and a "
            f"graph has one control flow: {first_lines(error, 1)}{_where(error)}\nOptimise an inner module that "
            f"doesn't; torch.compile(model, backend='gtp') does so by itself, since Dynamo breaks the graph there"
        )
    if fixed := fixed_batch(error):
        return (
            f"it works for a batch of {fixed} alone{_where(error)}: its forward has that size written into it, or "
            f"it was exported without dynamic_shapes; take sizes from the input (x.shape[0])"
        )
    return (
        f"{first_lines(error)}{_where(error)}\nGive example_inputs that the model accepts; torch.export.export(model, "
        f"example_inputs) shows the whole error"
    )


def reads_values(error: Exception) -> bool:
    """Return whether an error of torch.export says that a forward decides by what a tensor holds."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # with sympy; a capture has it

    return isinstance(error, GuardOnDataDependentSymNode) or "data-dependent" in str(error)


def fixed_batch(error: Exception) -> str:
    """Return the one batch that a model is traceable for, by an error of torch.export; "" where it names none."""
    found = re.search(r"specialized it to be a constant \((\d+)\)", str(error))
    return found[1] if found else ""


def _where(error: Exception) -> str:
    """Return " [file:line: code]" of the innermost frame in the model's own source, or "" where there is none."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    model = [frame for frame in frames if frame.name != "<module>"]
    return f" [{model[-1].filename}:{model[-1].lineno}: {model[-1].line}]" if model else ""


def first_lines(error: Exception, count: int = 3) -> str:
    """Return the beginning of an error's message, or its class where it has none."""
    return "\n".join(str(error).strip().splitlines()[:count]) or type(error).__name__
