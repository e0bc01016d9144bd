"""The order of the passes, which is defined here alone.

A pass is a function from a graph module to a new one; it never changes its input. `runner` runs the passes and verifies
each by recomputing the shapes of its result on fake tensors. The plan is made between the tiers "exact" and "reduce"
(`gtp_fx.plan.make_plan`), and the passes of "reduce" carry it out. Passes of "lower" run where a graph is compiled or
called; users see, export and plan for the graph before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.passes.exact.align_masks import align_masks
from gtp_fx.passes.exact.drop_dead_tokens import drop_dead_tokens
from gtp_fx.passes.exact.drop_trivial_masks import drop_trivial_masks
from gtp_fx.passes.exact.einsum_to_matmul import einsum_to_matmul
from gtp_fx.passes.exact.fold_views import fold_views
from gtp_fx.passes.exact.fuse_attention import fuse_attention
from gtp_fx.passes.exact.fuse_projections import fuse_projections
from gtp_fx.passes.exact.join_streams import join_streams
from gtp_fx.passes.exact.keys_apart import keys_apart
from gtp_fx.passes.exact.mark_blocks import mark_blocks
from gtp_fx.passes.exact.mark_frames import mark_frames
from gtp_fx.passes.exact.mark_outputs import mark_outputs
from gtp_fx.passes.exact.mark_tokens import mark_tokens
from gtp_fx.passes.exact.matmul_to_linear import matmul_to_linear
from gtp_fx.passes.exact.normalise import normalise
from gtp_fx.passes.exact.pointwise_convolutions import pointwise_convolutions
from gtp_fx.passes.exact.project_unpadded import project_unpadded
from gtp_fx.passes.exact.scatter_to_sum import scatter_to_sum
from gtp_fx.passes.exact.split_projections import split_projections
from gtp_fx.passes.exact.turn_streams import turn_streams
from gtp_fx.passes.exact.weights_first import weights_first
from gtp_fx.passes.lower.call_layers import call_layers
from gtp_fx.passes.lower.functional_linear import functional_linear
from gtp_fx.passes.lower.triton_kernels import triton_kernels
from gtp_fx.passes.reduce.remove_tokens import remove_tokens
from gtp_fx.passes.reduce.rest_windows import rest_windows
from gtp_fx.passes.reduce.skip_branches import skip_branches
from gtp_fx.plan.plan import Plan
from gtp_fx.strategies import Strategy
from gtp_fx.targets.target import Target

Tier = Literal["exact", "reduce", "lower"]
"""Tiers of passes.

exact: changes no number.
reduce: carries out the plan; the result is approximate.
lower: replaces operators by those of the processor; exact.
"""


@dataclass(frozen=True)
class Pass:
    """One pass.

    function: the rewrite; its name is the pass's.
    tier: the tier it belongs to.
    summary: what it does, in a line.
    optional: whether `disabled_passes` may name it.
    reads: its second argument: the strategy's `needs_full_maps` or `shortens_queries`, the option `prefix_tokens`,
        whether the option `output` is "reduced" (`as_left`), the target, the plan, or none.
    needed: whether a plan needs it; None where every plan does.
    """

    function: Callable[..., fx.GraphModule]
    tier: Tier
    summary: str
    optional: bool = False
    reads: Literal["", "needs_full_maps", "shortens_queries", "prefix_tokens", "as_left", "target", "plan"] = ""
    needed: Callable[[Plan], bool] | None = None

    @property
    def name(self) -> str:
        """The function's name."""
        return self.function.__name__

    @property
    def kind(self) -> str:
        """Kind in reports: "exact" or "approximate"."""
        return "approximate" if self.tier == "reduce" else "exact"


