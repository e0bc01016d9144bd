"""Exact: compute nothing for tokens that no output depends on.

Where only the leading tokens of a value are needed (`gtp_fx.analysis.liveness`), it is computed from slices of its
operands. Slices are taken as early as possible: after the last block's norm for the query, and after its input for the
residual. This saves 6.9 % of DeiT's FLOPs and changes no digit of its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.analysis.liveness import ALL, Liveness, follows
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.graph import edit
from gtp_fx.types.axes import TokenDomain, token_axis, whole_count
from gtp_fx.types.infer import WholeTyping
from gtp_fx.types.rules.registry import RuleResult


def drop_dead_tokens(gm: fx.GraphModule, needs_full_maps: bool = False) -> fx.GraphModule:
    """Return a copy of `gm` that computes only live tokens; `gm` itself where all are live.

    needs_full_maps: keep every query of the marked blocks' attention, for a strategy that reads whole attention maps.
    """
    typed = typed_graph(gm.graph)
    typing, live = typed.whole, typed.live(needs_full_maps)
    # Rewrite slice bounds counted from the end, whose meaning changes when a value gets fewer tokens.
    bounds = {
        node: answer.repair(whole_count)
        for node, answer in typing.results.items()
        if answer.prefix_needed and answer.repair is not None
    }
    narrow = [
        node for node, answer in typing.results.items() if live.computed.get(node, ALL) != ALL and answer.operands
    ]
    if not narrow and all(args == node.args for node, args in bounds.items()):
        return gm
    gm, copies = edit.copy_with_nodes(gm)
    for node, args in bounds.items():
        edit.set_args(copies[node], _copied(args, copies))
    # Each value is sliced once for each count of tokens that is read.
    slices: dict[tuple[fx.Node, int], fx.Node] = {}
    for node in narrow:
        _narrow(node, copies, typing, live, slices)
    for part in slices.values():
        _merge_rows(gm.graph, part)
    return edit.finish(gm)


def _narrow(
    node: fx.Node,
    copies: Mapping[fx.Node, fx.Node],
    typing: WholeTyping,
    live: Liveness,
    slices: dict[tuple[fx.Node, int], fx.Node],
) -> None:
    """Let the copy of `node` read slices of its operands' copies.

    copies: each node's copy.
    slices: by operand and count of tokens, the slices made so far; new ones are added.
    """
    answer, wanted, copy = typing.results[node], live.computed[node], copies[node]
    if answer.repair is not None:
        edit.set_args(copy, _copied(answer.repair(_total(wanted, answer)), copies))
    for operand, kind in answer.operands.items():
        dims = [d for d, dim in enumerate(kind) if token_axis(dim)]
        if not follows(operand, answer) or not dims or live.computed.get(operand, ALL) == wanted:
            continue
        if (operand, wanted) not in slices:
            emit = edit.Emitter(copy.graph, like=copy, before=copies[operand].next)
            slices[operand, wanted] = emit(aten.slice.Tensor, copies[operand], dims[0], 0, wanted)
        copy.replace_input_with(copies[operand], slices[operand, wanted])


def _copied(args: tuple[Any, ...], copies: Mapping[fx.Node, fx.Node]) -> tuple[Any, ...]:
    """Return arguments with each node replaced by its copy."""
    found: tuple[Any, ...] = fx.map_arg(args, copies.__getitem__)  # type: ignore[assignment]
    return found


def _merge_rows(graph: fx.Graph, part: fx.Node) -> None:
    """Let linear layers that read a slice of tokens [B, few, C] read it as one matrix [B * few, C].

    The slice's rows are a whole image apart, so it can't be viewed as that matrix, and torch would multiply each image
    by a copy of the weight. A single token is selected instead, which copies nothing; several are copied together.
    """
    source, dim, _, wanted = part.args
    if dim == 0:  # its rows are contiguous
        return
    for linear in [user for user in part.users if user.target is aten.linear.default]:
        with graph.inserting_before(linear):
            if wanted == 1:
                rows = edit.call(graph, aten.select.int, source, dim, 0, like=linear)
            else:
                rows = edit.call(graph, aten.clone.default, part, like=linear)
        edit.set_args(linear, (rows, *linear.args[1:]))
        if wanted == 1:
            with graph.inserting_after(linear):
                back = edit.call(graph, aten.unsqueeze.default, linear, dim, like=linear)
            linear.replace_all_uses_with(back, delete_user_cb=back.__ne__)


def _total(wanted: int, answer: RuleResult):  # type: ignore[no-untyped-def]
    """Return the `CountOf` that makes every token axis `wanted` long, prefix included."""
    axes = [axis for kind in answer.operands.values() for dim in kind if (axis := token_axis(dim))]
    beside = {axis.domain: axis.prefix + axis.suffix for axis in axes}

    def count(domain: TokenDomain) -> int:
        return wanted - beside[domain]

    return count
