"""Triton kernels for GTP's operators on a GPU, `torch.ops.gtp_fx_kernels.*`.

    token_graph       edges of the token graph: similarities, each token's most similar ones, degrees; no map in memory
    attend            attention that also scores its tokens and reads token scales; the map is never in memory
    attention_scores  scores of tokens, from the log-sum-exp that stock attention returns
    select            which tokens are kept, where they are on the grid, and a map of it, in one launch
    propagate         the shorter stream, its token scales and the next norm: each row adds the few rows it receives
    recover           the stream at full length, with the residual added

`gtp_fx.passes.lower.triton_kernels` inserts them. Nothing else imports these modules except `available`, since Triton
isn't installed everywhere. Each kernel is a triton_op, so Inductor sees its launches. The operators of `gtp_fx.ops` are
its reference and give its gradients. Each program owns what it stores: there are no atomics, and results are
reproducible. Without a GPU, TRITON_INTERPRET=1 runs the kernels as Python.
"""
