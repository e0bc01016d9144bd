"""What torch's counter has a formula for counts the same here, on random shapes; what else multiplies is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.ops import aten  # type: ignore[import-not-found]
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

import gtp_fx
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_module
from gtp_fx.graph.operators import PRODUCTS_WITHOUT_FORMULA
from gtp_fx.model.pipeline import run_passes
from gtp_fx.options.options import Options
from gtp_fx.plan.cost.count import count_flops, uncounted
from gtp_fx.plan.cost.formulas import Sizes, by_running

from support.printed import in_one_line
from support.small_models import NAME, noise


def size(most: int = 6) -> int:
    return random.randint(2, most)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# ---- each operator of torch's registry


def product(batched: bool = False, added_to: bool = False) -> tuple[Any, ...]:
    b = [size()] * batched
    m, k, n = size(), size(), size()
    return (*([meta(*b, m, n)] if added_to else []), meta(*b, m, k), meta(*b, k, n))


def convolved(transposed: bool = False) -> tuple[Any, ...]:
    """Arguments of aten.convolution, and its result's shape."""
    groups, sides = size(3), (8 + size(), 8 + size())
    channels = (groups * size(), groups * size())
    first, second = channels
    weight = (first, second // groups) if transposed else (second, first // groups)
    args = [1 + size(2), size(2)], [size(2), 1], [1, 2], transposed, [1, 1] if transposed else [0, 0], groups
    return meta(size(), first, *sides), meta(*weight, 3, size(3)), None, *args


def attended(heads_last: bool = False, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    b, h, n, m, d = size(), size(), size(), size(), 8
    shapes = ((b, h, n, d), (b, h, m, d), (b, h, m, d))
    return tuple(meta(*((s[0], s[2], s[1], s[3]) if heads_last else s), dtype=dtype) for s in shapes)  # type: ignore[return-value]


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "mm": product,
    "addmm": lambda: product(added_to=True),
    "bmm": lambda: product(batched=True),
    "baddbmm": lambda: product(batched=True, added_to=True),
    "_scaled_mm": lambda: (
        meta(16 * size(), 32, dtype=torch.float8_e4m3fn),
        meta(16 * size(), 32, dtype=torch.float8_e4m3fn).t(),
        meta(),
        meta(),
    ),
    "convolution": lambda: convolved(random.random() < 0.5),
    "_convolution": lambda: (*convolved(random.random() < 0.5), False, False, False, False),
    "convolution_overrideable": lambda: convolved(random.random() < 0.5),
    "cudnn_convolution": lambda: (meta(2, 4, 8, 8), meta(6, 2, 3, size()), [1, 1], [1, 1], [1, 1], 2, *[False] * 3),
    "_scaled_dot_product_efficient_attention": lambda: (*attended(), None, False),
    "_scaled_dot_product_flash_attention": attended,
    "_scaled_dot_product_cudnn_attention": lambda: (*attended(), None, False),
    "_flash_attention_forward": lambda: (*attended(heads_last=True), None, None, 9, 9, 0.0, False, False),
    "flex_attention": lambda: (*attended(), None, (), 1.0, {}),
}
NOT_COMPARED = {
    r".*backward": "no graph here has gradients in it",
    r"_efficient_attention_forward": "torch's formula takes heads for tokens, and fails where they differ in number",
    r"_flash_attention_forward": "torch 2.11's formula does so too",
    r"_slow_conv2d_forward": "torch's formula wants arguments that this doesn't have; convolution calls it, unseen",
}


def node_calling(target: Any, args: tuple[Any, ...], result: Any) -> fx.Graph:
    graph = fx.Graph()

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"x{len(graph.nodes)}")
        node.meta["val"] = value
        return node

    node = graph.call_function(target, pytree.tree_map(placed, args))
    node.meta["val"] = result
    graph.output(node)
    return graph


@pytest.mark.parametrize("key", flop_registry, ids=str)
def test_every_operator_of_the_registry_counts_the_same(key: Any) -> None:
    name = str(key).rpartition(".")[2]
    excused = any(re.fullmatch(pattern, name) for pattern in NOT_COMPARED)
    if name not in CALLS:
        assert excused, f"torch has a formula for {name}: compare it in CALLS, or say in NOT_COMPARED why not"
        return
    random.seed(0)
    for _ in range(5):
        args = CALLS[name]()
        result = _result(name, args)
        try:
            wanted = flop_registry[key](*args, out_val=result)
        except AssertionError:
            assert excused
            return
        target = key if name == "flex_attention" else getattr(key, key.overloads()[0])
        graph = node_calling(target, args, result)
        assert count_flops(graph) == wanted > 0
        assert not uncounted(graph)


