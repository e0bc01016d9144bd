"""Attention maps of an optimised model's blocks, on all of the tokens that the original has.

A block's attention runs over the tokens that remain there. Its map is computed once more, from the queries and keys
that it reads, and spread over all tokens: what was removed before attends to nothing and is attended by nothing. In the
last block, only tokens that the output depends on attend to others.

Shapes: B images, H heads, n tokens that remain, m keys (those and others beside them), N and M all of both, D channels.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from gtp_fx.analysis.marks import MARK
from gtp_fx.errors import InputError
from gtp_fx.graph.edit import returning
from gtp_fx.graph.nodes import layer_name
from gtp_fx.graph.operators import ATTENTION
from gtp_fx.passes.reduce.remove_tokens import SITE
from gtp_fx.passes.reduce.rewrite_attention import ATTENDS
from gtp_fx.strategies.sites import Attention


@dataclass(frozen=True)
class AttentionRecord:
    """One block's attention, as numbers of nodes in its graph. They stay valid when the graph is copied or saved.

    layer: module path of the attention.
    tokens: N.
    prefix: tokens before the patches.
    suffix: tokens after them.
    kept: for each site before, [B, K], the patches that it kept of those that it had.
    of_whole: whether each of these counts in the whole grid.
    spelled: [B, H, n, m], the map of an attention that is spelled out; None where it is an operator, to which alone the
        others belong.
    q, k: [B, H, n, D] and [B, H, m, D].
    bias: [B, H, n, m] or fewer, on the logits, or which of them count; None where there is none.
    scale: factor of the logits; D^-0.5 where None.
    causal: whether tokens attend to those before them alone.
    beside: keys before and after those of the tokens.
    """

    layer: str
    tokens: int
    prefix: int
    suffix: int
    kept: tuple[int, ...]
    of_whole: tuple[bool, ...]
    spelled: int | None = None
    q: int | None = None
    k: int | None = None
    bias: int | None = None
    scale: float | None = None
    causal: bool = False
    beside: tuple[int, int] = (0, 0)

    @property
    def read(self) -> list[int]:
        """The nodes whose values the map is computed from."""
        return [number for number in (self.spelled, self.q, self.k, self.bias, *self.kept) if number is not None]


def record_attention(gm: fx.GraphModule) -> tuple[AttentionRecord, ...]:
    """Return the attention of every block of a graph that the passes have just rewritten, in order."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    sites: dict[Any, list[Any]] = {}
    records = []
    for node in gm.graph.nodes:
        if SITE in node.meta:
            grid, state, _ = node.meta[SITE]
            sites.setdefault(grid, []).append(state.removal)
        mark = node.meta.get(MARK)
        if mark is None or mark.role != "attention":
            continue
        before = sites.get(mark.axis.domain.grid, [])
        record = AttentionRecord(
            layer=layer_name(node),
            tokens=mark.axis.whole_size,
            prefix=mark.axis.prefix,
            suffix=mark.axis.suffix,
            kept=tuple(number[removal.kept] for removal in before),
            of_whole=tuple(removal.of_whole for removal in before),
        )
        stock = Attention.of(node) if node.target in ATTENTION else None
        operands = node.meta.get(ATTENDS, stock)
        if operands is None:
            records.append(replace(record, spelled=number[node.args[0]]))
            continue
        records.append(
            replace(
                record,
                q=number[operands.q],
                k=number[operands.k],
                bias=None if operands.bias is None else number[operands.bias],
                scale=operands.scale,
                causal=stock is not None and len(node.args) > 5 and bool(node.args[5]),
                beside=operands.beside,
            )
        )
    return tuple(records)


def attention_maps_runner(
    gm: fx.GraphModule, records: Sequence[AttentionRecord], layers: Sequence[str | int]
) -> Callable[..., dict[str | int, Tensor]]:
    """Return a function of the model's inputs that gives each layer's map, [B, H, N, M] in float32.

    records: the blocks of `gm`, or of the graph that it is a copy of.
    layers: paths of attention layers, or of modules that hold one, or numbers of attention blocks from 0.

    Raises InputError for a path with no attention over tokens inside, or with several, and for a number of no block.
    """
    chosen = {layer: _find(layer, records) for layer in layers}

    def results(copies: dict[fx.Node, fx.Node]) -> list[fx.Node]:
        nodes = list(gm.graph.nodes)
        return [copies[nodes[number]] for record in chosen.values() for number in record.read]

    runner = returning(gm, results)

    def run(*args: Any, **kwargs: Any) -> dict[str | int, Tensor]:
        values = iter(runner(*args, **kwargs))
        return {
            layer: _whole(record, {number: next(values) for number in record.read}) for layer, record in chosen.items()
        }

    return run


