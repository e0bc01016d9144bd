"""The ViT: `Respelt` calls the functions that a `Spelling` names. The parameters are the same for every spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from bench.spelt.attention import ATTENTIONS, JOININGS, PROJECTIONS
from bench.spelt.layers import ACTIVATIONS, BRANCHES, CARRIED, LINEARS, NORMS, RESIDUALS
from bench.spelt.layouts import LAYOUTS
from bench.spelt.sizes import CHANNELS, DEPTH, SIDE, TOKENS
from bench.spelt.streams import GATED, MANY
from bench.spelt.tokens import PATCHES, POOLS, TOKENS_OF


@dataclass(frozen=True)
class Spelling:
    """The way in which each part is written; the default is the canonical one."""

    patches: str = next(iter(PATCHES))
    tokens: str = next(iter(TOKENS_OF))
    norm: str = next(iter(NORMS))
    linear: str = next(iter(LINEARS))
    projection: str = next(iter(PROJECTIONS))
    attention: str = next(iter(ATTENTIONS))
    joining: str = next(iter(JOININGS))
    residual: str = next(iter(RESIDUALS))
    carried: str = next(iter(CARRIED))
    branches: str = next(iter(BRANCHES))
    activation: str = next(iter(ACTIVATIONS))
    layout: str = next(iter(LAYOUTS))
    pool: str = next(iter(POOLS))


def canonical_of(spelling: Spelling) -> Spelling:
    """Return the canonical spelling of the model that a spelling is of.

    Its branches are in turn or side by side, or it has several streams, or gates.
    """
    for others in (MANY, GATED):
        if spelling.layout in others:
            return Spelling(layout=next(iter(others)))
    beside = spelling.branches != Spelling.branches and LAYOUTS[spelling.layout][-1] is None
    return Spelling(branches="x + y + z") if beside else Spelling()


CHOICES: Mapping[str, tuple[str, ...]] = dict(
    zip(
        [field.name for field in fields(Spelling)],
        map(
            tuple,
            (
                PATCHES,
                TOKENS_OF,
                NORMS,
                LINEARS,
                PROJECTIONS,
                ATTENTIONS,
                JOININGS,
                RESIDUALS,
                CARRIED,
                BRANCHES,
                ACTIVATIONS,
                LAYOUTS,
                POOLS,
            ),
        ),
        strict=True,
    )
)
"""The spellings of each part."""


class Block(nn.Module):
    """Pre-norm attention and MLP. `spelling` may be changed at any time: the parameters serve all."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 4 * CHANNELS), nn.Linear(4 * CHANNELS, CHANNELS)

    def forward(self, x: Any) -> Any:
        """Return what is carried on: the stream, or the list of all that it is the sum of."""
        how = self.spelling
        (there, back, whole), beside = LAYOUTS[how.layout], BRANCHES[how.branches]
        if whole is not None:
            return whole(self, x)

        def read(x: Any) -> Tensor:
            return back(CARRIED[how.carried](x))

        def joined(x: Any, y: Tensor) -> Any:
            return [*x, y] if isinstance(x, list) else RESIDUALS[how.residual](x, y)

        attended = there(self.attend(read(x)))
        if beside is None:
            x = joined(x, attended)
            return joined(x, there(self.feed(read(x))))
        fed = there(self.feed(read(x)))
        return [*x, attended, fed] if isinstance(x, list) else beside(RESIDUALS[how.residual], x, attended, fed)

    def attend(self, x: Tensor) -> Tensor:
        """The attention's branch, [B, N, C] -> [B, N, C]"""
        how = self.spelling
        normed = NORMS[how.norm](x, self.norm1.weight, self.norm1.bias)
        q, k, v = PROJECTIONS[how.projection](normed, LINEARS[how.linear], self.qkv.weight, self.qkv.bias)
        return self._through(self.out, JOININGS[how.joining](ATTENTIONS[how.attention](q, k, v)))

    def feed(self, x: Tensor) -> Tensor:
        """The MLP's branch, [B, N, C] -> [B, N, C]"""
        how = self.spelling
        normed = NORMS[how.norm](x, self.norm2.weight, self.norm2.bias)
        return self._through(self.down, ACTIVATIONS[how.activation](self._through(self.up, normed)))

    def _through(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return LINEARS[self.spelling.linear](x, layer.weight, layer.bias)  # type: ignore[no-any-return]


class Respelt(nn.Module):
    """The ViT: images [B, 3, GRID * SIDE, GRID * SIDE] -> logits [B, 10]."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling
        self.patch = nn.Conv2d(3, CHANNELS, SIDE, SIDE)
        self.cls, self.position = (
            nn.Parameter(torch.zeros(1, 1, CHANNELS)),
            nn.Parameter(torch.zeros(1, TOKENS, CHANNELS)),
        )
        self.blocks = nn.ModuleList([Block(spelling) for _ in range(DEPTH)])
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, 10)

    def forward(self, images: Tensor) -> Tensor:
        how = self.spelling
        there, back, whole = LAYOUTS[how.layout]
        x: Any = PATCHES[how.patches](images, self.patch.weight, self.patch.bias)
        x = there(TOKENS_OF[how.tokens](x, self.cls, self.position))
        if how.carried != Spelling.carried and whole is None:
            x = [x]
        for block in self.blocks:
            x = block(x)
        x = CARRIED[how.carried](x) if isinstance(x, list) else x
        x = NORMS[how.norm](back(x), self.norm.weight, self.norm.bias)
        return self.head(POOLS[how.pool](x))