def _result(name: str, args: tuple[Any, ...]) -> Any:
    """A result of the right shape: a convolution's, computed on meta by the operator that can be, or a product's."""
    if "conv" in name:
        x, weight, *rest = args
        if name == "cudnn_convolution":
            return F.conv2d(x, weight, None, rest[1], rest[0], rest[2], rest[3])
        return aten.convolution(*args[:9])
    if "attention" in name:
        return None
    *_, a, b = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim > 1]
    return meta(*a.shape[:-1], b.shape[-1])


# ---- what models call, which decomposes into those


def plain(*shape: int) -> Tensor:
    return torch.randn(shape)


def convolution(rank: int, transposed: bool, dtype: torch.dtype = torch.float32) -> tuple[Callable[..., Tensor], Any]:
    """A convolution with random options, of a batch or a single image, and its arguments."""
    groups, stride, dilation = size(3), size(3), size(2)
    channels = groups * size(), groups * size()
    weight = (channels[0], channels[1] // groups) if transposed else (channels[1], channels[0] // groups)
    image = (*([size()] if random.random() < 0.7 else []), channels[0], *(7 + size() for _ in range(rank)))
    options: dict[str, Any] = {"stride": stride, "padding": 1, "dilation": dilation, "groups": groups}
    if transposed:
        options["output_padding"] = 1
    elif random.random() < 0.4:
        options |= {"stride": 1, "padding": "same"}
    function = getattr(F, f"conv_transpose{rank}d" if transposed else f"conv{rank}d")
    kernel = [size(4) for _ in range(rank)]
    args = torch.randn(image, dtype=dtype), torch.randn(*weight, *kernel, dtype=dtype)
    return lambda x, w: function(x, w, **options), args


def attention() -> tuple[Callable[..., Tensor], Any]:
    """Attention with fewer heads of keys, or with batches that broadcast."""
    heads, n, m, d = 2 * size(), size(), size(), size()
    way = random.choice(["plain", "grouped", "one query", "one key", "causal", "no heads"])
    batch, keys, options = size(), heads, {}
    if way == "grouped":
        keys, options = heads // 2, {"enable_gqa": True}
    if way == "causal":
        options = {"is_causal": True}
    q, k, v = plain(batch, heads, n, d), plain(batch, keys, m, d), plain(batch, keys, m, d + 1)
    if way == "one query":
        q = plain(1, heads, n, d)
    if way == "one key":
        k, v = plain(1, 1, m, d), plain(1, 1, m, d)
    if way == "no heads":
        q, k, v = q[0], k[0], v[0]
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), (q, k, v)


def ranks(first: int, second: int) -> tuple[Callable[..., Tensor], Any]:
    """matmul of operands of these ranks."""
    a, b, m, k, n = size(), size(), size(), size(), size()
    left = {1: (k,), 2: (m, k), 3: (b, m, k), 4: (a, b, m, k)}[first]
    right = {1: (k,), 2: (k, n), 3: (b, k, n), 4: (1, b, k, n)}[second]
    return torch.matmul, (plain(*left), plain(*right))


def einsum(equation: str) -> tuple[Callable[..., Tensor], Any]:
    sizes = {label: size() for label in "abcdefghijklmnw"}
    dots = (size(), size())
    shapes = [
        [s for part in re.findall(r"\.\.\.|.", term) for s in (dots if part == "..." else (sizes[part],))]
        for term in equation.partition("->")[0].split(",")
    ]
    return lambda *args: torch.ops.aten.einsum(equation, list(args)), tuple(plain(*shape) for shape in shapes)


