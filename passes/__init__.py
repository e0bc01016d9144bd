"""The passes: rewrites of a captured graph, one per file, in a folder per tier.

    exact/      change no number: one spelling, fused attention, no dead tokens
    reduce/     carry out a plan, approximately: tokens are removed or skip a branch
    lower/      replace operators by what the processor has, on graphs about to be compiled or run
    order.py    the list of passes in the order in which they run
    runner.py   runs them, verifies each, and accounts for it
    journal.py  records them in logs, traces and files

A pass is a function from a graph module to a new one; it never changes its input. Plans are made between the tiers
exact and reduce (`gtp_fx.plan.make_plan`). What users see, export and plan for is the graph before the tier lower.
"""

if __name__ != "gtp_fx.passes":
    raise ImportError("import this package as gtp_fx.passes: under another name its passes would exist twice")
