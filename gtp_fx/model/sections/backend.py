"""The backend that compiles optimised graphs in sections, where that pays or the user asked for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from gtp_fx.errors import OptionError
from gtp_fx.graph.torch_internals import compile_with_inductor, compiles_ahead
from gtp_fx.model.sections.program import compile_in_sections


@dataclass(frozen=True)
class InSections:
    """A backend for torch.compile that compiles sections which are alike once.

    inductor: Inductor's options.
    shapes: "shared", or "auto": only where that was measured to pay.
    """

    inductor: Mapping[str, Any]
    shapes: str

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile a graph; in one piece where there is nothing to share, or torch writes what it compiles to a file.

        Raises OptionError where that file was asked for together with shapes="shared".
        """
        if compiles_ahead():
            if self.shapes == "shared":
                raise OptionError(
                    "shapes='shared': sections that share code are compiled as calls need them, and can't be written "
                    "ahead of them; give 'static', or leave it out"
                )
            return compile_with_inductor(gm, inputs, self.inductor)
        program = compile_in_sections(gm, inputs, self.inductor, only_where_it_pays=self.shapes == "auto")
        return compile_with_inductor(gm, inputs, self.inductor) if program is None else program
