"""Blocks whose stream goes on in another way than by a sum: several streams mixed by constants, gated recurrent units.

Each is another model than the canonical one, in several layouts. S streams, t the streams after mixing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bench.spelt.sizes import CHANNELS

if TYPE_CHECKING:
    from bench.spelt.model import Block

STREAMS = 3
READ = torch.tensor([0.5, 0.2, 0.3])
MIXED = torch.tensor([[0.9, 0.2, 0.0], [-0.1, 1.0, 0.2], [0.1, 0.0, 0.8]])
WRITTEN = torch.tensor([1.0, 0.5, 1.5])


@dataclass(frozen=True)
class Layout:
    """How several streams are kept.

    letters: their dimensions, of b images, n tokens, s streams, c channels.
    merged: the first of two dimensions that are one; -1 where none are.
    """

    letters: str
    merged: int = -1

    def begin(self, x: Tensor) -> Tensor:
        """[B, N, C] -> its copies as streams"""
        return self._kept(torch.einsum(f"s,bnc->{self.letters}", torch.ones(STREAMS), x))

    def end(self, x: Tensor) -> Tensor:
        """The streams' sum [B, N, C]"""
        return self._apart(x).sum(self.letters.index("s"))

    def block(self, block: Block, x: Tensor) -> Tensor:
        """Attention and MLP, each of which reads a fixed mixture of the streams and is added to all of them."""
        mixed = self.letters.replace("s", "t")
        for branch in (block.attend, block.feed):
            streams = self._apart(x)
            y = branch(torch.einsum(f"s,{self.letters}->bnc", READ, streams))
            past = self._kept(torch.einsum(f"ts,{self.letters}->{mixed}", MIXED, streams))
            x = past + self._kept(torch.einsum(f"t,bnc->{mixed}", WRITTEN, y))
        return x

    def _kept(self, x: Tensor) -> Tensor:
        return x if self.merged < 0 else x.flatten(self.merged, self.merged + 1)

    def _apart(self, x: Tensor) -> Tensor:
        if self.merged < 0:
            return x
        # Streams are the second of the merged dimensions, or the first.
        second = self.letters[self.merged + 1] == "s"
        return x.unflatten(self.merged, (-1, STREAMS) if second else (STREAMS, -1))


def _by_hand(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """A gated recurrent unit written out: x its state and y its input, both [B, N, C]."""
    rows = 3 * CHANNELS
    given = torch.nn.functional.linear(y, block.qkv.weight, block.qkv.bias).chunk(3, -1)
    known = torch.nn.functional.linear(x, block.up.weight[:rows], block.up.bias[:rows]).chunk(3, -1)
    reset, kept = ((a + b).sigmoid() for a, b in zip(given[:2], known[:2], strict=True))
    return torch.lerp((given[2] + reset * known[2]).tanh(), x, kept)


def _by_difference(block: Block, x: Tensor, y: Tensor) -> Tensor:
    """The same with each gate's weights apart."""
    rows = 3 * CHANNELS
    weights, biases = block.qkv.weight.chunk(3), block.qkv.bias.chunk(3)
    own, owned = block.up.weight[:rows].chunk(3), block.up.bias[:rows].chunk(3)
    given = [y @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]
    known = [x @ weight.T + bias for weight, bias in zip(own, owned, strict=True)]
    made = (given[2] + (given[0] + known[0]).sigmoid() * known[2]).tanh()
    return made + (given[1] + known[1]).sigmoid() * (x - made)


def _gated(unit: Callable[[Block, Tensor, Tensor], Tensor], block: Block, x: Tensor) -> Tensor:
    x = unit(block, x, block.attend(x))
    return unit(block, x, block.feed(x))


MANY: Mapping[str, Layout] = {
    "[B, N, S, C]": Layout("bnsc"),
    "[S, B, N, C]": Layout("sbnc"),
    "[B, S, N, C]": Layout("bsnc"),
    "[B, N, C, S]": Layout("bncs"),
    "[B·S, N, C]": Layout("bsnc", 0),
    "[S·B, N, C]": Layout("sbnc", 0),
    "[B, N, S·C]": Layout("bnsc", 2),
}
GATED: Mapping[str, Callable[[Block, Tensor], Tensor]] = {
    "gated": functools.partial(_gated, _by_hand),
    "gated, weights apart": functools.partial(_gated, _by_difference),
}
