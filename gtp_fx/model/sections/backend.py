"""How optimised graphs are compiled: by Inductor, whole or in sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gtp_fx.graph.torch_internals import compile_with_inductor
from gtp_fx.model.sections.program import compile_in_sections
from gtp_fx.options.options import Options


def shares_code(options: Options, device: torch.device) -> bool:
    """Return whether blocks that differ in nothing but numbers of tokens are to share compiled code.

    By default not on a GPU, where it hasn't been measured, nor with a mode of torch.compile, which may record whole
    graphs.
    """
    if options.shapes == "auto":
        return options.mode in (None, "default") and device.type == "cpu"
    return options.shapes == "shared"


_LEAST_WORK = 20_000_000_000
"""FLOPs of a run from which sections are worth it by default: some half a second of a CPU's core. A site that isn't
compiled costs a run about a millisecond, and a section a twentieth of one (DeiT-T, one image)."""


@dataclass(frozen=True)
class InSections:
    """A backend for torch.compile that compiles sections which are alike once.

    inductor: Inductor's options.
    always: whether to do so however little a run has to do.
    """

    inductor: Mapping[str, Any]
    always: bool = False

    @classmethod
    def of(cls, options: Options, inductor: Mapping[str, Any]) -> InSections:
        """Return the backend for what the user asked for."""
        return cls(dict(inductor), options.shapes == "shared")

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph; in one piece where there is nothing to share."""
        program = compile_in_sections(gm, inputs, self.inductor, 0 if self.always else _LEAST_WORK)
        return compile_with_inductor(gm, inputs, self.inductor) if program is None else program
