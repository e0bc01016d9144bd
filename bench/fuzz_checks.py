"""What has to hold for any vision transformer, at any budget, with any strategy: an exact answer, or a refusal by name."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import gtp_fx
from bench.dynamo_door import Door
from bench.fuzz_models import Architecture, RandomViT
from gtp_fx.report.token_flow import SiteView, token_flow

TOLERANCE = {"float32": 2e-4, "float64": 2e-4, "bfloat16": 4e-2}
"""Of outputs' size. Attention that ranks its tokens works in float32 whatever the model's dtype."""
SWAPPED = {**TOLERANCE, "bfloat16": 0.15}
"""The same where two ways of rounding choose tokens, of which some are as good as another."""


class Broken(AssertionError):
    """A promise that didn't hold."""


@dataclass(frozen=True)
class Case:
    """flops_budget: 1.0 asks for the exact passes alone. compiled: let Inductor compile it, too."""

    architecture: Architecture = field(default_factory=Architecture)
    flops_budget: float = 0.8
    strategy: str = "gtp"
    batch: int = 3
    compiled: bool = False


@torch.no_grad()
def check(case: Case) -> str:
    """What became of it: "reduced", "exact", or "refused: " and why. Raises Broken, or whatever gtp_fx shouldn't have raised."""
    model = case.architecture.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = case.architecture.images(case.batch)
    wanted = model(x)
    try:
        fast = gtp_fx.optimize(model, **_options(case), example_inputs=x, compile=case.compiled)
    except gtp_fx.GtpError as error:
        _unchanged(model, before, x, wanted)
        _same_refusal(model, case, x, error)
        return f"refused: {type(error).__name__}: {error}"
    _unchanged(model, before, x, wanted)
    eager = fast.graph_module(x)
    _same_form(wanted, eager)
    limit, swapped = TOLERANCE[case.architecture.dtype], SWAPPED[case.architecture.dtype]
    nothing_gone = fast.schedule.removes_nothing
    if case.flops_budget == 1.0 or nothing_gone:
        _close(wanted, eager, limit, "budget 1.0 has to be exact")
    _counted(fast, case, x)
    _alone_as_in_a_batch(fast, x, eager, swapped)
    _close(_through_dynamo(model, case, x), eager, swapped, "the two doors")
    if case.compiled:
        _same_form(eager, fast(x))
        if x.dtype is not torch.bfloat16 or nothing_gone:  # fused, it rounds less, and chooses by that
            _close(fast(x), eager, swapped, "compiled and eager")
    if fast.sites and case.strategy == "gtp" and not case.architecture.window:  # in windows tokens are still seen
        _dropping_is_masking(model, case, swapped)
    return "exact" if nothing_gone else "reduced"


def _alone_as_in_a_batch(fast: gtp_fx.OptimizedModel, x: Tensor, eager: Any, limit: float) -> None:
    """Of the second image. In bfloat16 a batch may round otherwise and choose another token, nearly as good: then the answer is another."""
    alone, together = fast.graph_module(x[1:2]), pytree.tree_map(lambda t: t[1:2], eager)
    _same_form(together, alone)
    chosen = [[p.index[i].tolist() for p in fast.provenance(images)] for images, i in ((x[1:2], 0), (x, 1))]
    by_rounding = x.dtype is torch.bfloat16 and not fast.schedule.removes_nothing
    if by_rounding and (chosen[0] != chosen[1] or not fast.sites):
        return
    _close(alone, together, limit, "an image alone and in a batch")


def _options(case: Case) -> dict[str, Any]:
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
    after = model.state_dict()
    if list(after) != list(before) or not all(torch.equal(after[name], before[name]) for name in before):
        raise Broken("optimize changed the model's parameters")
    _close(wanted, model(x), 0.0, "the model itself, before and after optimize")


