"""Operators outside the vocabulary are opened by torch's own decompositions, at any batch and with the same numbers."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from itertools import tee
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.ops import aten  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree

from gtp_fx.capture.vocabulary import decompositions, open_composites
from gtp_fx.graph.torch_internals import is_operator
from gtp_fx.types.rules.registry import find

WEIGHT = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
SPELLINGS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], set[str]]] = {
    "an alias": (lambda x, y: torch.concat([x, y], 1), {"aten.cat.default"}),
    "a view": (lambda x, y: x.mT.adjoint().movedim(1, 2), {"aten.transpose.int", "aten.permute.default"}),
    "several results": (lambda x, y: torch.tensor_split(x, 2, 1)[1], {"aten.slice.Tensor"}),
    "one result of two": (lambda x, y: x.max(1).values, {"aten.amax.default"}),
    "the size of another": (lambda x, y: x[:, :1].expand_as(y), {"aten.slice.Tensor", "aten.expand.default"}),
    "a sum of products": (
        lambda x, y: torch.baddbmm(x, y, y.mT @ x, beta=0.5, alpha=2.0),
        {"aten.transpose.int", "aten.matmul.default", "aten.bmm.default", "aten.mul.Tensor", "aten.add.Tensor"},
    ),
    "a gated recurrent unit": (
        lambda x, y: torch.gru_cell(x.flatten(0, 1), y.flatten(0, 1), WEIGHT, WEIGHT.flip(0)),
        {"aten.flatten.using_ints", "aten.flip.default", "aten.t.default", "aten.mm.default", "aten.split.Tensor"}
        | {f"aten.{name}.Tensor" for name in ("add", "mul", "sub")}
        | {"aten.sigmoid.default", "aten.tanh.default"},
    ),
    "a decomposition of a decomposition": (
        lambda x, y: F.glu(torch.var_mean(x, -1, keepdim=True)[0] + y),
        {"aten.var.correction", "aten.add.Tensor", "aten.slice.Tensor", "aten.sigmoid.default", "aten.mul.Tensor"},
    ),
}


def captured(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The exported graph of a function, with a batch that may be any."""

    class Spelled(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Any:
            return function(x, y)

    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Spelled(), inputs, dynamic_shapes={"x": batch, "y": batch})
    return program.module(check_guards=False)


def operators(gm: fx.GraphModule) -> set[str]:
    """Names of the operators on tensors."""
    targets = {node.target for node in gm.graph.nodes if is_operator(node.target)}
    return {str(target) for target in targets} - {"aten.sym_size.int"}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_vocabulary_is_left_and_any_batch_works(name: str) -> None:
    function, wanted = SPELLINGS[name]
    gm = captured(function, torch.randn(2, 6, 8), torch.randn(2, 6, 8))
    open_composites(gm)
    assert operators(gm) == wanted
    x, y = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(gm(x, y), function(x, y))
    x, y = torch.randn(2, 5, 6, 8)
    torch.testing.assert_close(gm(x, y), function(x, y))


def test_what_asks_for_the_batch_or_ends_elsewhere_stays_whole() -> None:
    """Bilinear's code branches on sizes, which would settle the batch; a distance ends in an operator of its own."""
    weight = torch.randn(5, 8, 8)
    gm = captured(
        lambda x, y: (F.bilinear(x, y, weight), torch.cdist(x, y)), torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    )
    open_composites(gm)
    assert {"aten.bilinear.default", "aten.cdist.default"} <= operators(gm)
    x, y = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(gm(x, y), (F.bilinear(x, y, weight), torch.cdist(x, y)))


def test_random_numbers_stay_those_that_eager_draws() -> None:
    assert decompositions(aten.rrelu.default) == () and decompositions(aten.concat.default) != ()


# ---- every operator that torch has a sample input for

NO_WORDS_FOR = {"as_strided", "diagonal", "unfold", "linalg_diagonal", "tensor_split"}
"""Views that no rule follows: they take what isn't a dimension, or depend on what a tensor holds."""


def sample_of(info: Any) -> Any:
    """Return an operator's first sample of more than one number, or its first, or None. Some can make thousands."""
    try:
        # `info.sample_inputs` looks through the whole call stack for each sample, and draws a seed.
        first, found = tee(info.sample_inputs_func(info, "cpu", torch.float32, False))
        several = (s for s in found if isinstance(s.input, Tensor) and s.input.numel() > 1)
        return next(several, None) or next(first)
    except Exception:  # it has none in float32
        return None


@pytest.fixture
def gradients_stay_on() -> Iterator[None]:
    """Turn gradients on after what makes samples with them off, and was left half-way, has ended."""
    yield
    gc.collect()
    torch.set_grad_enabled(True)


def samples() -> Iterator[tuple[str, Callable[..., Any], list[Tensor]]]:
    """Each operator in torch's own list of them: its name, and a call as a function of tensors alone."""
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        sample = sample_of(info)
        if sample is None:
            continue
        leaves, spec = pytree.tree_flatten((sample.input, sample.args, sample.kwargs))

        def call(*tensors: Tensor, leaves: Any = leaves, spec: Any = spec, info: Any = info) -> Any:
            given = iter(tensors)
            x, args, kwargs = pytree.tree_unflatten([next(given) if isinstance(v, Tensor) else v for v in leaves], spec)
            return info.op(x, *args, **kwargs)

        yield f"{info.name} {info.variant_test_name}", call, [v.detach() for v in leaves if isinstance(v, Tensor)]


def is_word_or_closed(operator: Any) -> bool:
    """Whether an operator has a rule; or is no view and nothing element-wise, so that torch alone knows its meaning."""
    if operator._schema.is_mutable or torch.Tag.nondeterministic_seeded in operator.tags:
        return True
    views = any(result.alias_info is not None for result in operator._schema.returns)
    pointwise = torch.Tag.pointwise in operator.tags
    return find(operator) is not None or not (views or pointwise) or operator._schema.name[6:] in NO_WORDS_FOR


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("gradients_stay_on")
def test_every_operator_is_canonical_or_opened_or_has_a_meaning_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    opened, beyond = 0, []
    quiet = logging.getLogger("torch.__trace")
    monkeypatch.setattr(quiet, "disabled", True)  # pytest would keep every line of it
    for name, call, tensors in samples():
        try:
            with torch.no_grad():
                gm = make_fx(call, pre_dispatch=True, tracing_mode="fake")(*tensors)
            expected = call(*tensors)
        except Exception:  # it can't be traced, or not in float32
            continue
        before = operators(gm)
        open_composites(gm)
        opened += (changed := operators(gm) != before)
        targets = {node.target for node in gm.graph.nodes if is_operator(node.target)}
        if changed and "empty" not in name:
            torch.testing.assert_close(gm(*tensors), expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
        beyond += [f"{name}: {target}" for target in targets if not is_word_or_closed(target)]
    assert not beyond, "\n".join(beyond)
    assert opened > 150
