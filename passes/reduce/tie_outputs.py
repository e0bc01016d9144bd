"""Gradients of outputs that later layers read: hidden states, taps.

A stream that the model returns and goes on with is one value there. Where tokens were removed, the output is the
stream with its tokens put back, and later layers read the shorter one, so that a gradient with respect to the output
would find no way to it (Grad-CAM's). Here those layers read the output's remaining tokens, as far as gradients go: the
shorter stream's numbers, exactly, and the output's place in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.ops import aten, gtp_fx  # type: ignore[import-not-found]

from gtp_fx.graph import edit
from gtp_fx.graph.nodes import ancestors, descendants


@dataclass(frozen=True)
class _Recovery:
    """An output that is a stream with its tokens put back.

    output: the value that is returned.
    stream: the shorter stream.
    steps: the calls of `recover` between them, the last one first.
    """

    output: fx.Node
    stream: fx.Node
    steps: tuple[fx.Node, ...]


def tie_outputs(graph: fx.Graph) -> None:
    """Let what reads a stream read it by the output in which its tokens were put back; in place."""
    for output in graph.output_node().all_input_nodes:
        recovery = _read(output)
        if recovery is not None:
            _tie(graph, recovery)


def _read(output: fx.Node) -> _Recovery | None:
    """Read how an output was put back, from the operators that `remove_tokens` inserts; None where it wasn't."""
    value, steps = output, []
    while True:
        change = value.args[0] if value.target is aten.add.Tensor else value
        if not isinstance(change, fx.Node) or change.target is not gtp_fx.recover.default:
            break
        shorter = change.args[0]
        if value is not change and isinstance(shorter, fx.Node) and shorter.target is aten.sub.Tensor:
            shorter = shorter.args[0]  # the change since the site was put back, and added to the stream before it
        assert isinstance(shorter, fx.Node)
        value = shorter
        steps.append(change)
    return _Recovery(output, value, tuple(steps)) if steps else None


def _tie(graph: fx.Graph, recovery: _Recovery) -> None:
    """Insert the output's remaining tokens after the stream, and let the stream's other readers read those."""
    stream, output = recovery.stream, recovery.output
    between = {output, *(ancestors(output) & descendants(stream))}
    others = [user for user in stream.users if user not in between]
    if not others:
        return
    _hoist(output, stream)
    emit = edit.Emitter(graph, like=stream, before=output.next)
    kept = output
    for step in recovery.steps:
        _, _, index, _, *around = step.args
        kept = emit(gtp_fx.take_tokens.default, kept, index, *around)
    nothing = emit(aten.sub.Tensor, kept, emit(aten.detach.default, kept))
    tied = emit(aten.add.Tensor, emit(aten.detach.default, stream), nothing)
    for user in others:
        user.replace_input_with(stream, tied)


def _hoist(output: fx.Node, stream: fx.Node) -> None:
    """Move an output, and what it is computed from, right after the stream, which the rest of it precedes."""
    order = {node: number for number, node in enumerate(output.graph.nodes)}
    late = [node for node in (*ancestors(output), output) if order[node] > order[stream]]
    place = stream
    for node in sorted(late, key=order.__getitem__):
        place.append(node)
        place = node
