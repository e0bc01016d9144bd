"""Tokens that skip their attention's queries and projection too, by the scores of the block before, against the same by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_windows
import torch
from test_windows import Family, Skips, error, family, from_timm, marked, tensors
from torch import nn
from torch.ops import aten

import gtp_fx
from bench.dynamo_door import Door
from bench.live_weights import enliven
from gtp_fx.passes.find_blocks import read_blocks
from gtp_fx.passes.insert_branches import insert_branches

import reference_windows as oracles
from reference_windows import ByHand

TWO = from_timm("swin_tiny_patch4_window7_224", img_size=56, depths=(2,), num_heads=(2,), embed_dim=32)
ATTENTION = gtp_fx.GTP(skips="attention", branch="recover")


def of(name: str) -> Family:
    return next(family for family in test_windows.FAMILIES if family.name == name)


LONG = family(
    "swin of three blocks",
    oracles.swin,
    from_timm("swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(3, 2), num_heads=(2, 4), embed_dim=32),
    (56, 84),
    {
        f"layers.{stage}.blocks.{block}": count
        for stage, block, count in [(0, 0, 0), (0, 1, 26), (0, 2, 20), (1, 0, 30), (1, 1, 44)]
    },
)
FAMILIES = [
    test_windows.SWIN,
    LONG,
    test_windows.PADDED,
    test_windows.TORCHVISION,
    test_windows.HF_SWIN,
    test_windows.SAM,
    test_windows.TWINS,
    *map(of, ("swin v2", "transformers SAM", "transformers ViTDet", "maxvit", "hiera")),
]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def lenders_of(family: Family, report: Any) -> dict[str, str]:
    """By block's name, the block that lends it scores, as the report says."""
    names = list(family.blocks)
    return {names[row.block]: names[row.lender] for row in report.sites if row.lender is not None}


def by_hand(family: Family, model: nn.Module, fast: Any, idle: bool = False) -> ByHand:
    return ByHand(model, family.oracle(model), family.blocks, idle, lenders_of(family, fast.report))


@every_family
@torch.no_grad()
def test_equals_the_same_by_hand(family: Family) -> None:
    """On another batch than it was captured with."""
    model, x = family.model(), family.inputs(batch=3)
    options: dict[str, Any] = {"schedule": family.schedule, "example_inputs": family.inputs(), "compile": False}
    fast = gtp_fx.optimize(model, strategy=ATTENTION, **options)
    mlp = gtp_fx.optimize(model, **options)
    assert lenders_of(family, fast.report), "no block's attention is partial"
    wanted = by_hand(family, model, fast)(x)
    assert error(fast(x), wanted) < 1e-5
    assert error(mlp(x), wanted) > 1e-4, "an attention that is skipped and changes nothing proves nothing"


@every_family
@torch.no_grad()
def test_where_no_token_skips_the_numbers_are_the_models(family: Family) -> None:
    """All that is inserted, and as many queries as there are tokens."""
    model, x = family.model(), family.inputs(batch=3)
    gm = marked(family)
    indices = [block.index for block in read_blocks(gm) if block.branch is not None]
    plan: Any = Skips(dict.fromkeys(indices, 0), ATTENTION)
    whole = insert_branches(gm, plan)
    assert sum(n.target is torch.ops.gtp_fx.recover.default for n in whole.graph.nodes) > len(indices)
    made = [leaf for leaf in torch.utils._pytree.tree_leaves(whole(x)) if isinstance(leaf, torch.Tensor)]
    for a, b in zip(made, tensors(model(x)), strict=True):
        assert ((a - b).abs().max() / b.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["swin", "swin v2", "samvit"])
@torch.no_grad()
def test_idle_tokens_keep_the_residual_alone(name: str) -> None:
    family = of(name)
    model, x = family.model(), family.inputs()
    strategy = gtp_fx.GTP(skips="attention")
    fast = gtp_fx.optimize(model, schedule=family.schedule, strategy=strategy, example_inputs=x, compile=False)
    assert error(fast(x), by_hand(family, model, fast, idle=True)(x)) < 1e-5
    assert error(fast(x), by_hand(family, model, fast)(x)) > 1e-4


@torch.no_grad()
def test_blocks_take_turns_and_the_report_says_where() -> None:
    """The third block ranks for itself again; the first is scored for the second alone, which has to be priced, too."""
    options: dict[str, Any] = {"strategy": ATTENTION, "example_inputs": LONG.inputs(), "compile": False}
    fast = gtp_fx.optimize(LONG.model(), schedule=LONG.schedule, **options)
    assert [(row.block, row.lender) for row in fast.report.sites] == [(1, 0), (2, None), (3, None), (4, 3)]
    assert "attention and branch, in each of 6 windows, by block 0's scores" in str(fast.report)
    both = gtp_fx.optimize(LONG.model(), schedule=[1, *LONG.schedule[1:]], **options)
    alone = gtp_fx.optimize(LONG.model(), schedule=[1, 0, *LONG.schedule[2:]], **options)
    # run_passes asserts that each of them has the FLOPs that it was planned with.
    assert both.report.flops_after - alone.report.flops_after < 0


