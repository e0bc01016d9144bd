"""What gtp_fx didn't foresee: one kind of error at every way in, by name and place, and a model that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ops import aten  # type: ignore[import-not-found]
from typer.testing import CliRunner

import gtp_fx
from gtp_fx.cli import app as cli
from gtp_fx.errors import InternalError
from gtp_fx.model import backend
from gtp_fx.model.planner import Planner
from gtp_fx.model.preview import inspect_model
from gtp_fx.passes import runner
from gtp_fx.passes.journal import Journal
from gtp_fx.types.rules import registry

from support.tiny_vit import Block, TinyViT, pictures

Fault = Callable[[BaseException], None]


@pytest.fixture
def rule_fails(monkeypatch: pytest.MonkeyPatch) -> Fault:
    """Let the rule of GELU raise an error that isn't foreseen."""

    def set_up(error: BaseException) -> None:
        def rule(call: Any) -> Any:
            raise error

        monkeypatch.setitem(registry._rules, aten.gelu.default, rule)

    return set_up


def optimize(model: nn.Module, **options: Any) -> gtp_fx.OptimizedModel:
    return gtp_fx.optimize(model, **{"flops_budget": 0.7, "compile": False, "example_inputs": pictures(), **options})


def test_it_names_the_step_the_operator_the_layer_and_the_line(rule_fails: Fault) -> None:
    rule_fails(KeyError("a grid"))
    with pytest.raises(InternalError, match="did not foresee") as raised:
        optimize(TinyViT())
    assert isinstance(raised.value.__cause__, KeyError)
    assert "in pass mark_blocks, at aten.gelu.default of blocks.0.mlp.2 [" in raised.value.where
    message = str(raised.value)
    assert "KeyError: 'a grid'" in message
    assert "test_internal_errors.py" in message, "a rule that isn't gtp_fx's own is named"
    assert f"torch {torch.__version__}" in message
    assert gtp_fx.__version__ in message


def test_a_pass_that_can_be_left_out_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(self: Journal, name: str, gm: fx.GraphModule) -> None:
        assert name != "drop_trivial_masks"

    monkeypatch.setattr(Journal, "page", page)
    with pytest.raises(InternalError, match=r"disabled_passes=\['drop_trivial_masks'\]"):
        optimize(TinyViT())
    optimize(TinyViT(), disabled_passes=["drop_trivial_masks"], flops_budget=1.0)


@pytest.mark.parametrize(
    "way_in",
    [
        lambda model: optimize(model),
        lambda model: inspect_model(model, pictures()),
        lambda model: Planner(model, pictures()).plan(gtp_fx.options.options.Options.of(flops_budget=0.7)),
    ],
    ids=["optimize", "inspect", "plan"],
)
def test_the_model_is_as_it_was(rule_fails: Fault, way_in: Callable[[nn.Module], object]) -> None:
    rule_fails(RecursionError("too deep"))
    model = TinyViT().train()
    model.blocks[1].eval()
    before = _state(model)
    with pytest.raises(InternalError):
        way_in(model)
    assert _state(model) == before


def _state(model: nn.Module) -> list[Any]:
    """Everything that a failed call could leave changed."""
    return [
        [(name, id(value), value._version) for name, value in (*model.named_parameters(), *model.named_buffers())],
        [(module.training, len(module._forward_hooks), list(vars(module))) for module in model.modules()],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), torch.OutOfMemoryError("none left")], ids=repr)
def test_what_isnt_gtp_fxs_fault_passes(rule_fails: Fault, error: BaseException) -> None:
    rule_fails(error)
    with pytest.raises(type(error)):
        optimize(TinyViT())


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_models_own_error_is_its_own(error: BaseException) -> None:
    class Failing(TinyViT):
        def tokens(self, x: Tensor) -> Tensor:
            raise error

    foreseen = isinstance(error, Exception) and not isinstance(error, MemoryError)
    with pytest.raises(gtp_fx.CaptureError if foreseen else type(error)) as raised:
        optimize(Failing())
    if foreseen:
        assert "mine [" in str(raised.value)
        assert "raise error" in str(raised.value), "the line of the model's source"


@torch.no_grad()
def test_the_backend_warns_once_and_compiles_the_graph_as_it_was(
    rule_fails: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[fx.GraphModule] = []
    monkeypatch.setattr(backend, "compile_with_inductor", lambda gm, *_: compiled.append(gm) or gm)
    model, x = TinyViT(), pictures()
    rule_fails(KeyError("a grid"))
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="did not foresee") as warned:
        found = torch.compile(model, backend=backend.gtp, options={"flops_budget": 0.7, "shapes": "static"})(x)
    assert len(warned) == len(compiled) == 1
    torch.testing.assert_close(found, model(x))
    assert not any("gtp_fx" in str(node.target) for gm in compiled for node in gm.graph.nodes)
    torch._dynamo.reset()
    strict = torch.compile(model, backend=backend.gtp, options={"flops_budget": 0.7, "strict": True})
    with pytest.raises(Exception, match="did not foresee"):
        strict(x)


@torch.no_grad()
def test_a_strict_backend_raises_refusals_too() -> None:
    torch._dynamo.reset()
    strict = torch.compile(nn.Conv2d(3, 4, 3), backend=backend.gtp, options={"flops_budget": 0.7, "strict": True})
    with pytest.raises(Exception, match="no self-attention over patch tokens"):
        strict(pictures())
    with pytest.raises(gtp_fx.OptionError, match="strict=1"):
        backend.gtp(fx.symbolic_trace(nn.Identity()), [], options={"flops_budget": 0.7, "strict": 1})


def test_the_command_line_ends_with_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "propagate_shapes", _fails)
    done = CliRunner().invoke(cli.app, ["inspect", "test_vit"])
    assert done.exit_code == 3
    assert "gtp-fx: gtp_fx met something that it did not foresee, in pass normalise" in done.stderr


def _fails(gm: fx.GraphModule, after: str) -> None:
    raise TypeError(f"after {after}")


@pytest.mark.nightly
def test_a_later_graph_is_told_as_well(rule_fails: Fault) -> None:
    """The training graph is made at its first call."""
    fast = optimize(TinyViT(Block))
    rule_fails(KeyError("a grid"))
    with pytest.raises(InternalError):
        fast.train()(pictures())
    fast.eval()(pictures())
