"""Work of a launch, from its kernel and its operands' sizes, with a class for each kind whose time is modelled.

FLOPs are torch's (`torch.utils.flop_counter`): those of the problem, not of whole tiles.
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
    """Work that only moves bytes: pointwise operators, reductions, copies."""

    @property
    def flops(self) -> int:
        return 0


@dataclass(frozen=True)
class Product(Work):
    """`batch` matrix products [rows, inner] x [inner, columns], or a convolution as the equivalent product.

    batch: number of products.
    rows, columns, inner: sizes of each.
    single: whether it is in float32, without TF32.
    """

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
    """A library's attention.

    maps: number of attention maps, over all images and heads.
    queries: queries per map.
    keys: keys per map.
    features: features of a query or key.
    values: features of a value.
    """

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
    """GTP's kernel `attend`.

    rows, columns: queries and keys of a tile.
    fits: whether all keys fit into one tile.
    told: whether it uses token scales.
    scored: whether it scores tokens itself.
    """

    rows: int
    columns: int
    fits: bool
    told: bool
    scored: bool


@dataclass(frozen=True)
class Scores(Attention):
    """GTP's kernel `scores_kernel`: one product and one exponential per entry, from known log-sum-exps.

    rows, columns: keys and queries of a tile.
    """

    rows: int
    columns: int

    @property
    def flops(self) -> int:
        return 2 * self.maps * self.queries * self.keys * self.features


@dataclass(frozen=True)
class TokenGraph(Work):
    """GTP's kernel `token_graph`: similarity of every patch to every other, and the most similar ones of each.

    images: number of images.
    cells: patches per image.
    channels: channels of a patch.
    neighbors: neighbours kept per patch; 0 without a semantic graph.
    rows, columns: patches of a tile.
    """

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
    """aten.topk: a block of threads per row, with a pass over the row for each digit.

    rows: number of rows.
    size: entries per row.
    """

    rows: int
    size: int


@dataclass(frozen=True)
class Select(Work):
    """GTP's kernel `select`: a program per image, with 32 counts one after the other.

    images: number of images.
    """

    images: int


@dataclass(frozen=True)
class Gather(Work):
    """GTP's kernels `propagate` and `recover`: rows moved by indices just read, with reductions of each row between."""


def extern_work(name: str, operands: Sequence[tuple[Shape, str]], out: Shape) -> Work:
    """Return the work of a library's kernel.

    name: name in the generated code.
    operands: shape and dtype of each tensor, in the operator's order.
    out: shape of the first result.
    """
    shapes = [shape for shape, _ in operands]
    single = bool(operands) and operands[-1][1] == "float32"
    _, _, operator = name.rpartition("extern_kernels.")
    if operator in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = shapes[-2:]
        return Product(math.prod(a[:-2]), a[-2], b[-1], a[-1], single)
    if operator.startswith("convolution") or "aten.convolution" in name:
        weight = shapes[1]
        made = Product(1, out[0] * math.prod(out[2:]), weight[0], math.prod(weight[1:]), single)
        assert made.flops == conv_flop_count(shapes[0], weight, out), "only for groups and strides of a patch embedding"
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
    """Return the work of one of gtp_fx's kernels.

    module: last part of its module's name.
    kernel: name of its function.
    tensors: shapes by parameter.
    written: parameters that are results.
    given: other arguments, numbers and constants.

    Raises NotImplementedError for an unknown kernel.
    """
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
