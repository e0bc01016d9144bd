"""Exact: an operator that is all that a layer's forward does becomes a call of the layer, for graphs a module runs.

    linear(x, blocks.0.attn.proj.weight, blocks.0.attn.proj.bias)   ->   blocks.0.attn.proj(x)

So hooks on the layer fire, and what stands in its place is run: an adapter, a quantised layer, a wrapper. A compiler
sees the same operators as before. What a pass has joined or taken apart stays a function of the parameters.
"""

from __future__ import annotations

from torch import fx, nn

from gtp_fx.graph import edit


def call_layers(gm: fx.GraphModule, owner: nn.Module) -> fx.GraphModule:
    """Return a copy of `gm` over `owner`'s modules, which calls its layers, and which isn't to be rewritten further.

    owner: has the modules that `gm` was captured from, under their names.
    """
    gm = edit.copy_of(gm)
    edit.share(gm, owner)
    for node in list(gm.graph.nodes):
        layer = node.meta.get(edit.LAYER)
        if layer is None or not layer.is_called_by(node):
            continue
        with gm.graph.inserting_before(node):
            call = gm.graph.call_module(layer.path, (layer.input_of(node),))
        call.meta = {**node.meta}
        edit.replace(node, call)
    for node in gm.graph.find_nodes(op="get_attr"):  # of which some may be gone, with the layers they were of
        if not node.users:
            gm.graph.erase_node(node)
    return edit.finish(gm)


def called_layers(gm: fx.GraphModule) -> frozenset[str]:
    """Return the paths of the layers that a graph calls."""
    return frozenset(str(node.target) for node in gm.graph.find_nodes(op="call_module"))


def joined_layers(gm: fx.GraphModule) -> frozenset[str]:
    """Return the paths of the modules whose parameters a graph reads itself."""
    return frozenset(str(node.target).rpartition(".")[0] for node in gm.graph.find_nodes(op="get_attr"))
