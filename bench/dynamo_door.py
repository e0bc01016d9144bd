"""The Dynamo door without Inductor's seconds: rewrites as the backend does, and runs the result eagerly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.errors import GtpError
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options


class Door:
    """A torch.compile backend. made: what each graph became; refused: why a graph could not be taken (then it raises)."""

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
