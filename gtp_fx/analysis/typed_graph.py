"""A graph with its analyses, each made at most once: types, attention blocks, liveness.

Passes make new graphs, so analyses are kept with the graph they describe. An edit makes them stale. Each use compares
the graph with what the analyses were made from, so a stale one is never returned.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock, read_blocks
from gtp_fx.analysis.liveness import Liveness, live_tokens, whole_attention
from gtp_fx.analysis.marks import marks_of
from gtp_fx.analysis.resting import Rest, find_rest
from gtp_fx.analysis.unsupported_attention import unsupported_attention
from gtp_fx.analysis.window_forms import NoRest
from gtp_fx.errors import Refusal
from gtp_fx.types.frames import FRAMES
from gtp_fx.types.infer import AS_LEFT, TOKENS, Edge, SiteTyping, WholeTyping, infer_types, infer_with_sites
from gtp_fx.types.rules.registry import WEIGHS

_KEPT = "_gtp_fx_typed"
"""Attribute of a graph: its `TypedGraph`. A deep copy of the graph has none."""
_READ = ("val", "nn_module_stack", TOKENS, FRAMES, WEIGHS, AS_LEFT)
"""Metadata that types are made from."""
_NONE: frozenset[Any] = frozenset()
T = TypeVar("T")


def typed_graph(graph: fx.Graph) -> TypedGraph:
    """Return the analyses of `graph` as it stands now: those made before, or new ones if it was edited since."""
    known: TypedGraph | None = getattr(graph, _KEPT, None)
    if known is None or known.graph is not graph or not known.is_current():
        known = TypedGraph(graph)
        setattr(graph, _KEPT, known)
    return known


class TypedGraph:
    """Analyses of a graph, each made when it is first read. Reading one after an edit raises AssertionError.

    A pass may go on using an analysis that it read before its own edits: it then describes the graph before them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._made_from = _state(graph)
        self._found: dict[Hashable, Any] = {}
        self._making = 0

    def is_current(self) -> bool:
        """Return whether the graph is unchanged since it was typed.

        Compared are its nodes, their targets and arguments, and their metadata "val", "nn_module_stack", `TOKENS`,
        `FRAMES`, `WEIGHS` and `AS_LEFT`.
        """
        now = _state(self.graph)
        return len(now) == len(self._made_from) and all(map(operator.is_, now, self._made_from))

    @property
    def whole(self) -> WholeTyping:
        """Types with every token in place."""
        return self._once("whole", lambda: infer_types(self.graph))

    def with_sites(
        self, sites: frozenset[fx.Node], ends: frozenset[fx.Node] = _NONE, whole_edges: frozenset[Edge] = _NONE
    ) -> SiteTyping:
        """Return types of the graph with tokens removed after each of `sites`.

        ends, whole_edges: as in `infer_with_sites`.
        """
        if not sites:
            return SiteTyping(self.graph, self.whole.types, self.whole.results, {})
        key = ("sites", sites, ends, whole_edges)
        return self._once(key, lambda: infer_with_sites(self.graph, sites, ends, whole_edges))

    @property
    def blocks(self) -> tuple[AttentionBlock, ...]:
        """The marked attention blocks, in graph order."""
        return self._once(("blocks", marks_of(self.graph)), lambda: read_blocks(self.whole, self.with_sites))

    @property
    def rests(self) -> Mapping[int, Rest | NoRest]:
        """What fewer windows do in each block with a branch, by its number, or why its windows can't rest."""
        return self._once(("rests", marks_of(self.graph)), lambda: _rests(self.blocks, self.whole))

    @property
    def unsupported_attention(self) -> tuple[Refusal, ...]:
        """Attention that is no block, as refusals with the reason."""
        return self._once(("other", marks_of(self.graph)), lambda: unsupported_attention(self.whole))

    def live(self, needs_full_maps: bool = False) -> Liveness:
        """Return which tokens of each value something depends on.

        needs_full_maps: treat the attention of marked blocks as if all its tokens were read.
        """
        whole = whole_attention(self.graph) if needs_full_maps else _NONE
        return self._once(("live", whole), lambda: live_tokens(self.whole, whole))

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the analysis kept under `key`, made now if there is none. Raises AssertionError after an edit."""
        if not self._making and not self.is_current():  # an analysis that reads others edits nothing
            raise AssertionError("this graph was edited after it was typed: call `typed_graph` again for its analyses")
        if key not in self._found:
            self._making += 1
            try:
                self._found[key] = make()
            finally:
                self._making -= 1
        found: T = self._found[key]
        return found


def _rests(blocks: Sequence[AttentionBlock], typing: WholeTyping) -> dict[int, Rest | NoRest]:
    """Return what `TypedGraph.rests` does."""
    found: dict[int, Rest | NoRest] = {}
    for block in blocks:
        if block.branch is not None:
            try:
                found[block.index] = find_rest(block, typing)
            except NoRest as reason:
                found[block.index] = reason
    return found


def _state(graph: fx.Graph) -> list[Any]:
    """Return what types are made from, for comparison by identity.

    fx replaces a node's arguments and never mutates them, so the same objects mean an unchanged graph.

    Marks of blocks aren't part of it, as no type depends on them. Analyses that read marks have them in their key.
    """
    return [
        part for node in graph.nodes for part in (node, node.target, node.args, node.kwargs, *map(node.meta.get, _READ))
    ]
