"""Copies of graphs: no code is generated for those that are only rewritten, and the last one is an ordinary module."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from gtp_fx.graph import edit
from gtp_fx.graph.torch_internals import code_when_called, with_code


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def traced_net() -> fx.GraphModule:
    traced = fx.symbolic_trace(Doubled())
    for node in traced.graph.nodes:
        node.type = None  # a string here, by which torch 2.11 can't pickle a graph
    return traced


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs that code is generated for."""
    found: list[fx.Graph] = []
    generate = fx.Graph.python_code

    def noting(self: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        found.append(self)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(fx.Graph, "python_code", noting)
    return found


def test_code_is_generated_for_what_runs(generated: list[fx.Graph]) -> None:
    traced, x = traced_net(), torch.ones(2)
    generated.clear()

    @code_when_called()
    def rewritten() -> fx.GraphModule:
        gm = traced
        for _ in range(3):
            gm = edit.finish(edit.copy_of(gm))
        (times,) = [node for node in gm.graph.nodes if node.op == "call_function"]
        times.target = torch.add
        return edit.finish(gm)

    gm = rewritten()
    assert not generated
    torch.testing.assert_close(gm(x), torch.tensor([3.0, 4.0]))
    assert generated == [gm.graph]
    assert isinstance(edit.copy_of(traced), fx.GraphModule) and len(generated) == 2, "outside, at once"


def test_the_last_copy_is_an_ordinary_graph_module() -> None:
    traced, x = traced_net(), torch.ones(2)
    gm = with_code(code_when_called()(edit.copy_of)(traced))
    assert type(gm).__mro__[1] is fx.GraphModule and type(gm).__name__ == type(traced).__name__
    assert gm.weight is traced.weight and gm.meta == traced.meta
    for again in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        torch.testing.assert_close(again(x), torch.tensor([2.0, 3.0]))
        assert "self.weight" in again.code
    assert with_code(traced) is traced


def test_what_others_make_has_its_code_when_it_is_read(generated: list[fx.Graph]) -> None:
    x = torch.ones(2)
    with code_when_called():
        program = torch.export.export(Doubled(), (x,))
        outside = traced_net()
        copied = copy.deepcopy(outside)
    assert not generated, "neither by torch.export's own passes"
    assert "torch.ops.aten.mul.Tensor" in program.graph_module.code and generated == [program.graph_module.graph]
    for again in (outside, copied, pickle.loads(pickle.dumps(outside))):
        torch.testing.assert_close(again(x), torch.tensor([2.0, 3.0]))


def test_what_has_code_gets_new_code_at_once(generated: list[fx.Graph]) -> None:
    gm = traced_net()
    with code_when_called():
        generated.clear()
        gm.recompile()
        assert generated == [gm.graph] and type(gm).__mro__[1] is fx.GraphModule
        again = pickle.loads(pickle.dumps(gm))
    torch.testing.assert_close(again(torch.ones(2)), torch.tensor([2.0, 3.0]))


def test_code_of_other_threads_is_generated_at_once(generated: list[fx.Graph]) -> None:
    own = fx.GraphModule.recompile
    inside, leave = threading.Event(), threading.Event()

    @code_when_called()
    def stay() -> None:
        inside.set()
        leave.wait()

    other = threading.Thread(target=stay)
    other.start()
    inside.wait()
    gm = traced_net()
    assert gm.graph in generated
    with code_when_called():
        leave.set()
        other.join()
        generated.clear()
        traced_net()
        assert not generated, "whoever leaves first"
    assert fx.GraphModule.recompile is own


def test_an_error_ends_the_putting_off(generated: list[fx.Graph]) -> None:
    own = fx.GraphModule.recompile
    with pytest.raises(KeyError, match="False"), code_when_called():
        raise KeyError(fx.GraphModule.recompile is own)
    assert fx.GraphModule.recompile is own and traced_net().graph in generated
