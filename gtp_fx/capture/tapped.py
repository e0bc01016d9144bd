"""Taps: outputs of modules inside of a model that are returned beside its own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from gtp_fx.capture.called_as import CalledAs
from gtp_fx.errors import CaptureError, OptionError


def check_taps(model: nn.Module, taps: Sequence[str]) -> tuple[str, ...]:
    """Return `taps` as a tuple. Raises OptionError for what is no path of a module inside of `model`."""
    if isinstance(taps, str):
        raise OptionError(f"taps={taps!r} is a string: give a list of paths, taps=[{taps!r}]")
    known = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    for path in taps:
        if path not in known:
            near = difflib.get_close_matches(str(path), known, n=3)
            meant = f"did you mean {' or '.join(map(repr, near))}?" if near else f"paths are such as {known[0]!r}"
            raise OptionError(f"taps: {type(model).__name__} has no module {path!r}; {meant}")
    return tuple(dict.fromkeys(taps))


def with_taps(model: nn.Module, taps: Sequence[str]) -> nn.Module:
    """Return a view of `model` whose forward returns (output, {path: output of the module there}); itself without taps.

    Its forward raises CaptureError where a tapped module isn't called, or more than once.
    """
    if not taps:
        return model

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        found: dict[str, list[Any]] = {path: [] for path in taps}
        handles = [
            model.get_submodule(path).register_forward_hook(lambda *call, to=outputs: to.append(call[-1]))
            for path, outputs in found.items()
        ]
        try:
            output = model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for path, outputs in found.items():
            if len(outputs) != 1:
                times = f"is called {len(outputs)} times" if outputs else "isn't called"
                raise CaptureError(
                    f"taps: {path!r} {times} by {type(model).__name__}'s forward, and a tap is the output of one call: "
                    f"tap what is inside of it, or what it is in"
                )
        return output, {path: outputs[0] for path, outputs in found.items()}

    return CalledAs(model, forward, inspect.signature(model.forward))
