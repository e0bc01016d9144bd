"""Inductor's code for a graph, generated for an absent H100 and never compiled, with the launches that it makes.

    launches = generate(gm, inputs, keep=Path("code.py")).launches

A launch has its kernel, the bytes it reads and writes, its work, and the operator of the graph that it comes from.
Launches are taken from the scheduler's nodes and checked against the calls in the generated Python, one by one.
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
"""Calls in the generated code that launch no kernel: checks, allocations, views. (Inputs are aligned, so
copy_if_misaligned copies nothing.)"""
_LAUNCHES = (".run", "extern_kernels.", "torch.ops.", "aten.")


@dataclass(frozen=True)
class Generated:
    """Generated code of a graph.

    launches: in order.
    code: Python module, as Inductor would run it.
    """

    launches: tuple[Launch, ...]
    code: str


class _Stop(Exception):
    """Raised to stop Inductor after code generation, before it compiles."""


@torch.no_grad()
def generate(gm: fx.GraphModule, inputs: Sequence[Tensor], keep: Path | None = None) -> Generated:
    """Generate Inductor's code for `gm`, which isn't changed.

    inputs: fake tensors on "cuda".
    keep: file to write the code to.

    Raises NotImplementedError where the code calls an unknown function, which it names.
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
    # Caches would return compiled graphs instead of generating code. Inductor decides by timing whether to pad a
    # product's odd sizes; here they aren't padded.
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
    """Return whether an error is, or wraps, `_Stop`. Inductor wraps errors raised during its passes."""
    while error is not None:
        if isinstance(error, _Stop) or "_Stop" in str(error):
            return True
        error = error.__cause__
    return False


def calls_in(code: str) -> list[str]:
    """Return the names of the functions that the generated code launches, in order.

    Examples: "triton_poi_fused_gelu_0", "extern_kernels.addmm", "torch.ops.aten.topk.default".

    Raises NotImplementedError for a call that may or may not be a launch.
    """
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
    """Return a copy of `gm` whose parameters are inputs after its own, as Dynamo passes graphs to Inductor.

    Also return the parameters' values, in the order of these inputs.
    """
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
    """Return a copy in which attention is the kernel that torch selects on an H100.

    Since torch 2.10, that is cuDNN's, with and without a mask (`sdp_utils.cpp`, priorities on sm_90 from cuDNN 9.15
    on). torch's own selection queries the driver, so it is made here.

    Raises NotImplementedError for an attention whose kernel isn't known.
    """
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