def _find(layer: str | int, records: Sequence[AttentionRecord]) -> AttentionRecord:
    """Return the record of a block by its number, of a layer, or of the one layer inside of a module."""
    if isinstance(layer, int) and 0 <= layer < len(records):
        return records[layer]
    if isinstance(layer, str):
        found = [record for record in records if f"{record.layer}.".startswith(f"{layer}.")]
        if len(found) == 1:
            return found[0]
    known = [record.layer for record in records if record.layer]
    near = difflib.get_close_matches(str(layer), known, n=3) or known[:3]
    paths = f", such as {', '.join(map(repr, near))}," if near else ""
    raise InputError(
        f"{layer!r} is no path of one attention block: give some of those in the report{paths} or numbers of blocks, "
        f"from 0 to {len(records) - 1}"
    )


def _whole(record: AttentionRecord, values: dict[int, Tensor]) -> Tensor:
    """Return a layer's map over all tokens, by the values of the nodes in its record."""
    map_BHnm = values[record.spelled].float() if record.spelled is not None else _map(record, values)
    index_BK = None
    for number, of_whole in zip(record.kept, record.of_whole, strict=True):
        kept_BK = values[number]
        index_BK = kept_BK if index_BK is None or of_whole else index_BK.gather(1, kept_BK)
    rows, columns = map_BHnm.shape[-2:]
    first, last = record.beside
    if index_BK is None and rows == columns - first - last:
        return map_BHnm
    if map_BHnm.ndim != 4 or (index_BK is not None and len(map_BHnm) != len(index_BK)):
        raise InputError(f"{record.layer}: its map, {list(map_BHnm.shape)}, isn't one for each image and head")
    # Where each token that remains stands among all of them; in the last block, the leading ones alone may attend.
    batch, device = len(map_BHnm), map_BHnm.device
    if index_BK is None:
        index_BK = torch.arange(record.tokens - record.prefix - record.suffix, device=device).expand(batch, -1)
    before = torch.arange(record.prefix, device=device).expand(batch, -1)
    after = torch.arange(record.tokens - record.suffix, record.tokens, device=device).expand(batch, -1)
    place_Bn = torch.cat([before, index_BK + record.prefix, after], dim=1)
    keys = record.tokens + first + last
    front = torch.arange(first, device=device).expand(batch, -1)
    back = torch.arange(keys - last, keys, device=device).expand(batch, -1)
    place_Bm = torch.cat([front, place_Bn + first, back], dim=1)
    return _spread(_spread(map_BHnm, place_Bn[:, :rows], record.tokens, 2), place_Bm, keys, 3)


def _map(record: AttentionRecord, values: dict[int, Tensor]) -> Tensor:
    """Return softmax(scale · q·kᵀ + bias), [B, H, n, m]."""
    assert record.q is not None and record.k is not None
    q_BHnD, k_BHmD = values[record.q].float(), values[record.k].float()
    if k_BHmD.shape[-3] != q_BHnD.shape[-3]:  # several heads of queries share one of keys
        k_BHmD = k_BHmD.repeat_interleave(q_BHnD.shape[-3] // k_BHmD.shape[-3], dim=-3)
    scale = q_BHnD.shape[-1] ** -0.5 if record.scale is None else record.scale
    logits_BHnm = scale * q_BHnD @ k_BHmD.transpose(-2, -1)
    if record.bias is not None:
        bias = values[record.bias]
        masks = bias.dtype is torch.bool
        logits_BHnm = logits_BHnm.masked_fill(~bias, -torch.inf) if masks else logits_BHnm + bias.float()
    if record.causal:
        logits_BHnm = logits_BHnm.masked_fill(torch.ones_like(logits_BHnm, dtype=torch.bool).triu(1), -torch.inf)
    return F.softmax(logits_BHnm, dim=-1)


def _spread(map_BHnm: Tensor, place: Tensor, size: int, dim: int) -> Tensor:
    """Return a map with one dimension spread to `size`; zeros where nothing stands. place: [B, n] or [B, m]."""
    shape = list(map_BHnm.shape)
    at = place[:, None, :, None] if dim == 2 else place[:, None, None, :]
    whole = map_BHnm.new_zeros([*shape[:dim], size, *shape[dim + 1 :]])
    return whole.scatter(dim, at.expand(shape), map_BHnm)
