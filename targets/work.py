"""What is to be done, whatever processor does it: the work of one kernel, as amounts that a target turns into seconds.

Amounts may be integers or arrays of them (one entry a candidate count of tokens), and add up.
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
    "scores": "what attention costs more where it also ranks its tokens; bound by bandwidth",
    "stream": "element-wise operators, norms and copies, as the compiler fuses them; bound by bandwidth",
    "gather": "rows taken by index, and small products with them; bound by bandwidth",
    "neighbors": "the most similar tokens of each, ranked in registers by a kernel; bound by comparisons, told as bandwidth",
    "sort": "ranking the tokens of an image; bound by bandwidth",
}
"""Each has an efficiency curve of its own in a target."""

DENSE = ("product", "convolution", "attention")
"""Those whose curve is of the dense rate, the others' of the bandwidth."""


@dataclass(frozen=True)
class Work:
    """One kernel's work.

    kind: a name in KINDS. flops: 2 per multiply-add, of products alone. bytes: read and written in main memory.
    rows, columns, batch: of a product's result, whose tiles a processor makes whole. tokens: keys of an attention.
    dtype: torch's name of it, "float32". launches: kernels that it takes.
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
