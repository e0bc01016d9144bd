"""Traced nodes have the places in a model's source that torch writes, however they were found."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, fx, nn

from gtp_fx.graph.torch_internals import brief_notes


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


def test_stacks_are_those_that_torch_finds() -> None:
    plain = [node.meta.get("stack_trace") for node in _exported().nodes]
    with brief_notes():
        brief = [node.meta.get("stack_trace") for node in _exported().nodes]
    assert brief == plain
    assert len(set(plain)) > 10
    assert any(text and "Previous line repeated" in text for text in plain)


def test_this_thread_alone_describes_no_values() -> None:
    with brief_notes(), ThreadPoolExecutor(1) as other:
        own, others = _exported(), other.submit(_exported).result()
    described = [[node.meta.get("tensor_meta") is not None for node in graph.nodes] for graph in (own, others)]
    assert not any(described[0]) and any(described[1])
    assert str(own) == str(others)


def test_torch_makes_all_notes_again_afterwards() -> None:
    before = fx.proxy.CapturedTraceback
    with pytest.raises(KeyError, match="True"), brief_notes():
        raise KeyError(fx.proxy.CapturedTraceback is not before)
    assert fx.proxy.CapturedTraceback is before
    assert any(node.meta.get("tensor_meta") for node in _exported().nodes)
