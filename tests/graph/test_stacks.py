"""Places in a model's source are those that torch writes, however they were found."""

import pytest
import torch
from torch import Tensor, fx, nn

from gtp_fx.graph.torch_internals import frames_remembered


class Nested(nn.Module):
    """A module that calls itself, and others from one line and from two."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nested(depth - 1) if depth else nn.Linear(4, 4)
        self.acts = nn.ModuleList([nn.GELU(), nn.ReLU()])

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.inner(x))
        for act in self.acts:
            x = act(x) if x.ndim else x
        return x.mul(2).add(
            1,
        )


def _exported() -> fx.Graph:
    return torch.export.export(Nested(5), (torch.zeros(2, 4),)).graph


def test_frames_that_are_remembered_are_those_that_torch_finds() -> None:
    plain = [node.meta.get("stack_trace") for node in _exported().nodes]
    with frames_remembered():
        remembered = [node.meta.get("stack_trace") for node in _exported().nodes]
    assert remembered == plain
    assert len(set(plain)) > 10
    assert any(text and "Previous line repeated" in text for text in plain)


def test_torch_reads_stacks_itself_again_afterwards() -> None:
    before = fx.proxy.CapturedTraceback
    with pytest.raises(KeyError, match="True"), frames_remembered():
        raise KeyError(fx.proxy.CapturedTraceback is not before)
    assert fx.proxy.CapturedTraceback is before
