"""Small vision transformers in which batches are joined and taken apart, at every place and in every way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, SIDE, PATCH = 32, 48, 6

JOINED = ("two batches", "template", "mirror", "views")
"""B1 + B2, B + 1, 2B, and B videos of two frames."""
PLACES = ("pixels", "tokens", "blocks")
"""What is joined: images, their tokens, or what the first block leaves of them."""
PARTED = ("nowhere", "pooled", "slice", "chunk", "reshape", "mean", "across", "decoder")
"""How the batch is taken apart behind the blocks. "across" attends over the views of each place."""


@dataclass(frozen=True)
class Joined:
    """A model: how its batches are joined, a name in `JOINED`, and where; how they are taken apart."""

    joined: str
    place: str
    parted: str

    def model(self) -> nn.Module:
        """A new one with the same weights as ever."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Net(self).eval().requires_grad_(False)

    def inputs(self, first: int = 3, second: int = 4) -> tuple[Tensor, ...]:
        """Images of one batch, or of two."""
        numbers = torch.Generator().manual_seed(first)
        if self.joined == "two batches":
            return tuple(torch.randn(size, 3, SIDE, SIDE, generator=numbers) for size in (first, second))
        frames = (2,) if self.joined == "views" else ()
        return (torch.randn(first, *frames, 3, SIDE, SIDE, generator=numbers),)

    @property
    def halves(self) -> bool:
        """Whether the parts are as many images as each other."""
        return self.joined in ("mirror", "views")


def models() -> Iterator[Joined]:
    """Every combination that makes sense."""
    for joined in JOINED:
        for place in PLACES:
            for parted in PARTED:
                # Views and pairs need parts of one size.
                whole = parted in ("nowhere", "pooled", "slice")
                if whole or joined in ("mirror", "views"):
                    yield Joined(joined, place, parted)


class Block(nn.Module):
    """A transformer block of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))  # type: ignore[no-any-return]


class Net(nn.Module):
    """Patches, a place for each without a dimension of images, one block, three more, and a head."""

    def __init__(self, kind: Joined) -> None:
        super().__init__()
        self.kind = kind
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.register_buffer("template", torch.randn(1, 3, SIDE, SIDE))
        self.first = Block()
        self.blocks, self.decoder = (nn.Sequential(*(Block() for _ in range(n))) for n in (3, 2))
        self.across, self.head = Block(), nn.Linear(WIDTH, 5)

    def forward(self, *given: Tensor) -> object:
        steps = {"pixels": lambda x: x, "tokens": self.tokens, "blocks": lambda x: self.first(self.tokens(x))}
        before = steps[self.kind.place]
        x = self.joined([before(part) for part in self.parts(given)])
        if self.kind.place == "pixels":
            x = self.tokens(x)
        return self.parted(self.blocks(x), given[0].shape[0])

    def parts(self, given: tuple[Tensor, ...]) -> list[Tensor]:
        kind, x = self.kind.joined, given[0]
        if kind == "two batches":
            return list(given)
        if kind == "template":
            return [x, self.template]
        return [x, x.flip(-1)] if kind == "mirror" else list(x.unbind(1))

    def joined(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts, 1).flatten(0, 1) if self.kind.joined == "views" else torch.cat(parts)

    def tokens(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.place  # type: ignore[no-any-return]

    def halves(self, x: Tensor) -> Tensor:
        """[2B, N, C] -> [B, 2, N, C]"""
        return (
            x.reshape(-1, 2, *x.shape[1:]) if self.kind.joined == "views" else x.unflatten(0, (2, -1)).transpose(0, 1)
        )

    def parted(self, x: Tensor, batch: int) -> object:
        how = self.kind.parted
        if how == "nowhere":
            return self.head(x)
        if how == "pooled":
            features = x.mean(1)
            return self.head(features[:batch]), features[batch:]
        if how == "slice":
            return self.head(x[:batch]).mean(1), x[batch:, :1]
        if how == "chunk":
            one, other = x.chunk(2)
            return self.head(one - other)
        if how == "reshape":
            one, other = self.halves(x).unbind(1)
            return self.head(one.mean(1) * other.amax(1))
        if how == "mean":
            return self.head(self.decoder(self.halves(x).mean(1)).mean(1))
        if how == "decoder":
            one, other = self.halves(x).unbind(1)
            return self.head(self.decoder(one + other + self.place))
        views = self.halves(x).transpose(1, 2)  # [B, N, 2, C]
        return self.head(self.across(views.flatten(0, 1)).mean(1)).reshape(views.shape[0], -1, 5).mean(1)
