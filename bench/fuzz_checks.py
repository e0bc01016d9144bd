"""Checks of what holds for any vision transformer, budget and strategy: a correct result, or a refusal by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from bench.dynamo_door import CountingDoor, Door
from bench.fuzz_models import Architecture, RandomViT
from gtp_fx.report.token_flow import SiteView, token_flow

TOLERANCE = {"float32": 2e-4, "float64": 2e-4, "bfloat16": 4e-2}
"""Largest difference of outputs / largest output. Attention that scores tokens computes in float32 in every dtype."""
SWAPPED = {**TOLERANCE, "bfloat16": 0.15}
"""Tolerance where two roundings of the scores may select different tokens of nearly equal score."""


class Broken(AssertionError):
    """A check failed."""


@dataclass(frozen=True)
class Case:
    """A model and how to optimise it.

    architecture: the model.
    flops_budget: FLOPs budget; 1.0 applies only the exact passes.
    strategy: a name in `STRATEGIES`.
    batch: images per call.
    compiled: whether Inductor compiles the model too.
    """

    architecture: Architecture = field(default_factory=Architecture)
    flops_budget: float = 0.8
    strategy: str = "gtp"
    batch: int = 3
    compiled: bool = False


@torch.no_grad()
def check(case: Case) -> str:
    """Check a case and return the outcome: "reduced", "exact", or "refused: " and the reason.

    Raises Broken where a check fails, and any error of gtp_fx that isn't a refusal.
    """
    model = case.architecture.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = case.architecture.images(case.batch)
    wanted = model(x)
    try:
        fast = gtp_fx.optimize(model, **_options(case), example_inputs=x, compile=case.compiled)
    except gtp_fx.InternalError:
        raise
    except gtp_fx.GtpError as error:
        _unchanged(model, before, x, wanted)
        if case.architecture.broken:
            _in_pieces(model, case, x, wanted)
        else:
            _same_refusal(model, case, x, error)
        return f"refused: {type(error).__name__}: {error}"
    _unchanged(model, before, x, wanted)
    eager = fast.graph_module(x)
    _same_form(wanted, eager)
    limit, swapped = TOLERANCE[case.architecture.dtype], SWAPPED[case.architecture.dtype]
    removes_nothing = fast.schedule.removes_nothing
    if case.flops_budget == 1.0 or removes_nothing:
        _close(wanted, eager, limit, "budget 1.0 has to be exact")
    _counted(fast, case, x)
    _alone_as_in_a_batch(fast, x, eager, swapped)
    if case.architecture.broken:
        _in_pieces(model, case, x, wanted)
    elif not case.architecture.keeps:  # what Dynamo keeps is one of its outputs, which costs, and changes the schedule
        found, schedules = _through_dynamo(model, case, x)
        # Dynamo's graph is of this many images; where others stand beside them in a batch, so is their share of its
        # FLOPs, by which a budget may need another schedule.
        if not case.architecture.beside or schedules == [fast.schedule]:
            _close(found, eager, swapped, "the two doors")
    if case.compiled:
        _same_form(eager, fast(x))
        # In bfloat16, fused kernels round less than eager ones, so that other tokens may be selected.
        if x.dtype is not torch.bfloat16 or removes_nothing:
            _close(fast(x), eager, swapped, "compiled and eager")
    # In windows, tokens that skip a branch are still attended to, so that masking is no equivalent; and images that are
    # beside others in a batch have other tokens masked each.
    alike = not case.architecture.window and not case.architecture.beside
    if fast.sites and case.strategy == "gtp" and alike:
        _dropping_is_masking(model, case, swapped)
    return "exact" if removes_nothing else "reduced"


def _alone_as_in_a_batch(fast: gtp_fx.OptimizedModel, x: Tensor, eager: Any, limit: float) -> None:
    """Check that the second image gives the same output alone and in a batch.

    In bfloat16 a batch may round differently, and then select another token of nearly equal score. Outputs are compared
    only where the same tokens are selected.
    """
    alone, together = fast.graph_module(x[1:2]), pytree.tree_map(lambda t: t[1:2], eager)
    _same_form(together, alone)
    chosen = [[p.index[i].tolist() for p in fast.provenance(images)] for images, i in ((x[1:2], 0), (x, 1))]
    by_rounding = x.dtype is torch.bfloat16 and not fast.schedule.removes_nothing
    if by_rounding and (chosen[0] != chosen[1] or not fast.sites):
        return
    _close(alone, together, limit, "an image alone and in a batch")


def _options(case: Case) -> dict[str, Any]:
    """Return the options of a case, with a strategy that fits few patches and no prefix token."""
    strategy: Any = case.strategy
    prefix, patches = case.architecture.prefix, case.architecture.patches
    if strategy == "gtp" and patches <= 8:
        strategy = gtp_fx.GTP(neighbors=max(1, patches // 2))
    if not prefix and strategy in ("topk", "ppt", "mergence", "idle"):
        strategy = {
            "topk": gtp_fx.TopK,
            "ppt": gtp_fx.strategies.PPT,
            "mergence": gtp_fx.strategies.Mergence,
            "idle": gtp_fx.strategies.Idle,
        }[strategy](score="broadcast-mean")
    return {"flops_budget": case.flops_budget, "strategy": strategy}


def _unchanged(model: RandomViT, before: dict[str, Tensor], x: Tensor, wanted: Any) -> None:
    """Check that `optimize` left the original's parameters and output unchanged."""
    after = model.state_dict()
    if list(after) != list(before) or not all(torch.equal(after[name], before[name]) for name in before):
        raise Broken("optimize changed the model's parameters")
    _close(wanted, model(x), 0.0, "the model itself, before and after optimize")


