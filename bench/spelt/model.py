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
    """Return the canonical spelling of the model that a spelling is of: that with branches in turn, or side by side."""
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
        (there, back, whole), linear, add = LAYOUTS[how.layout], LINEARS[how.linear], RESIDUALS[how.residual]
        if whole is not None:
            return whole(self, x)

        def norm(layer: nn.LayerNorm) -> Tensor:
            return NORMS[how.norm](back(CARRIED[how.carried](x)), layer.weight, layer.bias)

        def joined(y: Tensor) -> Any:
            return [*x, y] if isinstance(x, list) else add(x, y)

        def through(layer: nn.Linear, y: Tensor) -> Tensor:
            return linear(y, layer.weight, layer.bias)

        q, k, v = PROJECTIONS[how.projection](norm(self.norm1), linear, self.qkv.weight, self.qkv.bias)
        attended = JOININGS[how.joining](ATTENTIONS[how.attention](q, k, v))
        attended, beside = there(through(self.out, attended)), BRANCHES[how.branches]
        if beside is None:
            x = joined(attended)
        y = there(through(self.down, ACTIVATIONS[how.activation](through(self.up, norm(self.norm2)))))
        if beside is None:
            return joined(y)
        return [*x, attended, y] if isinstance(x, list) else beside(add, x, attended, y)


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