EQUATIONS = (
    "bnd,bmd->bnm",
    "bhnm,bhmd->bnhd",
    "bnd,d->bn",
    "bnd,bnd->bn",
    "bnd,bnd->bnd",
    "ab,cd->abcd",
    "ab,bc,cd->ad",
    "ab,bc,cd,de->ae",
    "abc,bc->a",
    "bhwc,hkc->bhwk",
    "...ij,jk->...ik",
    "aab,bc->ac",
    "ij,jk",
    "bn->b",
)
MODELS: dict[str, Callable[[], tuple[Callable[..., Any], Any]]] = {
    **{f"conv{rank}d": lambda rank=rank: convolution(rank, False) for rank in (1, 2, 3)},  # type: ignore[misc]
    **{f"conv_transpose{rank}d": lambda rank=rank: convolution(rank, True) for rank in (1, 2, 3)},  # type: ignore[misc]
    "complex conv2d": lambda: convolution(2, False, torch.complex64),
    "complex conv_transpose2d": lambda: convolution(2, True, torch.complex64),
    "attention": attention,
    "linear": lambda: (F.linear, (plain(*(size() for _ in range(size(4) - 1)), 5), plain(3, 5), plain(3))),
    "baddbmm": lambda: (torch.baddbmm, (plain(1, 5), plain(2, 3, 4), plain(2, 4, 5))),
    "addmm": lambda: (torch.addmm, (plain(5), plain(3, 4), plain(4, 5))),
    **{f"matmul {a} {b}": lambda a=a, b=b: ranks(a, b) for a in range(1, 5) for b in range(1, 5)},  # type: ignore[misc]
    **{f"einsum {equation}": lambda equation=equation: einsum(equation) for equation in EQUATIONS},  # type: ignore[misc]
    "tensordot": lambda: (lambda a, b: torch.tensordot(a, b, dims=2), (plain(2, 3, 4), plain(3, 4, 5))),
    "multi_dot": lambda: (lambda *m: torch.linalg.multi_dot(m), (plain(2, 9), plain(9, 3), plain(3, 7))),
    "norms": lambda: (lambda x: F.layer_norm(x, x.shape[-1:]).softmax(-1), (plain(3, 4),)),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_models_call_counts_as_on_meta_and_on_a_cpu(name: str) -> None:
    for seed in range(12 if name in ("attention", "conv2d", "conv_transpose2d") else 3):
        random.seed(seed)
        function, args = MODELS[name]()
        graph = make_fx(function, pre_dispatch=True)(*args).graph
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as on_cpu:
            function(*args)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as on_meta:
            function(*(arg.to("meta") for arg in args))
        assert count_flops(graph) == on_cpu.get_total_flops() == on_meta.get_total_flops(), graph
        assert not uncounted(graph)


@pytest.mark.parametrize("layer", [nn.LSTM(6, 5, 2, bidirectional=True), nn.GRU(6, 5)], ids=["LSTM", "GRU"])
def test_recurrent_layers_count_their_products(layer: nn.Module) -> None:
    """As on meta: a CPU runs some of them as one operator without a formula."""
    x, graph = plain(7, 2, 6), make_fx(layer, pre_dispatch=True)(plain(7, 2, 6)).graph
    with FlopCounterMode(display=False) as counter:
        layer.to("meta")(x.to("meta"))
    assert count_flops(graph) == counter.get_total_flops() > 0


@pytest.mark.parametrize("equation", ["bnd,bmd->bnm", "bnd,de->bne", "bnd,bnd->bn"])
def test_a_count_by_running_takes_arrays_of_sizes(equation: str) -> None:
    """The price of every number of tokens at once: each as that number alone."""
    graph = make_fx(einsum(equation)[0], pre_dispatch=True)(*einsum(equation)[1]).graph
    (node,) = (node for node in graph.nodes if node.op == "call_function")
    operands = node.all_input_nodes

    def at(n: Any) -> Any:
        sizes = {"b": 2, "n": n, "m": n, "d": 3, "e": 4}
        terms = equation.partition("->")[0].split(",")
        return by_running(
            Sizes(node, {x: [sizes[label] for label in term] for x, term in zip(operands, terms, strict=True)}, ())
        )

    counts = np.arange(2, 9)
    assert np.broadcast_to(at(counts), counts.shape).tolist() == [at(int(n)) for n in counts]


# ---- what has no formula

_PRODUCT = re.compile(
    r"(.*mm|conv(?!ert).*|.*conv|linalg|rnn|gru|lstm|matmul|attention|linear|trilinear|solve|spsolve)"
)
NO_PRODUCTS = {
    "_linalg_check_errors",
    "linalg__powsum",
    "linalg_cross",
    "linalg_vector_norm",
    "_cslt_sparse_mm_search",  # tries out kernels
    "_cudnn_rnn_flatten_weight",
    "mkldnn_reorder_conv2d_weight",
    "mkldnn_reorder_conv3d_weight",
    "_thnn_fused_gru_cell",  # what is element-wise of a cell
    "_thnn_fused_lstm_cell",
}


def test_every_operator_that_sounds_like_a_product_is_known() -> None:
    """It has a formula, is written in others, or is in the list: a new one of torch's has to be put somewhere."""
    unknown = []
    for schema in torch._C._jit_get_all_schemas():
        namespace, _, name = schema.name.partition("::")
        if namespace != "aten" or name.endswith("_") or "backward" in name or name in NO_PRODUCTS:
            continue
        packet = getattr(aten, name, None)
        if packet is None or packet in flop_registry or name in PRODUCTS_WITHOUT_FORMULA:
            continue
        overload = getattr(packet, schema.overload_name or "default", None)
        words = [word for word in name.split("_") if not (name.startswith("upsample") and word == "linear")]
        if overload is not None and any(_PRODUCT.fullmatch(word) for word in words):
            unknown += [] if schema.overload_name.endswith("out") or overload._can_decompose() else [name]
    assert not unknown


class Extra(nn.Module):
    """A small ViT, and something else that is done to its scores."""

    def __init__(self, extra: nn.Module) -> None:
        super().__init__()
        self.model, self.extra = timm.create_model(NAME, depth=3), extra

    def forward(self, x: Tensor) -> Any:
        return self.extra(self.model(x))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(1000, 1000, 1)

    def forward(self, scores: Tensor) -> Tensor:
        return self.mix(scores, scores)  # type: ignore[no-any-return]


class Distances(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return torch.cdist(scores[:, None], scores[:, None])


@torch.library.custom_op("gtp_fx_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return x @ x.new_ones(x.shape[-1], x.shape[-1])


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Opaque(nn.Module):
    def forward(self, scores: Tensor) -> Tensor:
        return opaque(scores)


class Routed(nn.Module):
    """An expert for the images that a gate sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(1000, 1000)

    def forward(self, scores: Tensor) -> Tensor:
        sent = (scores[:, 0] > 0).nonzero()[:, 0]
        return scores.index_add(0, sent, self.expert(scores[sent]))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (Bilinear, r"aten\.bilinear\.default: aten._trilinear.default has no formula"),
        (Distances, r"aten\._(euclidean_dist|cdist_forward)\.default has no formula"),
        (Opaque, r"gtp_fx_tests\.opaque\.default: gtp_fx_tests\.opaque\.default has no formula"),
        pytest.param(
            Routed,
            r"aten\.linear\.default: how many it multiplies depends on what tensors hold",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_what_has_no_formula_is_not_free(extra: Callable[[], nn.Module], named: str) -> None:
    """A budget can't be kept, and is refused; without one, or where nothing leaves, the report says what isn't counted.

    With a formula in torch's registry it is counted.
    """
    gm = capture_module(Extra(extra()).eval(), call_signature(Extra(extra()).eval(), noise(2)), training=False)
    with pytest.raises(gtp_fx.UnsupportedModelError, match=rf"flops_budget=0.8 can't be kept(?s:.*){named}"):
        run_passes(gm, Options.of(flops_budget=0.8))
    for asked in ({"flops_budget": 1.0}, {"schedule": [20, 0, 0]}):
        assert re.search(named, in_one_line(str(run_passes(gm, Options.of(**asked)).report)))


def test_a_formula_that_a_user_registers_counts() -> None:
    model = Extra(Opaque()).eval()
    gm = capture_module(model, call_signature(model, noise(2)), training=False)
    before = count_flops(gm.graph)
    try:
        register_flop_formula(torch.ops.gtp_fx_tests.opaque)(lambda x, **_: 2 * x[0] * x[1] * x[1])
        assert count_flops(gm.graph) == before + 2 * 1000 * 1000
        assert run_passes(gm, Options.of(flops_budget=0.8)).report.flops_ratio <= 0.8
    finally:
        del flop_registry[torch.ops.gtp_fx_tests.opaque]
