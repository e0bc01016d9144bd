"""Calls of operators that failed while a model was traced, and whose exception its forward caught.

    try:
        x = x + self.position      # of another length
    except RuntimeError:
        x = x + self.resized()

torch.export has written the failed call into its graph, where it would fail at every run.
"""

from __future__ import annotations

from torch import fx


def drop_failed_calls(graph: fx.Graph) -> None:
    """Erase, in place, the calls that have no value though their operator returns one; nothing can read them."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users or node.meta.get("val") is not None:
            continue
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.returns:
            graph.erase_node(node)
