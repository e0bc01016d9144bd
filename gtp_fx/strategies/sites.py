"""What a strategy is given at a site and what it gives back: nouns of the protocol, most of them nodes of a graph."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.types.axes import TokenAxis

OWN_QUERIES = "gtp_own_queries"
"""Meta key of a block's input that its queries and its residual add read, and its keys and values don't
(`passes/exact/keys_apart.py`)."""

NO_MAP = "gtp_no_map"
"""Meta key of such an input: why no map of all its tokens over those that a site leaves can be made; "" where it can
(`gtp_fx.analysis.own_queries`)."""


class Emit(Protocol):
    """Insert a call at the place being rewritten, and return its node."""

    def __call__(self, target: Any, *args: Any) -> fx.Node: ...


@dataclass(frozen=True)
class SiteShape:
    """The sizes of a site, for pricing.

    patches_in, patches_out: patches before and after the site; numbers, or arrays of candidates.
    others: tokens of the stream that are no patches.
    channels: features of a token.
    heads: heads of the block's attention.
    images: images of a run.
    dtype: the stream's dtype by torch's name of it.
    key_features: features of a key in one head.
    prefix: tokens before the patches.
    kernels: price the work of GTP's kernels where there are some, instead of the operators'.
    """

    patches_in: Any
    patches_out: Any
    others: int
    channels: int
    heads: int
    images: int = 1
    dtype: str = "float32"
    key_features: int = 1
    prefix: int = 0
    kernels: bool = False


@dataclass(frozen=True)
class Removal:
    """Record of one site's removal, as nodes.

    kept: [B, K] indices of the kept patches among those that the site had.
    removed: [B, P] indices of the removed patches among them.
    kept_index, removed_index: the same patches as indices into the whole grid.
    weights: [B, K, P] how much of each removed token each kept one received, to be multiplied by `alpha`; None where
        they received nothing.
    alpha: factor of `weights`.
    own: [B, K] factor of a kept token itself; 1 where None.
    of_whole: `kept` and `removed`, too, are indices into the whole grid.
    """

    kept: fx.Node
    removed: fx.Node
    kept_index: fx.Node
    removed_index: fx.Node
    weights: fx.Node | None
    alpha: float = 1.0
    own: fx.Node | None = None
    of_whole: bool = False


@dataclass(frozen=True)
class StreamState:
    """State that a strategy carries along one stream, as nodes; each level of the stream has its own.

    index: [B, n] positions of the remaining patches among all of the stream, ascending; None while all are there.
    scale: [B, n] how many original tokens each one stands for; None where the strategy doesn't track it.
    carried: whatever else the strategy needs at every site.
    removal: the site that led to this level; None at level 0.
    """

    index: fx.Node | None = None
    scale: fx.Node | None = None
    carried: tuple[fx.Node, ...] = ()
    removal: Removal | None = None


@dataclass(frozen=True)
class Attention:
    """The operands of a scaled dot-product attention node; `bias` and `scale` may be None.

    beside: how many keys come before and after those of the tokens: learned ones, memory.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    bias: fx.Node | None
    scale: float | None
    beside: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, node: fx.Node) -> Attention:
        """Return the operands of scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, *, scale)."""
        q, k, v, *rest = node.args
        bias = rest[0] if rest else node.kwargs.get("attn_mask")
        return cls(q, k, v, bias, node.kwargs.get("scale"))  # type: ignore[arg-type]

    def others(self) -> tuple[int, ...]:
        """Return `beside` as the operators take it: nothing where every key is a token's."""
        return self.beside if any(self.beside) else ()

    def of_tokens(self, emit: Emit, keys: fx.Node) -> fx.Node:
        """Return the tokens' part of keys or values [B, H, M, D]."""
        before, after = self.beside
        if not any(self.beside):
            return keys
        return emit(aten.slice.Tensor, keys, -2, before, -after if after else sys.maxsize)


@dataclass(frozen=True)
class AtSite:
    """A place where tokens are about to be removed.

    stream: [B, prefix + n + suffix, C].
    axis: the tokens of the stream's whole grid.
    count: n, the patches that the site has.
    removed: how many of them to remove.
    block: number of the attention block, from 0.
    scores: [B, n] scores of the patches by that block's attention; None where the strategy reads none.
    attention: operands of that attention; None where the site stands before it.
    """

    stream: fx.Node
    axis: TokenAxis
    count: int
    removed: int
    block: int
    scores: fx.Node | None
    attention: Attention | None