@pytest.mark.parametrize(
    ("name", "narrower"),
    [
        ("swin", True),
        ("swin v2", True),
        (test_windows.HF_SWIN.name, True),
        ("transformers ViTDet", True),
        ("samvit", False),
    ],
)
@torch.no_grad()
def test_queries_of_kept_tokens_alone(name: str, narrower: bool) -> None:
    """A fused projection makes keys and values of all tokens, and queries of some; SAM's biases are made of all queries."""
    family = of(name)
    gm = marked(family)
    indices = [block.index for block in read_blocks(gm) if block.branch is not None]
    partial = insert_branches(gm, Skips(dict.fromkeys(indices, 4), ATTENTION))  # type: ignore[arg-type]

    def of_parts(graph: Any) -> int:
        weights = [n.args[1] for n in graph.nodes if n.target is aten.linear.default]
        return sum(w.target is aten.slice.Tensor for w in weights)

    assert of_parts(partial.graph) == (2 if narrower and family is not test_windows.HF_SWIN else 0)


@torch.no_grad()
def test_a_budget_holds_and_reaches_lower() -> None:
    model, x = test_windows.SWIN.model(), test_windows.SWIN.inputs()
    fast = gtp_fx.optimize(model, flops_budget=0.7, strategy=ATTENTION, example_inputs=x, compile=False)
    assert fast.report.flops_ratio <= 0.7
    lowest = []
    for strategy in (gtp_fx.GTP(), ATTENTION):
        with pytest.raises(gtp_fx.BudgetError, match="the lowest ratio") as refused:
            gtp_fx.optimize(model, flops_budget=0.01, strategy=strategy, example_inputs=x, compile=False)
        lowest.append(str(refused.value))
    assert lowest[0] != lowest[1]


@torch.no_grad()
def test_both_doors_agree_at_any_batch() -> None:
    torch._dynamo.reset()
    family = test_windows.SWIN
    model = family.model()
    asked: dict[str, Any] = {"schedule": family.schedule, "strategy": ATTENTION}
    fast = gtp_fx.optimize(model, example_inputs=family.inputs(), compile=False, **asked)
    door = Door(**asked)
    compiled = torch.compile(model, backend=door, fullgraph=True)
    for batch in (2, 5, 1):
        x = family.inputs(batch)
        torch.testing.assert_close(compiled(x), fast(x), rtol=1e-5, atol=1e-5)
    assert all(any(row.lender is not None for row in made.report.sites) for made in door.made)


@torch.no_grad()
def test_compiled_it_says_the_same() -> None:
    family = Family(
        "swin", TWO, lambda _: oracles.swin, {"layers.0.blocks.0": 20, "layers.0.blocks.1": 26}, (3, 56, 56)
    )
    model, x = family.model(), family.inputs()
    options: dict[str, Any] = {"schedule": family.schedule, "strategy": ATTENTION, "example_inputs": x}
    fast, eager = (gtp_fx.optimize(model, compile=compiled, **options) for compiled in (True, False))
    assert error(fast(x), eager(x)) < 1e-5


class ReadsHeads(nn.Module):
    """An output projection with a second reader of what it is given."""

    def __init__(self, proj: nn.Module) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) * x.sigmoid()


def gated(make: Callable[[], Any]) -> Any:
    model = make()
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.proj = ReadsHeads(block.attn.proj)
    return enliven(model).eval()


@torch.no_grad()
def test_what_cannot_be_followed_falls_back_by_name() -> None:
    x = torch.randn(1, 3, 56, 56)
    fast = gtp_fx.optimize(gated(TWO), schedule=[10, 10], strategy=ATTENTION, example_inputs=x, compile=False)
    assert [row.lender for row in fast.report.sites] == [None, None]
    (refusal,) = fast.report.refusals
    assert refusal.layer == "layers.0.blocks.1.attn"
    assert "and not this attention" in refusal.reason and "read by something else" in refusal.reason


def test_option_values_that_are_refused() -> None:
    with pytest.raises(gtp_fx.OptionError, match="'attention'"):
        gtp_fx.GTP(skips="everything")
    with pytest.raises(gtp_fx.OptionError, match="attention_sparsity ranks whole maps"):
        gtp_fx.GTP(skips="attention", attention_sparsity=0.5)
