"""What Inductor is told beside the graph: a target's options, and over them those of the mode that the user asked for.

The one place that decides it, for both doors and for what they are compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gtp_fx.errors import OptionError
from gtp_fx.graph.torch_internals import inductor_config, inductor_modes
from gtp_fx.targets import Target


def checked_mode(mode: Any) -> str | None:
    """One of torch.compile's modes, or None. Raises OptionError."""
    if mode is not None and (not isinstance(mode, str) or mode not in inductor_modes()):
        raise OptionError(f"mode={mode!r} is unknown; torch.compile has {', '.join(map(repr, inductor_modes()))}")
    return mode


def check_target(target: Target) -> None:
    """Raises OptionError where a target has an option that Inductor doesn't, a value of another type, or freezing."""
    if not target.inductor:  # so that nothing is imported, which takes two seconds
        return
    if unknown := sorted(set(target.inductor) - set(inductor_config())):
        raise OptionError(
            f"target {target.name!r}: Inductor has no option {', '.join(map(repr, unknown))}; "
            f"torch._inductor.list_options() has them all"
        )
    try:
        torch.compile(torch.nn.Identity(), options=dict(target.inductor))  # compiles nothing yet
    except RuntimeError as error:
        raise OptionError(f"target {target.name!r}: {error}") from error
    if target.inductor.get("freezing"):
        raise OptionError(
            f"target {target.name!r}: 'freezing' compiles copies of the weights, which don't follow load_state_dict: "
            f"leave it out. As an option it does nothing anyway; docs/using.md has what does"
        )


def inductor_options(target: Target, mode: str | None, device: torch.device) -> dict[str, Any]:
    """By Inductor's names, for a graph that runs on `device`; both as checked.

    A target's options are for its own kind of device: it may be one that isn't here, to predict for. What modes decide
    (CUDA graphs, autotuning) is the mode's alone where one is given: "max-autotune-no-cudagraphs" has none, whatever
    the target likes.
    """
    own: Mapping[str, Any] = target.inductor if target.device == device.type else {}
    if mode is None or mode == "default":
        return dict(own)
    modes = inductor_modes()
    decided = {name for options in modes.values() for name in options}
    return {**{name: value for name, value in own.items() if name not in decided}, **modes[mode]}
