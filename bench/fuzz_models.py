"""Vision transformers with random architectures, for `bench.fuzz`.

An `Architecture` describes a model, and its repr rebuilds it. The model can also run with patches masked, block by
block (`masked`), as an oracle for their removal.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bench.live_weights import enliven

PATCH = 2


@dataclass(frozen=True)
class Architecture:
    """Description of a model.

    grid: rows and columns of patches.
    prefix: tokens before the patches.
    suffix: tokens after the patches.
    depth: blocks.
    heads: query heads.
    key_heads: key and value heads, which divide the query heads.
    sharing: a name in `SHARINGS`, where there are fewer key heads.
    head: features per head.
    embed: a name in `EMBEDS`.
    position: a name in `POSITIONS`.
    attention: a name in `ATTENTIONS`.
    projections: a name in `PROJECTIONS`.
    query_key_norm: "layer", "rms" or "" for none.
    order: place of the norms, a name in `ORDERS`.
    layer_scale: whether branches are scaled.
    mlp: a name in `MLPS`.
    norm: a name in `NORMS`.
    window: side of the attention windows; 0 for global attention.
    shift: whether every other block's windows are shifted.
    pool: output, a name in `POOLS`.
    region: what the blocks run under, a name in `REGIONS`.
    keeps: whether forward keeps its tokens on the model, where nothing reads them.
    broken: whether Dynamo has to break the graph before the last block.
    dtype: dtype of parameters and images.
    beside: what goes along in a call's batch, a name in `BESIDE`, or "" for nothing.
    parting: where the call's images and those are parted and added up, a name in `PARTINGS`.
    """

    grid: tuple[int, int] = (4, 5)
    prefix: int = 1
    suffix: int = 0
    depth: int = 2
    heads: int = 2
    key_heads: int = 2
    sharing: str = "interleave"
    head: int = 8
    embed: str = "conv"
    position: str = "learned"
    attention: str = "sdpa"
    projections: str = "fused"
    query_key_norm: str = ""
    order: str = "before"
    layer_scale: bool = False
    mlp: str = "gelu"
    norm: str = "layer"
    window: int = 0
    shift: bool = False
    pool: str = "token"
    dtype: str = "float32"
    beside: str = ""
    parting: str = "output"
    region: str = ""
    keeps: bool = False
    broken: bool = False

    @property
    def width(self) -> int:
        return self.heads * self.head

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    def build(self, seed: int = 0) -> RandomViT:
        """Return the model with random weights, in eval mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = RandomViT(self)
        return enliven(model, seed).eval().to(getattr(torch, self.dtype))

    def images(self, count: int, seed: int = 0) -> Tensor:
        """Return random images [count, 3, height, width], smooth with some noise."""
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, 3, 3, generator=generator)
        sides = tuple(PATCH * side for side in self.grid)
        smooth = F.interpolate(coarse, size=sides, mode="bilinear")
        return (smooth + 0.5 * torch.randn(count, 3, *sides, generator=generator)).to(getattr(torch, self.dtype))


EMBEDS = ("conv", "unfold", "reshape")
POSITIONS = ("learned", "none", "sine", "rotary", "bias")
ATTENTIONS = ("sdpa", "softmax", "einsum", "multihead")
SHARINGS = ("interleave", "expand", "by attention")
"""Ways in which several query heads share a key head."""
PROJECTIONS = ("fused", "separate", "joint key-value")
ORDERS = ("before", "behind", "both", "parallel")
MLPS = ("gelu", "relu", "swiglu")
NORMS = ("layer", "rms")
REGIONS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast off": lambda: torch.autocast("cpu", enabled=False),
    "autocast elsewhere": lambda: torch.autocast("cuda", enabled=False),
}
POOLS = ("token", "mean", "mean of patches", "max", "attention", "all tokens", "map", "tokens and logits")
BESIDE = ("mirror images", "a template")
PARTINGS = ("output", "stream")


