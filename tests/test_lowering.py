"""Lowered graphs call kernels, and give the same numbers: run in Triton's interpreter where there is no GPU.

Same tolerance as the method's own tests: 1e-5 of the largest output, where a wrong option moves it by more than 1e-3.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import fx, nn

pytest.importorskip("triton")

import gtp_fx
from gtp_fx.kernels.available import has_kernels
from gtp_fx.passes.lower.triton_kernels import lower_to_kernels, lowered
from gtp_fx.strategies import Strategy

from zoo import BY_NAME, build, enliven, images

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def calls(gm: fx.GraphModule) -> Counter[str]:
    """How often each of our operators is called."""
    names = (str(node.target).removesuffix(".default") for node in gm.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if name.startswith("gtp_fx"))


@torch.no_grad()
def check(model: nn.Module, x: torch.Tensor, strategy: Strategy | str = "gtp", **budget: Any) -> Counter[str]:
    """Kernels that took operators' places, where the result is the same."""
    fast = gtp_fx.optimize(model.to(DEVICE), strategy=strategy, compile=False, **budget)
    plain = fast.graph_module
    before = calls(plain)
    kernels = lower_to_kernels(plain)
    assert calls(plain) == before, "a pass leaves its input alone"
    wanted, found = plain(x.to(DEVICE)), kernels(x.to(DEVICE))
    pairs = [(found, wanted)] if isinstance(found, torch.Tensor) else zip(found, wanted, strict=True)
    for one, other in pairs:
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    return calls(kernels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit", {}),
        ("siglip-map", {}),
        ("dinov2-reg4", {"graph": "spatial"}),
        ("clip", {"score": "cls-mean", "token_scale": False}),
        ("eva", {"graph": "semantic", "weighted_pooling": True, "alpha": 0.3}),
    ],
)
def test_a_plain_transformer(name: str, options: dict[str, Any]) -> None:
    """Two sites in a row, the block behind them told by token scales: no operator of a site is left."""
    row = BY_NAME[name]
    strategy = gtp_fx.GTP(**options)
    left = check(build(row), images(row, 1), strategy, schedule=[row.patches // 6, row.patches // 5, 0])
    told = 1 if strategy.token_scale else 0
    assert left["gtp_fx_kernels.attend"] >= 2 + told  # pooling by attention is one more
    assert (left["gtp_fx_kernels.select"], left["gtp_fx_kernels.propagate"]) == (2, 2)
    assert not left.keys() & {f"gtp_fx.{name}" for name in ("select", "propagate", "attention_with_scores", "key_bias")}
    graphs = [left[f"{place}.token_graph"] for place in ("gtp_fx_kernels", "gtp_fx")]
    assert graphs == ([0, 1] if strategy.graph == "spatial" else [1, 0])


def test_the_norm_behind_a_site_is_the_kernels() -> None:
    row = BY_NAME["deit"]
    fast = gtp_fx.optimize(build(row), schedule=[20, 20, 0], compile=False)
    norms = [
        sum(node.target is torch.ops.aten.layer_norm.default for node in gm.graph.nodes)
        for gm in (fast.graph_module, lower_to_kernels(fast.graph_module))
    ]
    assert norms[0] - norms[1] == 2


def test_a_token_map_is_recovered_by_a_kernel() -> None:
    row = BY_NAME["no-classes"]
    model = timm.create_model(row.arch, depth=3, num_classes=0, global_pool="")
    left = check(enliven(model).eval(), images(row, 1), schedule=[30, 30, 0])
    assert left["gtp_fx_kernels.recover"] == 2 and left["gtp_fx.recover"] == 0


def test_windows_choose_and_recover_by_kernels() -> None:
    """Shifted windows of a small Swin: places on the image, no grid that all share."""
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, depths=(2, 2), img_size=56, num_heads=(2, 4), embed_dim=32)
    left = check(enliven(model).eval(), torch.randn(1, 3, 56, 56), gtp_fx.GTP(branch="recover"), flops_budget=0.8)
    assert left["gtp_fx_kernels.select"] == left["gtp_fx_kernels.recover"] == 4
    assert left["gtp_fx.region_shares"] == left["gtp_fx.recover"] == 0


def test_what_no_kernel_is_made_for_stays() -> None:
    """theta needs whole maps in memory; so many neighbours, more registers. What reads them takes either's."""
    row = BY_NAME["vit"]
    strategy = gtp_fx.GTP(attention_sparsity=0.8, neighbors=33)
    left = check(build(row), images(row, 1), strategy, schedule=[20, 20, 0])
    assert left["gtp_fx.attention_with_scores"] == 3 and left["gtp_fx_kernels.attend"] == 0
    assert (left["gtp_fx.token_graph"], left["gtp_fx_kernels.token_graph"]) == (1, 0)


def test_thresholds_are_the_kernels() -> None:
    """Where they take the place of ranking maps, no map is needed."""
    row = BY_NAME["vit"]
    model, x = build(row), images(row, 1)
    exact = gtp_fx.optimize(model, schedule=[20, 20, 0], strategy=gtp_fx.GTP(attention_sparsity=0.8), compile=False)
    strategy = gtp_fx.GTP(attention_sparsity=0.8, thresholds=exact.attention_thresholds(x))
    left = check(model, x, strategy, schedule=[20, 20, 0])
    assert left["gtp_fx.attention_with_scores"] == 0 and left["gtp_fx_kernels.attend"] == 3


OTHERS: list[tuple[Strategy, list[int]]] = [
    (gtp_fx.ToMe(), [30, 20, 0]),
    (gtp_fx.TopK(), [30, 20, 0]),
    (gtp_fx.PPT(blocks=(0, 1)), [30, 20, 0]),
    (gtp_fx.Mergence(), [30, 20, 0]),
    (gtp_fx.Cluster(after=1), [0, 60, 0]),
    (gtp_fx.Idle(), [30, 20, 0]),
    (gtp_fx.Halting(beta=0.0), [30, 20, 0]),
    (gtp_fx.Saliency(), [60, 0, 0]),
    (gtp_fx.Random(), [30, 20, 0]),
]


@pytest.mark.parametrize(("strategy", "schedule"), OTHERS, ids=lambda value: getattr(value, "name", ""))
def test_other_strategies_have_what_kernels_they_can(strategy: Strategy, schedule: list[int]) -> None:
    """Attention that ranks is a kernel for any of them; what merges or drops by other weights stays as it is."""
    row = BY_NAME["deit"]
    left = check(build(row), images(row, 1), strategy, schedule=schedule)
    assert left["gtp_fx.attention_with_scores"] == 0
    assert left["gtp_fx_kernels.attend"] >= (strategy.score != "none") * sum(count > 0 for count in schedule)


def test_kernels_take_any_batch_and_gradients() -> None:
    row = BY_NAME["vit"]
    model, x = build(row).to(DEVICE), images(row, 3).to(DEVICE)
    fast = gtp_fx.optimize(model, schedule=[20, 0, 0], compile=False)
    kernels = lower_to_kernels(fast.graph_module)
    weight = model.blocks[0].attn.qkv.weight
    found, wanted = (torch.autograd.grad(run(x).square().sum(), weight)[0] for run in (kernels, fast))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_cpu_gets_no_kernels() -> None:
    row = BY_NAME["vit"]
    gm = gtp_fx.optimize(build(row), schedule=[20, 0, 0], compile=False).graph_module
    assert not has_kernels(torch.device("cpu")) and lowered(gm, torch.device("cpu")) is gm