# What the order depends on: fuse_attention reads matmuls, so einsums become those first, and it tells heads from images
# by types, so tokens are marked before; mark_blocks finds attention by the fused operator; streams are turned where
# blocks are known; projections are split before dead tokens are dropped, so that each part can be cut separately, and
# linear layers are fused last, since only those that still read the same tokens can be.
ORDER = (
    Pass(normalise, "exact", "one spelling: no asserts, no copies, no dropout that is off"),
    Pass(
        mark_outputs,
        "exact",
        'with output="reduced", marks outputs as returned with the tokens left; changes nothing',
        reads="as_left",
    ),
    Pass(scatter_to_sum, "exact", "what is added to a part in place is added to all, with zeros", optional=True),
    Pass(
        drop_trivial_masks,
        "exact",
        "masks that hide nothing, added zeros and factors of one are removed",
        optional=True,
    ),
    Pass(einsum_to_matmul, "exact", "an einsum that is a matrix product becomes one", optional=True),
    Pass(matmul_to_linear, "exact", "a product with a parameter becomes a linear layer", optional=True),
    Pass(
        mark_tokens,
        "exact",
        "marks arguments and rows that are tokens, where no patches are made",
        optional=True,
        reads="prefix_tokens",
    ),
    Pass(mark_frames, "exact", "marks frames that nothing attends across as pictures; changes nothing", optional=True),
    Pass(
        pointwise_convolutions,
        "exact",
        "a convolution over tokens with a kernel of one becomes a linear layer",
        optional=True,
    ),
    Pass(weights_first, "exact", "v·wᵀ, where w is a softmax, becomes (w·vᵀ)ᵀ", optional=True),
    Pass(fuse_attention, "exact", "softmax(q·kᵀ)·v in its many spellings becomes the one operator", optional=True),
    Pass(
        align_masks,
        "exact",
        "a mask gets as many dimensions as its queries, as fused attention wants it",
        optional=True,
    ),
    Pass(mark_blocks, "exact", "marks attention blocks and their residual adds; changes nothing"),
    Pass(
        turn_streams,
        "exact",
        "residual streams are turned to [B, N, C], maps to [B, H, W, C]",
        optional=True,
    ),
    Pass(fold_views, "exact", "dimensions that are merged and taken apart again stay apart", optional=True),
    Pass(
        project_unpadded,
        "exact",
        "padding isn't projected: linear layers run before tokens are padded, and after padding is cropped",
        optional=True,
        reads="target",
    ),
    Pass(
        join_streams, "exact", "states of tokens in any layout, [S, B, N, C], become one of S·C features", optional=True
    ),
    Pass(
        keys_apart,
        "exact",
        "for a strategy that shortens queries alone, keys and values are computed apart from them",
        reads="shortens_queries",
    ),
    Pass(
        split_projections,
        "exact",
        "a joint q, k, v projection whose parts differ in liveness becomes several",
        optional=True,
        reads="needs_full_maps",
    ),
    Pass(
        drop_dead_tokens,
        "exact",
        "nothing is computed for tokens that no output depends on",
        optional=True,
        reads="needs_full_maps",
    ),
    Pass(
        fuse_projections,
        "exact",
        "on a GPU, linear layers that read the same tokens become one product",
        optional=True,
        reads="target",
    ),
    Pass(
        rest_windows,
        "reduce",
        "the plan's windows rest while a block runs for the others",
        reads="plan",
        needed=lambda plan: bool(plan.resting),
    ),
    Pass(
        skip_branches,
        "reduce",
        "the plan's tokens skip branches, where the grid has to stay whole",
        reads="plan",
        needed=lambda plan: bool(plan.skipping),
    ),
    Pass(
        remove_tokens,
        "reduce",
        "the plan's tokens are removed, and what follows is repaired",
        reads="plan",
        needed=lambda plan: bool(plan.removed) or plan.strategy.rewrites_every_attention,
    ),
    Pass(triton_kernels, "lower", "on a GPU, GTP's operators become Triton kernels", optional=True),
    Pass(call_layers, "lower", "an operator that is a layer's whole forward becomes a call of the layer"),
    Pass(
        functional_linear, "lower", "linear layers become torch.nn.functional.linear, which quantised weights override"
    ),
)
"""All passes, in the order in which they run."""


def of_tier(tier: Tier, plan: Plan | None = None) -> tuple[Pass, ...]:
    """Return the passes of one tier, in order; with a plan, only those that it needs."""
    found = (step for step in ORDER if step.tier == tier)
    return tuple(step for step in found if step.needed is None or plan is None or step.needed(plan))


def optional_passes() -> tuple[str, ...]:
    """Return the names that `disabled_passes` may contain."""
    return tuple(step.name for step in ORDER if step.optional)


def must_be_optional(names: Sequence[str]) -> None:
    """Check `disabled_passes`. Raises OptionError for a name that is no pass, or a pass that can't be left out."""
    known = optional_passes()
    if unknown := [name for name in names if name not in known]:
        raise OptionError(
            f"disabled_passes={unknown}: no such pass can be left out: give some of {', '.join(known)}"
            f"{did_you_mean(unknown[0], known)}"
        )


def bound(
    step: Pass,
    strategy: Strategy,
    plan: Plan | None = None,
    prefix_tokens: int | None = None,
    as_left: bool = False,
    target: Target | None = None,
) -> Callable[[fx.GraphModule], fx.GraphModule]:
    """Bind a pass's second argument; return a function of the graph alone."""
    given: dict[str, Any] = {
        "": (),
        "needs_full_maps": (strategy.needs_full_maps,),
        "shortens_queries": (strategy.shortens_queries,),
        "prefix_tokens": (prefix_tokens,),
        "as_left": (as_left,),
        "target": (target,),
        "plan": (plan,),
    }
    return lambda gm: step.function(gm, *given[step.reads])


def as_table() -> str:
    """Return the passes as a Markdown table, for the documentation."""
    rows = [f"| `{s.name}` | {s.tier} | {s.summary} | {'yes' if s.optional else 'no'} |" for s in ORDER]
    return "\n".join(["| pass | tier | what it does | may be left out |", "|---|---|---|---|", *rows])