def _same_refusal(model: RandomViT, case: Case, x: Tensor, error: gtp_fx.GtpError) -> None:
    """Check that the Dynamo backend refuses the model with an error of the same type."""
    try:
        _through_dynamo(model, case, x)
    except gtp_fx.GtpError as other:
        if type(other) is not type(error):
            raise Broken(f"the module's door refused ({error}), Dynamo's otherwise ({other})") from other
    else:
        raise Broken(f"the module's door refused ({error}), Dynamo's didn't")


def _through_dynamo(model: RandomViT, case: Case, x: Tensor) -> tuple[Any, list[gtp_fx.Schedule]]:
    """Return the output through the Dynamo backend, and the schedules. Raises its refusal where it refuses."""
    torch._dynamo.reset()
    door = Door(**_options(case))
    try:
        return torch.compile(model, backend=door)(x), [made.schedule for made in door.made]
    except Exception:
        if door.refused:
            raise door.refused[0] from None
        raise


def _in_pieces(model: RandomViT, case: Case, x: Tensor, wanted: Any) -> None:
    """Check the pieces into which Dynamo breaks a model: each within the budget by torch's own count, or refused."""
    torch._dynamo.reset()
    door = CountingDoor(keep_refused=True, **_options(case))
    found = torch.compile(model, backend=door)(x)
    if len(door.made) + len(door.refused) < 2:
        raise Broken("the graph has no break")
    for refused in door.refused:
        if isinstance(refused, gtp_fx.InternalError):
            raise refused
    _same_form(wanted, found)
    ratios = [ratio for made, ratio in door.counted if not made.schedule.removes_nothing]
    if not ratios:
        _close(wanted, found, TOLERANCE[case.architecture.dtype], "pieces that lose no tokens have to be exact")
    elif max(ratios) > case.flops_budget:
        raise Broken(f"pieces with {ratios} of their FLOPs, over the budget {case.flops_budget}")


def _same_form(wanted: Any, found: Any) -> None:
    """Check that two outputs have the same structure, shapes and dtypes, and that the second one is finite."""
    (theirs, their_form), (ours, our_form) = pytree.tree_flatten(wanted), pytree.tree_flatten(found)
    if their_form != our_form or [(t.shape, t.dtype) for t in theirs] != [(t.shape, t.dtype) for t in ours]:
        raise Broken(f"the output is {_told(found)}, the original's {_told(wanted)}")
    if not all(bool(t.isfinite().all()) for t in ours):
        raise Broken("the output isn't finite")


def _counted(fast: gtp_fx.OptimizedModel, case: Case, x: Tensor) -> None:
    """Check the report's FLOPs against torch's count, on meta, where every release counts attention."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(fast.graph_module).to("meta")(x[:1].to("meta"))
    total, ratio = counter.get_total_flops(), fast.report.flops_ratio
    if total != fast.report.flops_after:
        raise Broken(f"{fast.report.flops_after} FLOPs reported, torch counts {total}")
    if ratio > case.flops_budget:
        raise Broken(f"{ratio} of the FLOPs, over the budget {case.flops_budget}")


def _dropping_is_masking(model: RandomViT, case: Case, limit: float) -> None:
    """Check the result against an independent oracle: the original with removed tokens masked in its later blocks.

    With alpha 0 nothing is propagated, and without token scales each kept token counts once, so both are equivalent.
    """
    arch = case.architecture
    strategy = gtp_fx.GTP(alpha=0.0, token_scale=False, graph="spatial")
    fast = gtp_fx.optimize(
        model, flops_budget=case.flops_budget, strategy=strategy, example_inputs=arch.images(2), compile=False
    )
    if not fast.sites:
        return
    x = arch.images(1, seed=1)
    masked = torch.zeros(arch.prefix + arch.patches + arch.suffix, dtype=torch.bool)
    removed = {
        view.layer: view.removed
        for view in token_flow(fast.graph_module, fast.sites, fast.report.sites, x)
        if isinstance(view, SiteView)
    }
    oracle = copy.deepcopy(model)
    oracle.masked = []
    number_of = {site.layer: site.block for site in fast.report.sites}
    removed_at = {number_of[layer]: places for layer, places in zip(number_of, removed.values(), strict=True)}
    for number in range(arch.depth):
        oracle.masked.append(masked)
        if number in removed_at:
            masked = masked.index_fill(0, arch.prefix + removed_at[number], True)
    oracle.masked.append(masked)
    wanted, found = oracle(x), fast.graph_module(x)
    if arch.pool == "map":
        return  # the convolution reads restored tokens, which masking doesn't reproduce
    if arch.pool in ("all tokens", "tokens and logits"):
        wanted, found = (
            pytree.tree_map(lambda t: t[:, ~masked] if t.ndim == 3 else t, value) for value in (wanted, found)
        )
    _close(wanted, found, limit, "dropping tokens and masking them")


def _close(wanted: Any, found: Any, limit: float, what: str) -> None:
    """Check that two outputs differ by at most `limit` times the largest value (at least 1)."""
    for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True):
        error = float((a.double() - b.double()).abs().max())
        if not error <= limit * max(1.0, float(a.double().abs().max())):
            raise Broken(f"{what}: {error:.3g} apart, of values up to {float(a.double().abs().max()):.3g}")


def _told(value: Any) -> str:
    """Return dtypes and shapes of an output's tensors as text."""
    return str([f"{leaf.dtype}{list(leaf.shape)}" for leaf in pytree.tree_leaves(value)])
