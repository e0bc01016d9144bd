"""The rules by family of operators; importing this package registers them all.

registry     what a rule is
broadcasting how types join
pointwise    element-wise operators, with broadcasting
contraction  linear, matmul, attention
layout       permutations, squeezing, expand
views        views, flattening
unfold       patches cut out by views, where grids are born too
ranges       select, slice, unbind, split: operators that take parts of an axis
joins        cat, stack, padding: operators that join along one
picks        gather, index_select, x[:, ids]: tokens picked by numbers
reduction    means over tokens, norms over channels
grids        rolling, flipping, padding and sampling a whole grid, folding it into channels
spatial      convolutions and pooling, where grids are born
einsum       products whose dimensions have names
random       dropout, and the random numbers of stochastic depth
"""

from gtp_fx.types.rules import (
    contraction,
    einsum,
    grids,
    joins,
    layout,
    picks,
    pointwise,
    random,
    ranges,
    reduction,
    spatial,
    views,
)

__all__ = [
    "contraction",
    "einsum",
    "grids",
    "joins",
    "layout",
    "picks",
    "pointwise",
    "random",
    "ranges",
    "reduction",
    "spatial",
    "views",
]
