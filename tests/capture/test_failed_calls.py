"""A call that failed while a forward was traced, and whose exception it caught, isn't run again."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.ops import aten

from gtp_fx.capture.failed_calls import drop_failed_calls


class Tries(nn.Module):
    """Adds a table, repeated where it doesn't fit, and asserts something that returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async(x.isfinite().all())
        try:
            return x + self.table
        except RuntimeError:
            return x + self.table.repeat(1, 4, 1)


@torch.no_grad()
def test_only_what_failed_is_dropped() -> None:
    model, x = Tries(), torch.randn(2, 16, 8)
    program = torch.export.export(model, (x,))
    before = [node.target for node in program.graph.nodes]
    drop_failed_calls(program.graph)
    after = [node.target for node in program.graph.nodes]
    assert before.count(aten.add.Tensor) == 2 and after.count(aten.add.Tensor) == 1
    assert len(after) == len(before) - 1
    torch.testing.assert_close(program.run_decompositions({}).module()(x), model(x))
