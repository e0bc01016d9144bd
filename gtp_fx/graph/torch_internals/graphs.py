"""Graphs and what their nodes call: operators, regions, signatures."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager
from typing import Any, TypeGuard, cast

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree


def take_signature(graph: fx.Graph, of: fx.Graph) -> None:
    """Give `graph` the structure of another graph's inputs and outputs, which torch.export keeps in its code generator.

    Public: nothing; `fx.GraphModule.__copy__` copies the whole module.
    """
    graph._codegen = of._codegen


def return_flat(graph: fx.Graph, returned: list[fx.Node]) -> None:
    """Let a graph that has a structure of outputs return a flat list instead."""
    codegen: Any = graph._codegen
    if hasattr(codegen, "pytree_info"):
        out_spec = pytree.tree_structure(returned)
        graph.set_codegen(type(codegen)(codegen.pytree_info._replace(out_spec=out_spec)))


def copy_parameter_sources(gm: fx.GraphModule, of: fx.GraphModule) -> None:
    """Keep Dynamo's notes of where parameters come from, which Inductor's `freezing` needs."""
    if hasattr(of, "_param_name_to_source"):
        gm._param_name_to_source = of._param_name_to_source  # type: ignore[assignment]


def is_operator(target: object) -> TypeGuard[torch._ops.OpOverload]:
    """Return whether a node's target is one overload of an operator, such as aten.mm.default."""
    return isinstance(target, torch._ops.OpOverload)


def decomposes(target: Any) -> bool:
    """Return whether an operator is written in others, so that `decompose` runs these. Public: `decompose` itself."""
    return bool(target._can_decompose())


def is_higher_order(target: Any) -> bool:
    """Return whether an operator takes functions, as `torch.cond` and flex_attention do. Public: none."""
    return isinstance(target, HigherOrderOperator)


def indexing_by_tensors() -> AbstractContextManager[Any]:
    """Return a context in which `table[i]` takes a tensor of one number as an index, as in flex_attention's functions.

    Public: none.
    """
    module = importlib.import_module("torch._dynamo._trace_wrapped_higher_order_op")
    return cast("AbstractContextManager[Any]", module.TransformGetItemToIndex())


def is_functorch(target: Any) -> bool:
    """Return whether a call is one by which torch.func (`vmap`, `grad`) goes in and out of its levels. Public: none."""
    return str(getattr(target, "__module__", "")).startswith(("torch._functorch", "torch._C._functorch"))


def given_to_compile(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile was given, where `module` is what it returned. Public: none."""
    frames = sys.modules.get("torch._dynamo.eval_frame")
    return cast("nn.Module", module._orig_mod) if frames and isinstance(module, frames.OptimizedModule) else None


SET_GRAD = torch._C._set_grad_enabled
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
"""What Dynamo and pre-dispatch tracing write into a graph where a context begins or ends. Public: none."""
ENTER_INFERENCE = torch.autograd.grad_mode._enter_inference_mode
EXIT_INFERENCE = torch.autograd.grad_mode._exit_inference_mode
"""The same for `torch.inference_mode`, in Dynamo's graphs; its context is the call that begins it."""
FUSED_LAYER = torch._transformer_encoder_layer_fwd
FUSED_ATTENTION = torch._native_multi_head_attention
"""What nn.TransformerEncoderLayer and nn.MultiheadAttention call where no gradients are needed. Public: none."""


def region_operator(target: Any) -> str:
    """Return the name of a higher-order operator, which calls graphs, or "" for any other target. Public: none."""
    return str(target.name()) if is_higher_order(target) else ""


def computes(target: Any) -> bool:
    """Return whether a target is one of torch's operators that returns new tensors: no view, nothing in place."""
    return is_operator(target) and not target.is_view and not target._schema.is_mutable
