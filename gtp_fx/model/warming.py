"""Calls that let all that later calls of a model need be compiled, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtp_fx.capture.signatures import Call, CallSignature
from gtp_fx.errors import InputError, OptionError
from gtp_fx.graph.symbols import at_batch, is_symbolic, shape_of
from gtp_fx.graph.torch_internals import open_sizes


def checked_batches(batches: Sequence[int]) -> tuple[int, ...]:
    """Return batch sizes, each once. Raises OptionError unless they are one or more numbers of images, from 1 up."""
    found = tuple(batches) if isinstance(batches, Sequence) and not isinstance(batches, str) else ()
    if not found or not all(isinstance(batch, int) and not isinstance(batch, bool) and batch > 0 for batch in found):
        raise OptionError(f"warm_up({batches!r}): give batch sizes from 1 up, such as (1, 8)")
    return tuple(dict.fromkeys(found))


def warm(
    run: Callable[..., Any], graph: fx.GraphModule, signature: CallSignature, batches: Sequence[int], compiles: bool
) -> None:
    """Call `run` with each number of images, and with each kind of tensor that callers in the present mode may have.

    graph: as captured; its inputs say which of their sizes are batches.
    signature: the call's form, with examples, whose values are repeated: an embedding may look them up.
    compiles: whether batches of two or more are to be left open in what is compiled.
    """
    sizes = _batches_in(graph, signature)
    for batch in batches:
        for args, kwargs in _calls(signature, sizes, batch, opened=compiles and batch > 1):
            run(*args, **kwargs)


def _batches_in(graph: fx.GraphModule, signature: CallSignature) -> list[Mapping[int, int]]:
    """Return, for each argument, its sizes that depend on the number of images, by dimension.

    Raises InputError where the graph doesn't take the arguments one by one.
    """
    nodes = graph.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves((signature.args, signature.kwargs))
    if len(nodes) != len(leaves):
        raise InputError("warm_up can't tell which sizes are batches: call the model itself, once for each of them")
    return [
        {dim: size for dim, size in enumerate(shape_of(node)) if is_symbolic(size)} if isinstance(leaf, Tensor) else {}
        for leaf, node in zip(leaves, nodes, strict=True)
    ]


def _calls(signature: CallSignature, sizes: list[Mapping[int, int]], batch: int, opened: bool) -> Iterator[Call]:
    """Yield a call of `batch` images; in inference mode two, since tensors made outside of it are another kind.

    opened: whether its batches are marked as sizes that may be others.
    """

    def example(leaf: Any, sizes: Mapping[int, int]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        for dim, size in sizes.items():
            leaf = leaf.index_select(dim, torch.arange(at_batch(size, batch), device=leaf.device) % leaf.shape[dim])
        new = leaf.clone(memory_format=torch.contiguous_format)
        if opened and sizes:
            open_sizes(new, list(sizes))
        return new

    leaves, spec = pytree.tree_flatten((signature.args, signature.kwargs))
    for inside in (False, True) if torch.is_inference_mode_enabled() else (False,):
        with torch.inference_mode(inside), torch.no_grad():
            made = [example(*pair) for pair in zip(leaves, sizes, strict=True)]
        yield pytree.tree_unflatten(made, spec)
