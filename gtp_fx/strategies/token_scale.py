"""An upper bound on GTP's token scales, known when the plan is made. Where it is near 1, attention needn't read them.

Proportional attention adds log s_j to the logits of key j (arXiv 2311.03035). No fused attention adds a vector to its
logits without losing speed. At alpha = 0.1 scales stay near 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

AUTO = "auto"
SCALES_READ_FROM = 0.2
"""The log s from which attention reads token scales where GTP's `token_scale` is "auto".

Measured on a network trained on photographs and one trained on digits, at two budgets each
(`bench/results/token_scale.json`). The difference between outputs with and without token scales, relative to what the
reduction has changed: 1.3 % where the bound is 0.15 (alpha 0.1), 1.8 to 5.4 % at 0.32 (alpha 0.2), 6 to 12 % at 0.7
(alpha 0.4). No score differs by more than its noise.
"""


def log_scale_bound(
    grid: Sequence[int], kind: str, neighbors: int, alpha: float, counts: Sequence[int], some: bool = False
) -> float:
    """Return the most that log s of any token can be, where `counts[i]` patches are propagated at a stream's i-th site.

    grid: the stream's sides in patches, as `Grid.sides` has them.
    kind: a name in `gtp_fx.ops.token_graph.GRAPHS`.
    neighbors: M.
    some: the stream may hold only some of the grid's patches, so that one with a neighbour may have no other.

    A kept token j has d_j neighbours, each propagated at most once. From those propagated so far it has received

        s_j - 1  =  alpha Σ_i s_i / sqrt(d_j d_i)  <=  alpha n S / sqrt(d_j d_least)  <=  alpha sqrt(n / d_least) S

    Here n is the number of neighbours propagated so far (at most d_j, and at most all tokens propagated so far),
    d_least the smallest degree of all patches, and S a bound on the scales of the propagated tokens, which is this
    bound at the site before. Degrees: on a grid of R sides a patch has 3^R - 1 spatial neighbours, fewer at the border,
    and M semantic ones.
    """
    least, most = _degrees(grid, kind, neighbors)
    if some:
        least = 1 if kind == "spatial" else neighbors
    if least == 0:
        return 0.0
    scale, propagated = 1.0, 0
    for count in counts:
        propagated += count
        scale = 1.0 + alpha * math.sqrt(min(most, propagated) / least) * scale
    return math.log(scale)


def _degrees(grid: Sequence[int], kind: str, neighbors: int) -> tuple[int, int]:
    """Return the fewest and the most neighbours that a patch can have."""
    corner, inner = (math.prod(min(side, reach) for side in grid if side > 0) - 1 for reach in (2, 3))
    if kind == "spatial":
        return corner, inner
    if kind == "semantic":
        return neighbors, neighbors
    return max(neighbors, corner), min(neighbors + inner, math.prod(map(abs, grid)) - 1)