class RandomViT(nn.Module):
    """Vision transformer of an `Architecture`, from images [B, 3, height, width] to the output that `pool` names.

    The output is logits [B, 7], tokens [B, N, C], a map [B, 7, rows, columns], or a dict of logits and tokens.

    masked: for each block and for the output, the tokens [N] to mask; None to mask none.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.arch, width = arch, arch.width
        self.embed: nn.Module = (
            nn.Conv2d(3, width, PATCH, PATCH) if arch.embed == "conv" else nn.Linear(3 * PATCH**2, width)
        )
        self.before = nn.Parameter(torch.randn(1, arch.prefix, width)) if arch.prefix else None
        self.behind = nn.Parameter(torch.randn(1, arch.suffix, width)) if arch.suffix else None
        if arch.position == "learned":
            self.position = nn.Parameter(0.3 * torch.randn(1, arch.patches, width))
        if arch.position == "sine":
            places = torch.arange(arch.patches)[:, None] / 10 ** torch.linspace(0, 2, width)
            self.register_buffer("waves", places.sin()[None], persistent=False)
        self.blocks = nn.ModuleList(Block(arch, number) for number in range(arch.depth))
        self.norm = _norm(arch, width)
        self.head: nn.Module = nn.Conv2d(width, 7, 3, padding=1) if arch.pool == "map" else nn.Linear(width, 7)
        if arch.pool == "attention":
            self.query = nn.Parameter(torch.randn(1, 1, width))
            self.probe = nn.Linear(width, 2 * width)
        if arch.beside == "a template":
            self.register_buffer("template", torch.randn(1, 3, *(PATCH * side for side in arch.grid)))
        self.masked: list[Tensor] | None = None

    def forward(self, image: Tensor) -> Any:
        arch, images = self.arch, image.shape[0]
        if arch.beside == "mirror images":
            image = torch.cat([image, image.flip(-1)])
        if arch.beside == "a template":
            image = torch.cat([image, self.template])
        batch = image.shape[0]
        x = self._patches(image)
        if arch.position == "learned":
            x = x + self.position
        if arch.position == "sine":
            x = x + self.waves
        if self.before is not None:
            x = torch.cat([self.before.expand(batch, -1, -1), x], dim=1)
        if self.behind is not None:
            x = torch.cat([x, self.behind.expand(batch, -1, -1)], dim=1)
        with REGIONS[arch.region]():
            for number, block in enumerate(self.blocks):
                if arch.broken and number == arch.depth - 1:
                    torch._dynamo.graph_break()
                x = block(x, None if self.masked is None else self.masked[number])
        if arch.keeps:
            self.last = x
        if arch.beside and arch.parting == "stream":
            x = x[:images] + x[images:]
        out = self._pooled(self.norm(x))
        if arch.beside and arch.parting == "output":
            return pytree.tree_map(lambda t: t[:images] + t[images:], out)
        return out

    def _patches(self, image: Tensor) -> Tensor:
        if self.arch.embed == "conv":
            return self.embed(image).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
        if self.arch.embed == "unfold":
            return self.embed(F.unfold(image, PATCH, stride=PATCH).transpose(1, 2))  # type: ignore[no-any-return]
        batch, channels = image.shape[:2]
        rows, columns = self.arch.grid
        cut = image.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        return self.embed(cut.reshape(batch, rows * columns, channels * PATCH**2))  # type: ignore[no-any-return]

    def _pooled(self, x: Tensor) -> Any:
        pool, start, stop = self.arch.pool, self.arch.prefix, self.arch.prefix + self.arch.patches
        unmasked = x if self.masked is None else x[:, ~self.masked[-1]]  # the last entry: after the last block
        if pool == "token":
            return self.head(x[:, 0])
        if pool == "mean":
            return self.head(unmasked.mean(dim=1))
        if pool == "max":
            return self.head(unmasked.amax(dim=1))
        if pool == "mean of patches":
            kept = x[:, start:stop] if self.masked is None else x[:, start:stop][:, ~self.masked[-1][start:stop]]
            return self.head(kept.mean(dim=1))
        if pool == "attention":
            k, v = self.probe(unmasked).chunk(2, dim=-1)
            return self.head(F.scaled_dot_product_attention(self.query.expand(x.shape[0], -1, -1), k, v)[:, 0])
        if pool == "map":
            return self.head(x[:, start:stop].transpose(1, 2).reshape(x.shape[0], -1, *self.arch.grid))
        return x if pool == "all tokens" else {"logits": self.head(x[:, 0]), "tokens": x}


class Block(nn.Module):
    """Transformer block: attention and an MLP, with norms as `order` says."""

    def __init__(self, arch: Architecture, number: int) -> None:
        super().__init__()
        self.arch = arch
        self.attention = Attention(arch, number)
        self.mlp = (
            _SwiGLU(arch.width)
            if arch.mlp == "swiglu"
            else nn.Sequential(
                nn.Linear(arch.width, 3 * arch.width),
                nn.GELU() if arch.mlp == "gelu" else nn.ReLU(),
                nn.Linear(3 * arch.width, arch.width),
            )
        )
        self.norms = nn.ModuleList(_norm(arch, arch.width) for _ in range(4 if arch.order == "both" else 2))
        self.gammas = nn.ParameterList(torch.ones(arch.width) for _ in range(2)) if arch.layer_scale else None

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        order, first, second = self.arch.order, self.norms[0], self.norms[1]
        if order == "parallel":
            normed = first(x)
            return x + self._scaled(0, self.attention(normed, masked)) + self._scaled(1, self.mlp(normed))
        if order == "behind":
            x = first(x + self._scaled(0, self.attention(x, masked)))
            return second(x + self._scaled(1, self.mlp(x)))  # type: ignore[no-any-return]
        if order == "both":
            x = x + self._scaled(0, self.norms[2](self.attention(first(x), masked)))
            return x + self._scaled(1, self.norms[3](self.mlp(second(x))))
        x = x + self._scaled(0, self.attention(first(x), masked))
        return x + self._scaled(1, self.mlp(second(x)))

    def _scaled(self, branch: int, x: Tensor) -> Tensor:
        return x if self.gammas is None else x * self.gammas[branch]


class Attention(nn.Module):
    """Self-attention over all tokens or within windows, spelled as the architecture says."""

    def __init__(self, arch: Architecture, number: int) -> None:
        super().__init__()
        self.arch, width = arch, arch.width
        self.shift = arch.window // 2 if arch.window and arch.shift and number % 2 else 0
        narrow = arch.key_heads * arch.head
        self.shares = arch.key_heads < arch.heads and arch.sharing == "by attention" and arch.attention == "sdpa"
        if arch.attention == "multihead":
            self.whole = nn.MultiheadAttention(width, arch.heads, batch_first=True)
            return
        if arch.projections == "fused":
            self.qkv = nn.Linear(width, width + 2 * narrow)
        elif arch.projections == "separate":
            self.q, self.k, self.v = (nn.Linear(width, size) for size in (width, narrow, narrow))
        else:
            self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * narrow)
        self.out = nn.Linear(width, width)
        if arch.query_key_norm:
            made = nn.LayerNorm if arch.query_key_norm == "layer" else nn.RMSNorm
            self.q_norm, self.k_norm = made(arch.head), made(arch.head)
        sides = (arch.window, arch.window) if arch.window else arch.grid
        if arch.position == "bias":
            rows, columns = (torch.arange(side) for side in sides)
            places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).flatten(1)
            apart = places[:, :, None] - places[:, None, :] + torch.tensor(sides)[:, None, None] - 1
            self.register_buffer("apart", apart[0] * (2 * sides[1] - 1) + apart[1], persistent=False)
            self.table = nn.Parameter(torch.randn((2 * sides[0] - 1) * (2 * sides[1] - 1), arch.heads))
        if arch.position == "rotary":
            turns = torch.arange(arch.patches)[:, None] / 8 ** torch.linspace(0, 1, arch.head // 2)
            self.register_buffer("angles", torch.cat([turns, turns], dim=-1), persistent=False)

    def forward(self, x: Tensor, masked: Tensor | None) -> Tensor:
        if self.arch.window:
            return self._windows(x)
        return self._attend(x, masked)

    def _windows(self, x: Tensor) -> Tensor:
        side, (rows, columns), (batch, _, width) = self.arch.window, self.arch.grid, x.shape
        grid = x.reshape(batch, rows, columns, width)
        if self.shift:
            grid = grid.roll((-self.shift, -self.shift), (1, 2))
        cut = grid.reshape(batch, rows // side, side, columns // side, side, width).transpose(2, 3)
        out = self._attend(cut.reshape(-1, side * side, width), None)
        out = (
            out.reshape(batch, rows // side, columns // side, side, side, width)
            .transpose(2, 3)
            .reshape(batch, rows, columns, width)
        )
        if self.shift:
            out = out.roll((self.shift, self.shift), (1, 2))
        return out.reshape(batch, rows * columns, width)

    def _attend(self, x: Tensor, masked: Tensor | None) -> Tensor:
        arch, (batch, count, width) = self.arch, x.shape
        if arch.attention == "multihead":
            return self.whole(
                x, x, x, need_weights=False, key_padding_mask=None if masked is None else masked.expand(batch, -1)
            )[0]  # type: ignore[no-any-return]
        q, k, v = (part.reshape(batch, count, -1, arch.head).transpose(1, 2) for part in self._projected(x))
        if arch.query_key_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if arch.position == "rotary":
            q, k = self._turned(q), self._turned(k)
        if arch.key_heads < arch.heads and not self.shares:
            k, v = self._repeated(k), self._repeated(v)
        bias = self._bias(count, masked, q.dtype)
        if arch.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=self.shares)
        elif arch.attention == "einsum":
            logits = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(arch.head)
            out = torch.einsum("bhij,bhjd->bhid", (logits if bias is None else logits + bias).softmax(dim=-1), v)
        else:
            logits = (q * arch.head**-0.5) @ k.transpose(-2, -1)
            out = (logits if bias is None else logits + bias).softmax(dim=-1) @ v
        return self.out(out.transpose(1, 2).reshape(batch, count, width))  # type: ignore[no-any-return]

    def _repeated(self, x: Tensor) -> Tensor:
        times = self.arch.heads // self.arch.key_heads
        if self.arch.sharing == "interleave":
            return x.repeat_interleave(times, dim=1)
        batch, heads, count, features = x.shape
        return x[:, :, None].expand(batch, heads, times, count, features).reshape(batch, heads * times, count, features)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        narrow = self.arch.key_heads * self.arch.head
        if self.arch.projections == "fused":
            return self.qkv(x).split([self.arch.width, narrow, narrow], dim=-1)  # type: ignore[no-any-return]
        if self.arch.projections == "separate":
            return self.q(x), self.k(x), self.v(x)
        return (self.q(x), *self.kv(x).chunk(2, dim=-1))

    def _turned(self, x: Tensor) -> Tensor:
        """Apply rotary embeddings to the patches [B, H, N, features]; prefix and suffix have no position."""
        start, stop = self.arch.prefix, self.arch.prefix + self.arch.patches
        patches = x[:, :, start:stop]
        one, two = patches.chunk(2, dim=-1)
        angles = self.angles.to(x.dtype)
        turned = patches * angles.cos() + torch.cat([-two, one], dim=-1) * angles.sin()
        return torch.cat([x[:, :, :start], turned, x[:, :, stop:]], dim=2)

    def _bias(self, count: int, masked: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        bias = None
        if self.arch.position == "bias":
            before, after = (0, 0) if self.arch.window else (self.arch.prefix, self.arch.suffix)
            bias = self.table[self.apart].permute(2, 0, 1)
            if before or after:
                bias = F.pad(bias, (before, after, before, after))
        if masked is not None:
            mask = torch.zeros(count, dtype=dtype).masked_fill(masked, float("-inf")).expand(1, count, count)
            bias = mask if bias is None else bias + mask
        return bias


class _SwiGLU(nn.Module):
    """MLP with a gated SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)  # type: ignore[no-any-return]


def _norm(arch: Architecture, width: int) -> nn.Module:
    return nn.LayerNorm(width) if arch.norm == "layer" else nn.RMSNorm(width)
