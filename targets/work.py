"""Work: what one kernel does, whatever processor runs it, in amounts that a target turns into seconds.

Amounts are integers, or arrays of them with an entry for each candidate count of tokens, and add up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Amount = Any
"""An int, or an integer array over candidate token counts."""

KINDS = {
    "product": "matrix products; bound by the dense rate",
    "convolution": "dense convolutions; bound by the dense rate",
    "attention": "fused attention; bound by the dense rate",
    "scores": "what scoring tokens adds to attention; bound by bandwidth",
    "stream": "element-wise operators, norms and copies, as the compiler fuses them; bound by bandwidth",
    "gather": "rows taken by index, and small products with them; bound by bandwidth",
    "neighbors": "the most similar tokens of each, ranked in registers by a kernel; bound by comparisons, which are "
    "counted as bandwidth",
    "sort": "ranking the tokens of an image; bound by bandwidth",
}
"""The kinds of work. Each has an efficiency curve of its own in a target."""

DENSE = ("product", "convolution", "attention")
"""Kinds whose curve is a share of the dense rate; the others' are shares of the bandwidth."""


@dataclass(frozen=True)
class Work:
    """The work of one kernel.

    kind: a name in `KINDS`.
    flops: those of products alone, 2 for each multiply-add.
    bytes: bytes read and written in main memory.
    rows, columns, batch: sizes of a product's result, which a processor makes in whole tiles.
    tokens: keys of an attention.
    dtype: torch's name of it, "float32".
    launches: kernels that it takes.
    """

    kind: str
    flops: Amount = 0
    bytes: Amount = 0
    rows: Amount = 1
    columns: Amount = 1
    batch: Amount = 1
    tokens: Amount = 1
    dtype: str = "float32"
    launches: int = 1
