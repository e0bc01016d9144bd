"""A torch.compile backend that rewrites as gtp_fx's does, but runs the result eagerly, which saves Inductor's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from bench.counted import flops
from gtp_fx.capture.dynamo import capture_dynamo
from gtp_fx.errors import GtpError
from gtp_fx.model.pipeline import Optimised, run_passes
from gtp_fx.options.options import Options


class Door:
    """Backend that applies gtp_fx's passes without compiling.

    keep_refused: whether a graph that is refused runs as it was, instead of calling the backend raising the error.
    made: the optimised graphs so far.
    refused: errors of the graphs that were refused.
    """

    def __init__(self, *, keep_refused: bool = False, **options: Any) -> None:
        self.options = Options.of(**options)
        self.keep_refused = keep_refused
        self.made: list[Optimised] = []
        self.refused: list[GtpError] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        try:
            self.made.append(run_passes(capture_dynamo(gm), self.options))
        except GtpError as error:
            self.refused.append(error)
            if self.keep_refused:
                return gm.forward
            raise
        return self.made[-1].graph_module


class CountingDoor(Door):
    """Backend that also counts FLOPs, by torch's own counter, as the rewritten graphs run.

    counted: each call of one of them, with after / before.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.counted: list[tuple[Optimised, float]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        result = super().__call__(gm, example_inputs)
        if not self.made or result is not self.made[-1].graph_module:
            return result
        made = self.made[-1]

        def run(*inputs: Any) -> Any:
            before = flops(gm, inputs)
            self.counted.append((made, flops(result, inputs) / before if before else 1.0))
            return result(*inputs)

        return run
