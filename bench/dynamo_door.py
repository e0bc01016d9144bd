"""A torch.compile backend that rewrites as gtp_fx's does, but runs the result eagerly, which saves Inductor's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.errors import GtpError
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options


class Door:
    """Backend that applies gtp_fx's passes without compiling.

    made: the optimised graphs so far.
    refused: errors of the graphs that were refused; calling the backend raised them.
    """

    def __init__(self, **options: Any) -> None:
        self.options = Options.of(**options)
        self.made: list[Optimised] = []
        self.refused: list[GtpError] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        try:
            self.made.append(run_passes(capture_dynamo(gm), self.options))
        except GtpError as error:
            self.refused.append(error)
            raise
        return self.made[-1].graph_module
