"""The passes, in the order they run.

    pass                  tier          what it does
    normalise             exact         one spelling: no asserts, no copies, no dropout that is off
    drop_trivial_masks        exact         what depends on no input is computed once; masks that hide nothing go
    einsum_to_matmul          exact         an einsum that is a matrix product becomes one
    fuse_attention       exact         softmax(q·kᵀ)·v in its many spellings becomes the one operator
    mark_blocks           exact         marks attention blocks and their residual adds; changes nothing
    split_projections     exact         a fused q/k/v projection whose parts differ in liveness becomes several
    drop_dead_tokens      exact         computes nothing for tokens that no output depends on
    fuse_projections      exact         linear layers that read the same tokens become one product
    skip_branches       approximate   lets the plan's tokens skip branches, where the grid has to stay whole
    remove_tokens    approximate   lets the plan's tokens leave, and repairs what follows
    triton_kernels      exact         on a GPU, GTP's operators become Triton kernels
    functional_linear        exact         linear layers become calls that a quantised weight answers

Between the tiers stands the plan (`gtp_fx.plan.make_plan`): the approximate passes carry it out. The last two run where a graph is compiled on a
GPU (`gtp_fx.passes.lower.triton_kernels.lowered`) and where a module runs it; users see what it was before. Every pass is a function
from a graph module to a new one; the shapes of the result are recomputed by running it on fake tensors before the next pass (but for
mark_blocks, which changes none).
"""

if __name__ != "gtp_fx.passes":
    raise ImportError("import this package as gtp_fx.passes: under another name its passes would exist twice")
