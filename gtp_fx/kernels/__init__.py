"""Triton kernels for GTP's operators, `torch.ops.gtp_fx_kernels.*`: what a graph calls instead of them on a GPU.

    token_graph who neighbours whom: similarities, the most similar of each, and degrees; no map of it in memory
    attend      attention that also ranks its tokens and knows their scales; the map is never in memory
    attention_scores  how attention ranks its tokens, from the log-sum-exp that stock attention returns
    select      which tokens stay, where they are on the grid, and a map of it, in one launch
    propagate   the shorter stream, its token scales and the norm behind: each row adds the few rows that it receives
    recover     the stream as it was, with the residual added

`gtp_fx.passes.lower.triton_kernels` puts them in; nothing else imports these modules (but for `available`), since Triton isn't installed everywhere. Each is a
triton_op, so Inductor sees the launches, and has the operators of `gtp_fx.ops` as its reference and for its gradients. A program owns
what it stores: no atomics, the same result every time. Without a GPU, TRITON_INTERPRET=1 runs them as Python.
"""
