"""What a launch computes, by its kernel and its operands' sizes: a value for each kind of work that takes time of its
own.

FLOPs are torch's (`torch.utils.flop_counter`): of the problem as it is, not of the tiles that it is done in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.flop_counter import bmm_flop, conv_flop_count, sdpa_flop_count

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """Nothing but what is moved: pointwise operators, reductions, copies."""

    @property
    def flops(self) -> int:
        return 0


@dataclass(frozen=True)
class Product(Work):
    """`batch` products [rows, inner] x [inner, columns]; a convolution as the product that it is. single: of float32,
    without TF32."""

    batch: int
    rows: int
    columns: int
    inner: int
    single: bool

    @property
    def flops(self) -> int:
        return int(bmm_flop((self.batch, self.rows, self.inner), (self.batch, self.inner, self.columns)))


@dataclass(frozen=True)
class Attention(Work):
    """A library's. maps: of all images and heads. features: of a query; values: of a value."""

    maps: int
    queries: int
    keys: int
    features: int
    values: int

    @property
    def flops(self) -> int:
        q, k = (1, self.maps, self.queries, self.features), (1, self.maps, self.keys, self.features)
        return int(sdpa_flop_count(q, k, (1, self.maps, self.keys, self.values)))


@dataclass(frozen=True)
class TritonAttention(Attention):
    """`attend`. rows, columns: its tile. fits: whether a row of keys is one tile. told: of token scales. scored: ranks
    tokens itself."""

    rows: int
    columns: int
    fits: bool
    told: bool
    scored: bool


@dataclass(frozen=True)
class Scores(Attention):
    """`scores_kernel`: one product and one exponential an entry, from log-sum-exps that are known. rows, columns: its
    tile, keys by queries."""

    rows: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.maps * self.queries * self.keys * self.features


@dataclass(frozen=True)
class TokenGraph(Work):
    """`token_graph` as one kernel: every patch with every other, the most similar of them kept. rows, columns: its
    tile."""

    images: int
    cells: int
    channels: int
    neighbors: int
    rows: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.images * self.cells**2 * self.channels if self.neighbors else 0


@dataclass(frozen=True)
class TopK(Work):
    """aten.topk: a block of threads a row, a pass over it for each digit."""

    rows: int
    size: int


@dataclass(frozen=True)
class Select(Work):
    """`select`: a program an image, 32 counts one after another."""

    images: int


@dataclass(frozen=True)
class Gather(Work):
    """`propagate`, `recover`: rows moved by indices that were just read, with reductions of each row between."""


def extern_work(name: str, operands: Sequence[tuple[Shape, str]], out: Shape) -> Work:
    """Of a library's kernel. operands: shape and dtype of each tensor, in the operator's order."""
    shapes = [shape for shape, _ in operands]
    single = bool(operands) and operands[-1][1] == "float32"
    _, _, operator = name.rpartition("extern_kernels.")
    if operator in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = shapes[-2:]
        return Product(math.prod(a[:-2]), a[-2], b[-1], a[-1], single)
    if operator.startswith("convolution") or "aten.convolution" in name:
        weight = shapes[1]
        made = Product(1, out[0] * math.prod(out[2:]), weight[0], math.prod(weight[1:]), single)
        assert made.flops == conv_flop_count(shapes[0], weight, out), "groups and strides as a patch embedding has them"
        return made
    if "_scaled_dot_product_" in name:
        q, k, v = shapes[:3]
        return Attention(q[0] * q[1], q[2], k[2], q[3], v[3])
    if "aten.topk" in name:
        return TopK(math.prod(shapes[0][:-1]), shapes[0][-1])
    return Work()


def own_work(
    module: str, kernel: str, tensors: Mapping[str, Shape], written: Sequence[str], given: Mapping[str, Any]
) -> Work:
    """Of one of gtp_fx's kernels. module: the last part of where it is written. tensors: shapes by parameter, of which
    `written` are results. given: its other arguments, numbers and constants."""
    read = [shape for name, shape in tensors.items() if name not in written]
    if module in ("attention_kernels", "scores"):
        (images, heads, queries, features), (_, _, keys, _) = [shape for shape in read if len(shape) == 4][:2]
        sizes = {"maps": images * heads, "queries": queries, "keys": keys, "features": features, "values": features}
        if module == "scores":
            return Scores(**sizes, **_tile(given))
        sizes["values"] = tensors["v_ptr"][3]
        fits, told, scored = (bool(given[flag]) for flag in ("ROW_FITS", "HAS_SCALES", "SCORED"))
        return TritonAttention(**sizes, **_tile(given), fits=fits, told=told, scored=scored and fits)
    if module == "token_graph":
        near = next(tensors[name] for name in written if len(tensors[name]) == 3)
        x = next(shape for shape in read if len(shape) == 3)
        return TokenGraph(near[0], near[1], x[-1], near[2], **_tile(given))
    if module == "select":
        return Select(read[0][0])
    if module in ("propagate", "recover"):
        return Gather()
    raise NotImplementedError(f"gtp_fx.kernels.{module}.{kernel}: no formula for its work in bench/gpu_work.py")


def _tile(given: Mapping[str, Any]) -> dict[str, int]:
    return {"rows": given["ROWS"], "columns": given["COLUMNS"]}