def _same_refusal(model: RandomViT, case: Case, x: Tensor, error: gtp_fx.GtpError) -> None:
    try:
        _through_dynamo(model, case, x)
    except gtp_fx.GtpError as other:
        if type(other) is not type(error):
            raise Broken(f"the module's door refused ({error}), Dynamo's otherwise ({other})") from other
    else:
        raise Broken(f"the module's door refused ({error}), Dynamo's didn't")


def _through_dynamo(model: RandomViT, case: Case, x: Tensor) -> Any:
    torch._dynamo.reset()
    door = Door(**_options(case))
    try:
        return torch.compile(model, backend=door)(x)
    except Exception:
        if door.refused:
            raise door.refused[0] from None
        raise


def _same_form(wanted: Any, found: Any) -> None:
    (theirs, their_form), (ours, our_form) = pytree.tree_flatten(wanted), pytree.tree_flatten(found)
    if their_form != our_form or [(t.shape, t.dtype) for t in theirs] != [(t.shape, t.dtype) for t in ours]:
        raise Broken(f"the output is {_told(found)}, the original's {_told(wanted)}")
    if not all(bool(t.isfinite().all()) for t in ours):
        raise Broken("the output isn't finite")


def _counted(fast: gtp_fx.OptimizedModel, case: Case, x: Tensor) -> None:
    """As torch counts them, on meta, where every release counts attention."""
    with FlopCounterMode(display=False) as counter:
        copy.deepcopy(fast.graph_module).to("meta")(x[:1].to("meta"))
    total, ratio = counter.get_total_flops(), fast.report.flops_ratio
    if total != fast.report.flops_after:
        raise Broken(f"{fast.report.flops_after} FLOPs reported, torch counts {total}")
    if ratio > case.flops_budget:
        raise Broken(f"{ratio} of the FLOPs, over the budget {case.flops_budget}")


def _dropping_is_masking(model: RandomViT, case: Case, limit: float) -> None:
    """An oracle by other means: tokens that pass nothing on and count for one are as if the original's later blocks didn't see them."""
    arch = case.architecture
    strategy = gtp_fx.GTP(alpha=0.0, token_scale=False, graph="spatial")
    fast = gtp_fx.optimize(
        model, flops_budget=case.flops_budget, strategy=strategy, example_inputs=arch.images(2), compile=False
    )
    if not fast.sites:
        return
    x = arch.images(1, seed=1)
    gone = torch.zeros(arch.prefix + arch.patches + arch.suffix, dtype=torch.bool)
    leaving = {
        view.layer: view.left
        for view in token_flow(fast.graph_module, fast.sites, fast.report.sites, x)
        if isinstance(view, SiteView)
    }
    oracle = copy.deepcopy(model)
    oracle.masked = []
    number_of = {site.layer: site.block for site in fast.report.sites}
    left_at = {number_of[layer]: left for layer, left in zip(number_of, leaving.values(), strict=True)}
    for number in range(arch.depth):
        oracle.masked.append(gone)
        if number in left_at:
            gone = gone.index_fill(0, arch.prefix + left_at[number], True)
    oracle.masked.append(gone)
    wanted, found = oracle(x), fast.graph_module(x)
    if arch.pool == "map":
        return  # the convolution reads tokens that came back, which a mask doesn't say
    if arch.pool in ("all tokens", "tokens and logits"):
        wanted, found = (
            pytree.tree_map(lambda t: t[:, ~gone] if t.ndim == 3 else t, value) for value in (wanted, found)
        )
    _close(wanted, found, limit, "dropping tokens and masking them")


def _close(wanted: Any, found: Any, limit: float, what: str) -> None:
    for a, b in zip(pytree.tree_leaves(wanted), pytree.tree_leaves(found), strict=True):
        apart = float((a.double() - b.double()).abs().max())
        if not apart <= limit * max(1.0, float(a.double().abs().max())):
            raise Broken(f"{what}: {apart:.3g} apart, of values up to {float(a.double().abs().max()):.3g}")


def _told(value: Any) -> str:
    return str([f"{leaf.dtype}{list(leaf.shape)}" for leaf in pytree.tree_leaves(value)])
