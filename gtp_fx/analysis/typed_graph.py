"""A graph with what analyses say of it, each made once: types, attention blocks, liveness.

Passes make new graphs, so analyses are kept with the graph that they speak of. One that was edited has none: what they were
made from is compared at every look, so that none can be had of a graph that isn't as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import fx

from gtp_fx.analysis.blocks import AttentionBlock, marks_of, read_blocks
from gtp_fx.analysis.liveness import Liveness, live_tokens, whole_attention
from gtp_fx.analysis.unsupported_attention import unsupported_attention
from gtp_fx.errors import Refusal
from gtp_fx.types.infer import Edge, SiteTyping, WholeTyping, infer_types, infer_with_sites

_KEPT = "_gtp_fx_typed"
"""Attribute of a graph: its `TypedGraph`. A deep copy of the graph has none."""
_NONE: frozenset[Any] = frozenset()
T = TypeVar("T")


def typed_graph(graph: fx.Graph) -> TypedGraph:
    """The analyses of `graph` as it stands now: those made before, or none yet where it has been edited since."""
    known: TypedGraph | None = getattr(graph, _KEPT, None)
    if known is None or known.graph is not graph or not known.is_current():
        known = TypedGraph(graph)
        setattr(graph, _KEPT, known)
    return known


class TypedGraph:
    """Analyses of a graph, each made when it is first asked for. Asking for one after an edit is an AssertionError.

    What was had before an edit may be used through it: a pass that edits a graph speaks of what it was.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._made_from = _state(graph)
        self._found: dict[Hashable, Any] = {}

    def is_current(self) -> bool:
        """Whether the graph is as it was: its nodes, what they call and with what, and the values that stand for theirs."""
        now = _state(self.graph)
        return len(now) == len(self._made_from) and all(map(operator.is_, now, self._made_from))

    @property
    def whole(self) -> WholeTyping:
        """Types with every token in place."""
        return self._once("whole", lambda: infer_types(self.graph))

    def with_sites(
        self, sites: frozenset[fx.Node], ends: frozenset[fx.Node] = _NONE, whole_edges: frozenset[Edge] = _NONE
    ) -> SiteTyping:
        """Types where tokens leave behind `sites`; the arguments are those of `infer_with_sites`."""
        if not sites:
            return SiteTyping(self.graph, self.whole.types, self.whole.answers, {})
        key = ("sites", sites, ends, whole_edges)
        return self._once(key, lambda: infer_with_sites(self.graph, sites, ends, whole_edges))

    @property
    def blocks(self) -> tuple[AttentionBlock, ...]:
        """The attention blocks that are marked, in order."""
        return self._once(("blocks", marks_of(self.graph)), lambda: read_blocks(self.whole, self.with_sites))

    @property
    def unsupported_attention(self) -> tuple[Refusal, ...]:
        """Attention that is no block, and why."""
        return self._once(("other", marks_of(self.graph)), lambda: unsupported_attention(self.whole))

    def live(self, needs_full_maps: bool = False) -> Liveness:
        """Which tokens something depends on. needs_full_maps: the attention of marked blocks counts as read whole."""
        whole = whole_attention(self.graph) if needs_full_maps else _NONE
        return self._once(("live", whole), lambda: live_tokens(self.whole, whole))

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if not self.is_current():
            raise AssertionError("this graph was edited after it was typed: ask `typed_graph` for its analyses anew")
        if key not in self._found:
            self._found[key] = make()
        found: T = self._found[key]
        return found


def _state(graph: fx.Graph) -> list[Any]:
    """What types are made from, to be compared by identity: fx puts new arguments in the place of old ones, and never changes them.

    Not the marks of blocks, on which no type depends: what reads them is kept by them.
    """
    return [
        part
        for node in graph.nodes
        for part in (node, node.target, node.args, node.kwargs, *map(node.meta.get, ("val", "nn_module_stack")))
    ]
