"""How large GTP's token scales can get, known when the plan is made: where that is next to nothing, attention needn't be told.

Proportional attention adds log s_j to the logits of key j (arXiv 2311.03035), and no fused attention adds a vector to its logits at
the speed that it has without. At alpha = 0.1 scales stay near 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AUTO = "auto"
TOLD_FROM = 0.2
"""log s from which attention is told token scales where GTP's `token_scale` is "auto".

By measurement (`bench/results/token_scale.json`: a net trained on photographs and one on digits, two budgets each). With the bound at 0.15 (alpha
0.1) outputs with and without it are 1.3 % as far apart as the reduction has moved them, at 0.32 (alpha 0.2) 1.8 to 5.4 %, at 0.7
(alpha 0.4) 6 to 12 %, and no score differs by more than its noise.
"""


def log_scale_bound(grid: Sequence[int], kind: str, neighbors: int, alpha: float, counts: Sequence[int]) -> float:
    """The most that log s of any token can be, when `counts[i]` patches of `grid` are propagated at the i-th site of a stream.

    kind: a name in `gtp_fx.ops.token_graph.GRAPHS`. neighbors: M.

    A kept token j has d_j neighbours, and each leaves once at most. From those gone by now it has received

        s_j - 1  =  alpha Σ_i s_i / sqrt(d_j d_i)  <=  alpha n S / sqrt(d_j d_least)  <=  alpha sqrt(n / d_least) S

    with n of them gone, no more than d_j and no more than have left at all, d_least the smallest degree there is, and S a bound on the
    scales that tokens left with, which is this bound at the site before. Degrees: a patch has 3^R - 1 spatial neighbours, fewer at
    the border of a grid of R sides, and M semantic ones.
    """
    least, most = _degrees(grid, kind, neighbors)
    if least == 0:
        return 0.0
    scale, gone = 1.0, 0
    for count in counts:
        gone += count
        scale = 1.0 + alpha * math.sqrt(min(most, gone) / least) * scale
    return math.log(scale)


def _degrees(grid: Sequence[int], kind: str, neighbors: int) -> tuple[int, int]:
    """The least and the most neighbours that a patch can have."""
    corner, inner = (math.prod(min(side, reach) for side in grid) - 1 for reach in (2, 3))
    if kind == "spatial":
        return corner, inner
    if kind == "semantic":
        return neighbors, neighbors
    return max(neighbors, corner), min(neighbors + inner, math.prod(grid) - 1)
