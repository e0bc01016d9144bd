"""Two doors into one graph: functional pre-dispatch ATen, with linear, layer_norm and attention whole.

The module door exports an `nn.Module`; the Dynamo door takes what `torch.compile` hands a backend. Both keep a symbolic
batch, and the operators that come out are the same. See ARCHITECTURE.md for why this level.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from gtp_fx.errors import CaptureError
from gtp_fx.inputs import CallSignature, describe
from gtp_fx.sizes import fix_symbols


def capture_module(model: nn.Module, signature: CallSignature, training: bool = False) -> fx.GraphModule:
    """The graph of `model` called as `signature` says, in training or evaluation mode. `model` comes back unchanged."""
    batch = torch.export.Dim.DYNAMIC
    dynamic = pytree.tree_map(
        lambda leaf: {0: batch} if isinstance(leaf, Tensor) else None, (signature.args, signature.kwargs)
    )
    by_name = _by_name(signature, dynamic)
    with _mode(model, training):
        try:
            program = torch.export.export(model, signature.args, signature.kwargs, dynamic_shapes=by_name)
            if any(_mutates(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # an empty table: functionalise, decompose nothing
        except Exception as error:
            raise CaptureError(
                f"torch.export can't capture {type(model).__name__} with {describe(signature.args, signature.kwargs)}: "
                f"{_first_lines(error)}\nGive example_inputs that the model takes; torch.export.export(model, example_inputs) "
                f"shows the whole error"
            ) from error
    changed = [
        *program.graph_signature.buffers_to_mutate.values(),
        *program.graph_signature.user_inputs_to_mutate.values(),
    ]
    if changed:
        raise CaptureError(
            f"{type(model).__name__} changes {', '.join(changed)} when it runs, which a rewritten graph can't keep track of; "
            f"in evaluation mode (model.eval()) most models change nothing"
        )
    exported = program.module(check_guards=False)
    assert isinstance(exported, fx.GraphModule)
    captured = fx.GraphModule(exported, exported.graph)
    fix_symbols(captured)
    return captured


def capture_dynamo(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph of what Dynamo hands a backend: placeholders (and what is known of them) stay as they are, in order."""
    from torch._functorch.aot_autograd import aot_export_module
    from torch._guards import TracingContext, tracing

    old = [node for node in gm.graph.nodes if node.op == "placeholder"]
    fakes = [node.meta["example_value"] for node in old]
    mode = torch._guards.detect_fake_mode(fakes)
    with tracing(TracingContext(mode)), torch.no_grad():
        exported, signature = aot_export_module(gm, fakes, trace_joint=False, pre_dispatch=True, decompositions={})
    changed = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    if changed:
        raise CaptureError(
            f"the model changes {', '.join(changed)} when it runs; in evaluation mode most models change nothing"
        )
    graph_module: Any = exported
    new = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for before, after in zip(old, new, strict=True):
        # Inductor reads from it which inputs are parameters: without it every weight is copied at a CUDA graph's replay.
        after.meta = {**before.meta, **after.meta}
    graph_module.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        graph_module._param_name_to_source = gm._param_name_to_source
    fix_symbols(graph_module)
    return cast("fx.GraphModule", graph_module)


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Every module in one mode for a while, then each in its own again."""
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _mutates(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _by_name(signature: CallSignature, dynamic: tuple[Sequence[Any], dict[str, Any]]) -> dict[str, Any]:
    """Dynamic shapes as torch.export wants them: by the parameter's name in `forward`."""
    bound = signature.parameters.bind(*dynamic[0], **dynamic[1])
    return dict(bound.arguments)


def _first_lines(error: Exception, count: int = 3) -> str:
    return "\n".join(str(error).strip().splitlines()[:count]) or type(error).__name__
