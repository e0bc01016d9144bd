"""GTP's operators, `torch.ops.gtp_fx.*`: the vocabulary of a rewritten graph.

    attention_with_scores   scaled dot-product attention that also ranks its tokens
    attention_with_cell_scores  the same where keys are pooled
    select                  which patch tokens are kept, which are propagated
    token_graph             who neighbours whom: built once, before the first block
    propagation_weights     the part of the normalised adjacency that a site needs
    propagate               kept tokens, plus what they receive from the propagated ones
    key_bias                log token scale, as attention's additive mask
    scale_channels          log token scale, as channels of queries and keys
    attention_with_lse      torch's own attention, with its log-sum-exp
    take_tokens             an older value (a rotary table, a bias, a skip) for the tokens that are left
    recovery_weights        of which kept tokens a propagated one is made up again
    weighted_mean           average pooling in which a token counts for those it stands for
    region_shares           the same for a window's tokens that skip a branch
    grid_places             rows and columns of a grid's patches
    put_back                a stream whose tokens wait in their places, with what became of the others
    group                   a strategy's `group`: who leaves, and what becomes of those
    saliency                what a registered map of the images says of each patch
    recover                 a newer value with its propagated tokens back in place

Each is composite: written once in plain ATen, which is its reference, its autograd, its fake and, where no kernel of the
target's takes its place, its lowering, since Inductor and export see through it. Importing this package registers them.

Shapes, here and in the modules: B images, H heads, N tokens of a stream (p prefix tokens, then n patch tokens), C channels,
K kept and P propagated patch tokens, M semantic neighbours of a token, G patch tokens of the whole grid.
"""

from gtp_fx.ops import (
    attention,
    propagate,
    select,
    stock_attention,
)
from gtp_fx.ops import (
    pooled_attention as cells,
)
from gtp_fx.ops import (
    take_recover as levels,
)
from gtp_fx.ops import (
    token_graph as graph,
)
from gtp_fx.ops import (
    weighted_mean as pool,
)
from gtp_fx.ops import (
    window_shares as regions,
)

__all__ = ["attention", "cells", "graph", "levels", "pool", "propagate", "regions", "select", "stock_attention"]
