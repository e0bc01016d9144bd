"""The backend that compiles optimised graphs in sections, where the user asked for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from gtp_fx.graph.torch_internals import compile_with_inductor
from gtp_fx.model.sections.program import compile_in_sections


@dataclass(frozen=True)
class InSections:
    """A backend for torch.compile that compiles sections which are alike once.

    inductor: Inductor's options.
    """

    inductor: Mapping[str, Any]

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph; in one piece where there is nothing to share."""
        program = compile_in_sections(gm, inputs, self.inductor)
        return compile_with_inductor(gm, inputs, self.inductor) if program is None else program
