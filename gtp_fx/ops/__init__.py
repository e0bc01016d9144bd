"""GTP's operators, `torch.ops.gtp_fx.*`: the vocabulary of a rewritten graph.

    scores_of_map               scores of tokens by an attention map that is spelled out
    attention_with_scores       scaled dot-product attention that also scores its tokens
    attention_with_cell_scores  the same where keys are pooled
    select                      which patch tokens are kept, and which are removed
    token_graph                 which tokens are neighbours: built once, before the first block
    propagation_weights         the part of the normalised adjacency that a site needs
    propagate                   kept tokens plus what they receive from the propagated ones
    key_bias                    log token scale as attention's additive mask
    scale_channels              log token scale as channels of queries and keys
    attention_with_lse          torch's own attention with its log-sum-exp
    take_tokens                 an older value (a rotary table, a bias, a skip) for the remaining tokens
    recovery_weights            shares of the kept tokens in each recovered one
    attended_shares             the same by the attention that these pay the kept ones
    recover                     a newer value with its removed tokens back in place
    stand_ins                   which kept token stands for each patch
    put_back                    a stream of all tokens, updated at those that took part
    idle                        a branch's results, and nothing for the tokens that skipped it
    weighted_mean               average pooling in which a token is weighted by those it stands for
    region_shares               `recovery_weights` for a window's tokens that skip a branch
    grid_places                 rows and columns of a grid's patches
    window_activity             how much the tokens of each window differ, by which windows rest
    token_activity              how far each token is from its window's mean, by which tokens skip beside these
    awake_rows, window_ranks    where the windows that don't rest come from, and where they go back to
    rows_at                     the rows of these that go back
    pool_cells, cell_numbers    the cells of windows that rest, and which one each token is in
    cell_bias                   how many places each of these stands for, as attention's additive mask
    windows_without_padding     a stream's windows that may rest
    awake_of_padded             the windows that don't rest where some hold padding
    awake_patches               the patches in these
    pad_windows, crop_windows   patches to their windows with padding, and back
    group                       a strategy's `group`: which tokens are removed, and what becomes of them
    saliency                    a registered map of the images, averaged over each patch

Each is composite: it is written once, in plain ATen. That is its reference, its gradient and its fake implementation.
It is also its lowering, since Inductor and export see through it, unless one of the target's kernels replaces it.
Importing this package registers the operators, and tags what torch compiles with what they do (`code_tag.py`).

Shapes, here and in the modules: B images, H heads, N tokens of a stream (p prefix tokens, then n patch tokens), C
channels, K kept and P removed patch tokens, M semantic neighbours of a token, G patch tokens of the whole grid.
"""

from gtp_fx.ops import (
    attended_shares,
    attention,
    propagate,
    select,
    stock_attention,
)
from gtp_fx.ops import (
    padded_windows as padded,
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
    window_cells as resting_cells,
)
from gtp_fx.ops import (
    window_rest as rest,
)
from gtp_fx.ops import (
    window_shares as regions,
)
from gtp_fx.ops.code_tag import tag_compiled_code

__all__ = [
    "attended_shares",
    "attention",
    "cells",
    "graph",
    "levels",
    "padded",
    "pool",
    "propagate",
    "regions",
    "rest",
    "resting_cells",
    "select",
    "stock_attention",
]

tag_compiled_code()
