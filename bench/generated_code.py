"""Inductor's code for a graph, generated for an H100 that isn't there and never compiled: what it calls, in order.

    launches = generate(gm, inputs, keep=Path("code.py")).launches

Of each launch: its kernel, what it reads and writes, what it computes, and from which operator of the graph it comes.
Launches are read off the scheduler's nodes and held against the calls in the generated Python, one by one.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch.ops import aten  # type: ignore[import-not-found]

from bench.absent_gpu import absent_h100
from bench.launches import Launch, launches_of
from gtp_fx.graph import edit

_NO_LAUNCH = (
    "assert_",
    "empty_strided",
    "reinterpret_tensor",
    "get_raw_stream",
    "copy_if_misaligned",
    "torch.cuda.",
    "args.clear",
    "as_strided",
)
"""What the generated code calls besides kernels: checks, allocations, views. (Inputs are aligned, so none is
copied.)"""
_LAUNCHES = (".run", "extern_kernels.", "torch.ops.", "aten.")


@dataclass(frozen=True)
class Generated:
    """launches: in order. code: as Inductor would run it."""

    launches: tuple[Launch, ...]
    code: str


class _Stop(Exception):
    """Generating is over; what follows would compile."""


@torch.no_grad()
def generate(gm: fx.GraphModule, inputs: Sequence[Tensor], keep: Path | None = None) -> Generated:
    """What Inductor generates for `gm` called with `inputs`, fake tensors on "cuda". gm isn't changed. keep: a file for
    the code.

    Raises NotImplementedError, naming it, where the code calls something that is neither known nor a kernel.
    """
    from torch._functorch import config as autograd_config
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering

    found: list[Generated] = []

    def stop(lowering: Any) -> Any:
        code, _ = lowering.codegen()
        names = calls_in(code.value)
        found.append(Generated(launches_of(lowering, names), code.value))
        raise _Stop

    lifted, values = _lifted(with_stock_attention(gm))
    # Caches would hand out graphs instead of generating them. Whether a product's odd sides are padded, Inductor times:
    # here they aren't.
    settings = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1, "shape_padding": False}
    with (
        absent_h100(),
        config.patch(settings),
        autograd_config.patch(enable_autograd_cache=False),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
    ):
        try:
            compile_fx(lifted, [*inputs, *values])
        except Exception as error:
            if not _caused_by_stop(error):
                raise
    (generated,) = found
    if keep is not None:
        keep.parent.mkdir(parents=True, exist_ok=True)
        keep.write_text(generated.code)
    return generated


def _caused_by_stop(error: BaseException | None) -> bool:
    """Inductor wraps what its passes raise."""
    while error is not None:
        if isinstance(error, _Stop) or "_Stop" in str(error):
            return True
        error = error.__cause__
    return False


def calls_in(code: str) -> list[str]:
    """Names of what the generated code launches, in order: "triton_poi_fused_gelu_0", "extern_kernels.addmm",
    "torch.ops.aten.topk.default"."""
    (call,) = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef) and node.name == "call"]
    found = [node for node in ast.walk(call) if isinstance(node, ast.Call)]
    names = []
    for node in sorted(found, key=lambda node: (node.lineno, node.col_offset)):
        name = ast.unparse(node.func)
        if name.startswith(_NO_LAUNCH):
            continue
        if not (name.endswith(".run") or name.startswith(_LAUNCHES)):
            raise NotImplementedError(f"line {node.lineno} of the generated code calls {name}: is that a launch?")
        names.append(name.removesuffix(".run"))
    return names


def _lifted(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """`gm` with its parameters as inputs behind its own, as Dynamo hands a graph to Inductor, and their values."""
    gm = edit.copy_of(gm)
    last = [node for node in gm.graph.nodes if node.op == "placeholder"][-1]
    taken: dict[str, fx.Node] = {}
    values = []
    for node in [node for node in gm.graph.nodes if node.op == "get_attr"]:
        if node.target not in taken:
            with gm.graph.inserting_after(last):
                last = taken[node.target] = gm.graph.placeholder(f"held_{node.target.replace('.', '_')}")
            values.append(operator.attrgetter(node.target)(gm))
        node.replace_all_uses_with(taken[node.target])
        gm.graph.erase_node(node)
    gm.graph.set_codegen(fx.graph.CodeGen())
    gm.recompile()
    return gm, values


_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_MOST_FEATURES = 128


def with_stock_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which attention is the kernel that torch takes on an H100: since 2.10 cuDNN's comes first there, with a
    mask as without (`sdp_utils.cpp`, priorities on sm_90 from cuDNN 9.15 on). The choice asks the driver, so it is made
    here."""
    gm = edit.copy_of(gm)
    for node in list(gm.graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        given = dict(zip(_SDPA, node.args, strict=False)) | dict(node.kwargs)
        q, k, v = (given[name] for name in _SDPA[:3])
        sizes = [x.meta["val"] for x in (q, k, v)]
        plain = not any(given.get(name) for name in ("dropout_p", "is_causal", "enable_gqa"))
        if not plain or any(x.ndim != 4 or x.shape[-1] % 8 or x.shape[-1] > _MOST_FEATURES for x in sizes):
            raise NotImplementedError(f"{node.format_node()}: which kernel torch takes for it isn't known here")
        with gm.graph.inserting_before(node):
            arguments = (q, k, v, given.get("attn_mask"), False, 0.0, False, False)
            made = edit.call(gm.graph, aten._scaled_dot_product_cudnn_attention.default, *arguments, like=node)
            made.kwargs = {"scale": given.get("scale")}
            out = edit.call(gm.graph, operator.getitem, made, 0, like=node)
        node.replace_all_uses_with(out)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm
