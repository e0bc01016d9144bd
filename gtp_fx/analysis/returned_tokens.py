"""What a graph returns of its tokens: which outputs run over them, and how many of them are left there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils import _pytree as pytree

from gtp_fx.types.axes import TokenAxis, token_axis
from gtp_fx.types.infer import Typing, tokens_dim


@dataclass(frozen=True)
class ReturnedTokens:
    """An output that runs over the tokens of each image.

    number: its place among all outputs, flat, from 0.
    name: its place in what the model returns, "hidden_states[2]"; "output" where that is all.
    dim: its dimension of tokens.
    axis: the tokens, at the level at which they are returned.
    """

    number: int
    name: str
    dim: int
    axis: TokenAxis


def returned_tokens(typing: Typing) -> tuple[ReturnedTokens, ...]:
    """Return the outputs of a graph that run over tokens, in order."""
    output = typing.graph.output_node()
    wanted, names = typing.results[output].operands, names_of_outputs(typing.graph)
    found = []
    for number, leaf in enumerate(pytree.tree_leaves(output.args[0])):
        dim = tokens_dim(wanted[leaf]) if leaf in wanted else None
        if dim is not None:
            axis = token_axis(wanted[leaf][dim])
            assert axis is not None
            found.append(ReturnedTokens(number, names[number], dim, axis))
    return tuple(found)


def names_of_outputs(graph: fx.Graph) -> list[str]:
    """Return the place of each output in what the model returns: by keys of mappings and numbers of sequences."""
    count = len(pytree.tree_leaves(graph.output_node().args[0]))
    names = dict(_places(graph.process_outputs(list(range(count))), ""))
    return [names.get(number) or "output" for number in range(count)]


def _places(part: Any, place: str) -> Iterator[tuple[int, str]]:
    """Yield the numbers of the outputs in a part of what the model returns, each with its place."""
    if isinstance(part, Mapping):
        for key, inside in part.items():
            yield from _places(inside, f"{place}.{key}" if place else str(key))
    elif isinstance(part, list | tuple):
        for number, inside in enumerate(part):
            yield from _places(inside, f"{place}[{number}]")
    elif isinstance(part, int):
        yield part, place
