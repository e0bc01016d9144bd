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
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.ops import aten  # type: ignore[import-not-found]

pytest.importorskip("triton")

import gtp_fx
from gtp_fx.kernels.available import has_kernels
from gtp_fx.kernels.stock_attention import StockAttention, stock_attention
from gtp_fx.passes.lower.triton_kernels import lowered, triton_kernels
from gtp_fx.report.kept_tokens import also_returning_kept
from gtp_fx.strategies import Strategy

from support.graphs_by_hand import traced
from support.zoo import BY_NAME, build, enliven, images, in_tiers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = stock_attention(torch.device(DEVICE))
HOPPER = StockAttention(("cudnn", "flash", "efficient", "math"), (9, 0), 91900)
AMPERE = StockAttention(("flash", "efficient", "math", "cudnn"), (8, 0), 91900)


def calls(gm: fx.GraphModule) -> Counter[str]:
    """How often each of our operators is called."""
    names = (str(node.target).removesuffix(".default") for node in gm.graph.nodes if node.op == "call_function")
    return Counter(name for name in names if name.startswith("gtp_fx"))


@torch.no_grad()
def check(
    model: nn.Module, x: torch.Tensor, strategy: Strategy | str = "gtp", told: str = "kernel", **budget: Any
) -> Counter[str]:
    """Return the kernels that replaced operators; the result has to be the same.

    told: how attention receives token scales; "kernel" leaves stock attention out.
    """
    fast = gtp_fx.optimize(model.to(DEVICE), strategy=strategy, compile=False, **budget)
    plain = fast.graph_module
    before = calls(plain)
    kernels = triton_kernels(plain, None if told == "kernel" else HERE, told)
    assert calls(plain) == before, "a pass leaves its input alone"
    wanted, found = plain(x.to(DEVICE)), kernels(x.to(DEVICE))
    pairs = [(found, wanted)] if isinstance(found, torch.Tensor) else zip(found, wanted, strict=True)
    for one, other in pairs:
        assert (one - other).abs().max() < 1e-5 * other.abs().max()
    return calls(kernels)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        pytest.param("deit", {}, "kernel", marks=pytest.mark.nightly),
        pytest.param("siglip-map", {}, "mask", marks=pytest.mark.nightly),
        pytest.param("dinov2-reg4", {"graph": "spatial"}, "channel", marks=pytest.mark.nightly),
        ("clip", {"score": "cls-mean", "token_scale": False}, "kernel"),
        pytest.param(
            "eva",
            {"graph": "semantic", "weighted_pooling": True, "alpha": 0.3},
            "kernel",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_a_plain_transformer(name: str, options: dict[str, Any], told: str) -> None:
    """Two sites in a row, the block behind them told by token scales: no operator of a site is left."""
    row = BY_NAME[name]
    strategy = gtp_fx.GTP(**{"token_scale": True, **options})
    left = check(build(row), images(row, 1), strategy, told, schedule=[row.patches // 6, row.patches // 5, 0])
    if told == "kernel" or DEVICE != "cpu":
        assert left["gtp_fx_kernels.attend"] >= 2 + bool(strategy.token_scale)  # pooling by attention is one more
    else:
        assert left["gtp_fx_kernels.attention_scores"] == 2
    assert (left["gtp_fx_kernels.select"], left["gtp_fx_kernels.propagate"]) == (2, 2)
    gone = ("select", "propagate", "attention_with_scores", *(("key_bias",) if told == "kernel" else ()))
    assert not left.keys() & {f"gtp_fx.{name}" for name in gone}
    graphs = [left[f"{place}.token_graph"] for place in ("gtp_fx_kernels", "gtp_fx")]
    assert graphs == ([0, 1] if strategy.graph == "spatial" else [1, 0])


@pytest.mark.skipif(DEVICE != "cpu", reason="stock attention takes no float32 on a GPU")
@pytest.mark.parametrize("told", in_tiers(["mask", "channel"], "channel"))
@pytest.mark.parametrize(
    "strategy", [gtp_fx.ToMe(), gtp_fx.strategies.PPT(blocks=(0, 1))], ids=lambda strategy: strategy.name
)
def test_stock_attention_scores_and_is_told_scales(strategy: Strategy, told: str) -> None:
    """By its log-sum-exp, with a mask or channels for scales: the first block is told none, the third doesn't score."""
    row = BY_NAME["deit"]
    left = check(build(row), images(row, 1), strategy, told, schedule=[30, 20, 0])
    scored = 0 if strategy.score == "none" else 2
    assert left["gtp_fx.attention_with_lse"] == left["gtp_fx_kernels.attention_scores"] == scored
    assert left["gtp_fx_kernels.attend"] == left["gtp_fx.attention_with_scores"] == 0
    assert left["gtp_fx.key_bias" if told == "mask" else "gtp_fx.scale_channels"] == 2


def kernels_in(gm: fx.GraphModule) -> list[str]:
    """Return, in the graph's order, which of torch's kernels returns a log-sum-exp and how it receives token scales.

    "composite" where no kernel applies.
    """
    found = []
    for node in gm.graph.nodes:
        if node.target is torch.ops.gtp_fx.attention_with_scores.default:
            found.append("composite")
        if node.target is torch.ops.gtp_fx.attention_with_lse.default:
            found.append(node.args[-1])
        elif node.op == "call_function" and "attend" in str(node.target):
            found.append("attend")
        elif node.target is torch.ops.aten.scaled_dot_product_attention.default:
            found.append("stock")
    return found


@pytest.mark.nightly
def test_the_form_is_what_the_device_has_at_speed() -> None:
    """cuDNN takes a mask; flash attention doesn't, and gets scales in channels; a kernel computes what neither does."""
    row = BY_NAME["deit"]
    paper = gtp_fx.GTP.paper()
    fast = gtp_fx.optimize(build(row).bfloat16(), schedule=[30, 20, 0], strategy=paper, compile=False).graph_module
    assert kernels_in(triton_kernels(fast, HOPPER)) == ["cudnn", "cudnn", "stock"]
    assert kernels_in(triton_kernels(fast, AMPERE)) == ["flash", "flash", "stock"]
    assert kernels_in(triton_kernels(fast, AMPERE, "kernel")) == ["flash", "attend", "attend"]
    assert kernels_in(triton_kernels(fast, AMPERE, "mask")) == ["flash", "flash", "stock"]
    assert kernels_in(triton_kernels(fast, HOPPER, "kernel")) == ["cudnn", "attend", "attend"]
    single = gtp_fx.optimize(build(row), schedule=[30, 20, 0], strategy=paper, compile=False).graph_module
    assert kernels_in(triton_kernels(single, HOPPER)) == ["attend"] * 3


def attention_of(
    tokens: int, head: int, dtype: torch.dtype, biased: bool = False, scale: float | None = None
) -> fx.GraphModule:
    """Attention that scores, that scores and is told scales, and that is told scales."""
    q = torch.empty(2, 3, tokens, head, dtype=dtype)
    bias = (torch.empty(3, tokens, tokens, dtype=dtype),) if biased else ()
    scored = torch.ops.gtp_fx.attention_with_scores

    def graph(q: torch.Tensor, scales: torch.Tensor, *bias: torch.Tensor) -> Any:
        mask = bias[0] if bias else None
        told = torch.ops.gtp_fx.key_bias(scales, 1, 0, mask, q)
        first = scored(q, q, q, mask, scale, 1.0, "mixed-max", 1, 0)
        second = scored(q, q, q, told, scale, 1.0, "mixed-max", 1, 0)
        return *first, *second, nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=told, scale=scale)

    return traced(graph, q, torch.empty(2, tokens - 1), *bias)


def test_what_stock_attention_does_not_take_is_a_kernel_or_stays() -> None:
    """float32, which stays above 256 keys; a bias; heads that are no multiple of 8, or too large for our kernels.

    Our kernel finds the largest logit before it scales, so its scale must be above 0.
    """
    half, single = torch.bfloat16, torch.float32
    assert kernels_in(triton_kernels(attention_of(40, 64, half), None)) == ["attend"] * 3
    for taken in (
        attention_of(256, 64, single),
        attention_of(40, 64, half, biased=True),
        attention_of(40, 20, half),
    ):
        assert kernels_in(triton_kernels(taken, HOPPER)) == ["attend"] * 3
    for left in (
        attention_of(257, 64, single),
        attention_of(40, 160, half),
        attention_of(40, 20, half, scale=0.0),
        attention_of(40, 20, half, scale=-0.125),
    ):
        assert kernels_in(triton_kernels(left, HOPPER)) == ["composite", "composite", "stock"]


def test_what_torch_would_choose() -> None:
    half, single = torch.bfloat16, torch.float32
    assert HOPPER.choice(64, 64, 197, half, masked=False) == HOPPER.choice(64, 64, 197, half, masked=True) == "cudnn"
    assert HOPPER.choice(72, 64, 197, half, masked=False) == "cudnn"
    assert HOPPER.choice(192, 192, 197, half, masked=False) == "flash"
    assert AMPERE.choice(64, 64, 197, half, masked=False) == "flash"
    nothing = [
        HOPPER.choice(64, 64, 197, single, masked=False),
        HOPPER.choice(60, 60, 197, half, masked=False),
        AMPERE.choice(64, 64, 197, half, masked=True),
        AMPERE.choice(72, 64, 197, half, masked=False),
        StockAttention(HOPPER.order, (7, 5), 91900).choice(64, 64, 197, half, masked=False),
        StockAttention(("efficient", "flash"), (9, 0), 91900).choice(64, 64, 197, half, masked=False),
    ]
    assert nothing == [None] * len(nothing)
    for without in (StockAttention(HOPPER.order, (9, 0), 0), StockAttention(HOPPER.order, (9, 0), 91900, True)):
        assert without.choice(64, 64, 197, half, masked=False) == "flash"
    assert HERE.choice(64, 64, 197, half, masked=False) == ("cpu" if DEVICE == "cpu" else torch_chooses())


def torch_chooses() -> str | None:
    """What torch itself answers on this GPU."""
    q = torch.empty(2, 3, 197, 64, dtype=torch.bfloat16, device=DEVICE)
    name = torch.nn.attention.SDPBackend(torch._fused_sdp_choice(q, q, q)).name
    return {"CUDNN_ATTENTION": "cudnn", "FLASH_ATTENTION": "flash"}.get(name)


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_compiler_traces_stock_attention_and_its_gradient(kernel: str) -> None:
    """Without a GPU: on fake tensors, whose shapes are those of the true kernels."""

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            q, k, v = x.unflatten(-1, (3, 2, 64)).permute(2, 0, 3, 1, 4)
            mask = x.new_zeros(2, 1, 1, 40) if kernel == "cudnn" else None
            out, lse = torch.ops.gtp_fx.attention_with_lse(q, k, v, mask, None, kernel)
            assert out.shape == (2, 2, 40, 64) and lse.shape == (2, 2, 40)
            return out.transpose(1, 2).reshape(2, 40, 128).sum(), lse

    with FakeTensorMode():
        x = torch.empty(2, 40, 384, dtype=torch.bfloat16, requires_grad=True)
        gm, _ = aot_export_module(Attention(), [x], trace_joint=True, output_loss_index=0)
    named = [str(node.target) for node in gm.graph.nodes if "scaled_dot_product" in str(node.target)]
    operator = f"aten._scaled_dot_product_{kernel}_attention"
    assert named == [f"{operator}.default", f"{operator}_backward.default"]


@pytest.mark.parametrize(
    ("name", "fewer"), in_tiers([("deit", (2, 2, 0)), ("dinov2-reg4", (2, 2, 2))], ("deit", (2, 2, 0)))
)
def test_the_add_before_a_site_and_the_norm_behind_it_are_the_kernels(name: str, fewer: tuple[int, ...]) -> None:
    """Of two sites: norms, adds, and LayerScale's products where there are any."""
    fast = gtp_fx.optimize(build(BY_NAME[name]), schedule=[20, 20, 0], strategy="gtp", compile=False)
    before, after = (
        Counter(node.target for node in gm.graph.nodes) for gm in (fast.graph_module, triton_kernels(fast.graph_module))
    )
    targets = (aten.layer_norm.default, aten.add.Tensor, aten.mul.Tensor)
    assert tuple(before[target] - after[target] for target in targets) == fewer


def test_an_add_that_others_read_stays() -> None:
    """What a token missed is added to the stream as it entered the site, which is written out for that."""
    row = BY_NAME["no-classes"]
    model = timm.create_model(row.arch, depth=3, num_classes=0, global_pool="")
    fast = gtp_fx.optimize(model, strategy=gtp_fx.GTP(recovery="update"), schedule=[30, 0, 0], compile=False)
    (site,) = (
        node
        for node in triton_kernels(fast.graph_module).graph.nodes
        if node.target is torch.ops.gtp_fx_kernels.propagate.default
    )
    stream, residual, *_ = site.args
    assert stream.target is aten.add.Tensor and residual is None and len(stream.users) > 1


@pytest.mark.nightly
def test_a_token_map_is_recovered_by_a_kernel() -> None:
    row = BY_NAME["no-classes"]
    model = timm.create_model(row.arch, depth=3, num_classes=0, global_pool="")
    left = check(enliven(model).eval(), images(row, 1), schedule=[30, 30, 0])
    assert left["gtp_fx_kernels.recover"] == 2 and left["gtp_fx.recover"] == 0


@pytest.mark.nightly
@torch.no_grad()
def test_reduced_outputs_are_told_of_beside_kernels() -> None:
    """What follows the tokens through all sites reads what kernels give, and is in no kernel's way."""
    row = BY_NAME["no-classes"]
    model = enliven(timm.create_model(row.arch, depth=3, num_classes=0, global_pool="")).eval().to(DEVICE)
    options = {"strategy": "gtp", "schedule": [30, 30, 0], "output": "reduced", "compile": False}
    fast, x = gtp_fx.optimize(model, **options), images(row, 1).to(DEVICE)
    told, _ = also_returning_kept(fast.graph_module, fast.sites, fast.returned)
    kernels = triton_kernels(told)
    left = calls(kernels)
    assert left["gtp_fx_kernels.select"] == left["gtp_fx_kernels.propagate"] == left["gtp_fx.stand_ins"] == 2
    assert not left.keys() & {"gtp_fx.select", "gtp_fx.propagate"}
    (wanted, *indices), (found, *same) = told(x), kernels(x)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert all(map(torch.equal, indices, same)) and len(indices) == 2


@pytest.mark.nightly
def test_windows_choose_and_recover_by_kernels() -> None:
    """Shifted windows of a small Swin: places on the image, no grid that all share."""
    torch.manual_seed(0)
    name = "swin_tiny_patch4_window7_224"
    model = timm.create_model(name, depths=(2, 2), img_size=56, num_heads=(2, 4), embed_dim=32)
    left = check(enliven(model).eval(), torch.randn(1, 3, 56, 56), gtp_fx.GTP(branch="recover"), flops_budget=0.8)
    assert left["gtp_fx_kernels.select"] == left["gtp_fx_kernels.recover"] == 4
    assert left["gtp_fx.region_shares"] == left["gtp_fx.recover"] == 0


@pytest.mark.nightly
def test_what_no_kernel_is_made_for_stays() -> None:
    """theta needs whole maps in memory; so many neighbours, more registers. What reads them takes either's."""
    row = BY_NAME["vit"]
    strategy = gtp_fx.GTP(attention_sparsity=0.8, neighbors=33)
    left = check(build(row), images(row, 1), strategy, schedule=[20, 20, 0])
    assert left["gtp_fx.attention_with_scores"] == 3 and left["gtp_fx_kernels.attend"] == 0
    assert (left["gtp_fx.token_graph"], left["gtp_fx_kernels.token_graph"]) == (1, 0)


OTHERS: list[tuple[Strategy, list[int]]] = [
    (gtp_fx.ToMe(), [30, 20, 0]),
    (gtp_fx.TopK(), [30, 20, 0]),
    (gtp_fx.strategies.PPT(blocks=(0, 1)), [30, 20, 0]),
    (gtp_fx.strategies.Mergence(), [30, 20, 0]),
    (gtp_fx.strategies.Cluster(after=1), [0, 60, 0]),
    (gtp_fx.strategies.Idle(), [30, 20, 0]),
    (gtp_fx.strategies.Halting(beta=0.0), [30, 20, 0]),
    (gtp_fx.strategies.Saliency(), [60, 0, 0]),
    (gtp_fx.strategies.Semantic(), [30, 20, 0]),
    (gtp_fx.strategies.Random(), [30, 20, 0]),
]


BY_DEFAULT = ("tome", "halting")
"""One that merges, and one that drops by what isn't attention."""


@pytest.mark.parametrize(
    ("strategy", "schedule"),
    in_tiers(OTHERS, *(other for other in OTHERS if other[0].name not in BY_DEFAULT)),
    ids=lambda value: getattr(value, "name", ""),
)
def test_other_strategies_have_what_kernels_they_can(strategy: Strategy, schedule: list[int]) -> None:
    """Attention that ranks is a kernel for any of them; what merges or drops by other weights stays as it is."""
    row = BY_NAME["deit"]
    left = check(build(row), images(row, 1), strategy, schedule=schedule)
    assert left["gtp_fx.attention_with_scores"] == 0
    assert left["gtp_fx_kernels.attend"] >= (strategy.score != "none") * sum(count > 0 for count in schedule)


@pytest.mark.nightly
def test_kernels_take_any_batch_and_gradients() -> None:
    row = BY_NAME["vit"]
    model, x = build(row).to(DEVICE), images(row, 3).to(DEVICE)
    fast = gtp_fx.optimize(model, schedule=[20, 0, 0], compile=False)
    kernels = triton_kernels(fast.graph_module, HERE)
    weight = model.blocks[0].attn.qkv.weight
    found, wanted = (torch.autograd.grad(run(x).square().sum(), weight)[0] for run in (kernels, fast))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_a_cpu_gets_no_kernels() -> None:
    row = BY_NAME["vit"]
    gm = gtp_fx.optimize(build(row), schedule=[20, 0, 0], compile=False).graph_module
    assert not has_kernels(torch.device("cpu")) and lowered(gm, torch.device("cpu")) is gm
