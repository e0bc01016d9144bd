"""Exact: mark that token maps are returned with the tokens that are left, where the user asked for that.

By default every returned map has all of its tokens: those that were removed are put back before it. A reader that
takes any number of tokens (a language model) needs none of that. Types then let an output run over fewer tokens
(`gtp_fx.types.infer`), so nothing is inserted before it, and nothing is priced.
"""

from __future__ import annotations

from torch import fx

from gtp_fx.graph.edit import copy_of
from gtp_fx.types.infer import AS_LEFT


def mark_outputs(gm: fx.GraphModule, as_left: bool) -> fx.GraphModule:
    """Return a copy of `gm` whose outputs are marked as returned with fewer tokens, or with all of them.

    `gm` itself where they are so already.
    """
    if as_left == bool(gm.graph.output_node().meta.get(AS_LEFT)):
        return gm
    marked = copy_of(gm)
    marked.graph.output_node().meta[AS_LEFT] = as_left
    return marked
