"""Options passed to Inductor with the graph: the target's, overridden by those of the user's mode.

`optimize`, the backend and the originals that benchmarks compare with all take their options from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.graph.torch_internals import inductor_config, inductor_modes
from gtp_fx.targets import Target


def checked_mode(mode: Any) -> str | None:
    """Return `mode` if it is None or one of torch.compile's modes. Raises OptionError otherwise."""
    if mode is not None and (not isinstance(mode, str) or mode not in inductor_modes()):
        raise OptionError(
            f"mode={mode!r} is unknown; torch.compile has {', '.join(map(repr, inductor_modes()))}"
            f"{did_you_mean(str(mode), inductor_modes())}"
        )
    return mode


def check_target(target: Target) -> None:
    """Check a target's Inductor options.

    Raises OptionError for an option that Inductor doesn't have, for a value of the wrong type, and for freezing.
    """
    if not target.inductor:  # avoids importing Inductor, which takes two seconds
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
    """Return the options, by Inductor's names, for a graph that runs on `device`. Both arguments are checked already.

    A target's options apply only on its own kind of device; a prediction's target may be a device that isn't here.
    Where a mode is given, it alone decides the options that modes set (CUDA graphs, autotuning):
    "max-autotune-no-cudagraphs" uses no CUDA graphs, whatever the target says.
    """
    own: Mapping[str, Any] = target.inductor if target.device == device.type else {}
    if mode is None or mode == "default":
        return dict(own)
    modes = inductor_modes()
    decided = {name for options in modes.values() for name in options}
    return {**{name: value for name, value in own.items() if name not in decided}, **modes[mode]}
