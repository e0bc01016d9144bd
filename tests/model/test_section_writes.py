"""Writes in place that other nodes see keep a graph whole; those inside one operator don't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from gtp_fx.graph.torch_internals import fake_mode
from gtp_fx.model.sections.writes import writes_in_place


def within(x: Tensor) -> Tensor:
    """Write to the result while it is made, as some of torch's composite operators do."""
    return x.sin().mul_(2)


def to_view(x: Tensor) -> Tensor:
    """Write to a view of what it is given."""
    x[:, :1].zero_()
    return x.cos()


def graph_of(*targets: Callable[..., Tensor] | str) -> fx.Graph:
    """Return a graph of calls, each of the one before, with their values as Dynamo notes them."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    with fake_mode():
        node.meta["example_value"] = torch.empty(2, 4)
        for target in targets:
            value = node.meta["example_value"]
            if isinstance(target, str):
                node = graph.call_method(target, (node,))
                node.meta["example_value"] = getattr(value, target)()
            else:
                node = graph.call_function(target, (node,))
                node.meta["example_value"] = target(value)
    graph.output(node)
    return graph


@pytest.mark.parametrize("targets", [(torch.sin, torch.cos), (within,), (within, torch.t, torch.sin), (within, within)])
def test_none_that_others_see(targets: tuple[Callable[..., Tensor], ...]) -> None:
    assert not writes_in_place(graph_of(*targets))


@pytest.mark.parametrize(
    "targets",
    [
        ("relu_",),
        (torch.sin, "relu_"),
        (torch.sin, torch.t, torch.relu_),
        (within, "zero_"),
        (torch.sin, to_view),
        (within, to_view),
    ],
)
def test_one_that_others_see(targets: tuple[Callable[..., Tensor] | str, ...]) -> None:
    assert writes_in_place(graph_of(*targets))
