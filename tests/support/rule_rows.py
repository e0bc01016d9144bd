"""One row or more for every operator that has a rule: a function of a token stream that calls it, and what comes of it.

x, the stream [B, 2 + 12, 8], is a CLS token, a register and the patches of a grid of 4 x 3, behind a site where patches
leave. Other arguments, by name: `old`, the stream before that site, and `memory`, the same where nothing pairs it with
x; `table` [14, 8] and `bias` [2, 14, 14], which hold something for every token of the whole stream; `w` [8, 8], which
doesn't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.ops import aten

STREAM = "B, 2+n1, 8"
"""The type of x behind its site: images; CLS, register and the patches at level 1; channels.

The sides of the patches' grid are g0 and g1. Those of another grid are h0 and h1, and its patches m0. g0/2by2 is a part
of a side: 2 places, 2 apart.
"""


@dataclass(frozen=True, eq=False)
class Row:
    """What the rule of `operator` must say where `function` calls it last.

    typed: the type of its output. reason: why tokens must come back for it, "" where they needn't. reads: whether the
    result is the function's of the tokens "left", or of the "whole" stream made up again, or what that holds for the
    "kept". wrong: a defect, and in which tests it shows: "types", "numbers", "unchanged", "leading".
    """

    operator: Any
    function: Callable[..., Tensor]
    typed: str
    reason: str = ""
    reads: str = ""
    wrong: str = ""
    shows: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", self.reads or ("whole" if self.reason else "left"))


@dataclass(frozen=True, eq=False)
class Refused:
    """Where tokens that must come back can't: the rule's reason, and the plan's for refusing. wrong: as in `Row`."""

    operator: Any
    function: Callable[..., Tensor]
    reason: str
    refusal: str
    wrong: str = ""


def heads(x: Tensor) -> Tensor:
    """[B, N, 8] -> [B, 2, N, 4]"""
    return x.unflatten(2, (2, 4)).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """[B, N, 8] -> [B*N, 8]"""
    return x.reshape(x.shape[0] * x.shape[1], 8)


def kernel(w: Tensor, *sides: int) -> Tensor:
    """A convolution's weight from a linear layer's: [8, 8, *sides], the same everywhere."""
    return w.reshape(8, 8, *(1 for _ in sides)).expand(8, 8, *sides)


# ---- pointwise

NAMES = """
abs alias clone contiguous cos detach elu erf exp expm1 gelu hardsigmoid hardswish hardtanh leaky_relu lift_fresh_copy
log log1p logical_not mish neg ones_like reciprocal relu relu6 rsqrt selu sigmoid sign silu sin softplus sqrt square
tanh zeros_like _to_copy
"""
OF_ONE = [getattr(aten, name).default for name in NAMES.split()]

WITH_MORE: dict[Any, Callable[..., Tensor]] = {
    aten.add.Scalar: lambda op, x: op(x, 0.5),
    aten.bitwise_not.default: lambda op, x: op(x > 0),
    aten.clamp.default: lambda op, x: op(x, -0.5, 0.5),
    aten.clamp_min.default: lambda op, x: op(x, 0.1),
    aten.div.Scalar: lambda op, x: op(x, 0.3),
    aten.dropout.default: lambda op, x: op(x, 0.5, True),
    aten.eq.Scalar: lambda op, x: op(x.sign(), 1),
    aten.full_like.default: lambda op, x: op(x, 0.3),
    aten.ge.Scalar: lambda op, x: op(x, 0.1),
    aten.gt.Scalar: lambda op, x: op(x, 0.1),
    aten.le.Scalar: lambda op, x: op(x, 0.1),
    aten.lt.Scalar: lambda op, x: op(x, 0.1),
    aten.mul.Scalar: lambda op, x: op(x, 0.3),
    aten.ne.Scalar: lambda op, x: op(x.sign(), 1),
    aten.pow.Scalar: lambda op, x: op(2, x),
    aten.pow.Tensor_Scalar: lambda op, x: op(x, 2),
    aten.rsub.Scalar: lambda op, x: op(x, 0.5),
    aten.sub.Scalar: lambda op, x: op(x, 0.5),
    aten.to.device: lambda op, x: op(x, "cpu", torch.float64),
    aten.to.dtype: lambda op, x: op(x, torch.float64),
    aten.to.dtype_layout: lambda op, x: op(x, dtype=torch.float64),
}

OF_TWO: dict[Any, Callable[..., Tensor]] = {
    aten.bitwise_and.Tensor: lambda op, x, y: op(x > 0, y > 0),
    aten.bitwise_or.Tensor: lambda op, x, y: op(x > 0, y > 0),
    aten.complex.default: lambda op, x, y: op(x, y).abs(),
    aten.div.Tensor_mode: lambda op, x, y: op(x, y, rounding_mode="floor"),
    aten.eq.Tensor: lambda op, x, y: op(x.sign(), y.sign()),
    aten.masked_fill.Scalar: lambda op, x, y: op(x, y > 0, 0.5),
    aten.polar.default: lambda op, x, y: op(x.abs(), y).abs(),
    aten.pow.Tensor_Tensor: lambda op, x, y: op(x.abs(), y),
    aten.where.ScalarOther: lambda op, x, y: op(y > 0, x, 0.5),
    aten.where.ScalarSelf: lambda op, x, y: op(y > 0, 0.5, x),
    aten.where.self: lambda op, x, y: op(x > 0, x, y),
    **dict.fromkeys(
        (
            aten.add.Tensor,
            aten.div.Tensor,
            aten.ge.Tensor,
            aten.gt.Tensor,
            aten.le.Tensor,
            aten.logical_and.default,
            aten.logical_or.default,
            aten.lt.Tensor,
            aten.maximum.default,
            aten.minimum.default,
            aten.mul.Tensor,
            aten.sub.Tensor,
        ),
        lambda op, x, y: op(x, y),
    ),
}


def pointwise() -> Iterator[Row]:
    """Results as float32: truth values can't be made up again where the model returns them."""
    for op in OF_ONE:
        yield Row(op, lambda x, op=op: op(x.abs() + 0.1).to(torch.float32), STREAM)
    for op, function in WITH_MORE.items():
        yield Row(op, lambda x, op=op, f=function: f(op, x).to(torch.float32), STREAM)
    for op, function in OF_TWO.items():
        yield Row(op, lambda x, table, op=op, f=function: f(op, x, table).to(torch.float32), STREAM)
    yield Row(aten.masked_fill.Tensor, lambda x, table, w: aten.masked_fill.Tensor(x, table > 0, w[0, 0]), STREAM)
    yield Row(aten.type_as.default, lambda x, old: aten.type_as.default(x.double(), old), STREAM)
    yield Row(aten.to.other, lambda x, old: aten.to.other(x.double(), old), STREAM)
    yield Row(aten.mul.Tensor, lambda x, table: heads(x) * table[:, :4], "B, 2, 2+n1, 4")
    yield Row(aten.add.Tensor, lambda x: x + x[:, :1], STREAM)
    yield Row(aten.add.Tensor, lambda x, old: old + x, STREAM)
    yield Row(aten.add.Tensor, lambda x: x[:, 2:] + x[:, 2:].flip(1), "B, n1, 8", "an order of their own", "kept")
    yield Row(
        aten.add.Tensor,
        lambda x, w: x[:, 2:] + F.conv1d(x[:, 2:].transpose(1, 2), kernel(w, 3), padding=1).transpose(1, 2),
        "B, 12, 8",
        "two different token axes meet",
    )


# ---- contraction

ADDS_UP = "it adds up tokens, so its value depends on how many are left"


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def contraction() -> Iterator[Row]:
    attend, matmul = aten.scaled_dot_product_attention.default, aten.matmul.default
    yield Row(aten.linear.default, lambda x, w: F.linear(x, w, w[0]), STREAM)
    yield Row(
        aten.linear.default,
        lambda x, bias: F.linear(x.transpose(1, 2), bias[0]),
        "B, 8, 14",
        "the features that a linear layer mixes run over tokens",
    )
    yield Row(matmul, lambda x, w: x @ w, STREAM)
    yield Row(matmul, lambda x, memory: x @ memory.transpose(1, 2), "B, 2+n1, 2+n0")
    yield Row(matmul, lambda x: heads(x) @ heads(x).transpose(2, 3), "B, 2, 2+n1, 2+n1")
    yield Row(matmul, lambda x: x.transpose(1, 2) @ x, "B, 8, 8", ADDS_UP)
    yield Row(matmul, lambda x, w: x @ w[0], "B, 2+n1")
    yield Row(matmul, lambda x, w: w[0] @ x.transpose(1, 2), "B, 14", "a vector times a matrix is not followed")
    yield Row(
        matmul,
        lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
        "B, 2+n0, 8",
        "a softmax over tokens can't be told how many each stands for",
    )
    yield Row(aten.bmm.default, lambda x: torch.bmm(x, x.transpose(1, 2)), "B, 2+n1, 2+n1")
    yield Row(aten.bmm.default, lambda x: torch.bmm(x.transpose(1, 2), x), "B, 8, 8", ADDS_UP)
    yield Row(aten.mm.default, lambda x, w: torch.mm(flat(x), w).mean(0), "B*(2+n1), 8")
    yield Row(attend, lambda x: sdpa(heads(x), heads(x), heads(x)), "B, 2, 2+n1, 4")
    yield Row(attend, lambda x, bias: sdpa(heads(x), heads(x), heads(x), bias), "B, 2, 2+n1, 4")
    yield Row(attend, lambda x, old: sdpa(heads(x), heads(x), heads(old)), "B, 2, 2+n1, 4")
    yield Row(attend, lambda x, memory: sdpa(heads(x), heads(memory), heads(memory)), "B, 2, 2+n1, 4")
    yield Row(
        attend,
        lambda x, memory, old: sdpa(memory, old, x),
        "B, 2+n0, 8",
        "it reads one tensor in two ways",
    )
    yield Row(attend, lambda x: sdpa(heads(x[:, :1]), heads(x), heads(x)), "B, 2, 1, 4")
    yield Row(
        attend,
        lambda x: sdpa(*[heads(x).transpose(2, 3)] * 3),
        "B, 2, 4, 14",
        "attention over channels: the features of a head are tokens",
    )
    yield Row(
        attend,
        lambda x, w: sdpa(x[:, None], w[None, None], x.transpose(1, 2)[:, None]),
        "B, 1, 14, 14",
        "the features of a head run over tokens",
    )
    yield Row(
        attend,
        lambda x: sdpa(heads(x), heads(x), heads(x), is_causal=True),
        "B, 2, 14, 4",
        "causal attention depends on every token's position",
    )
    yield Row(
        attend,
        lambda x: sdpa(heads(x), heads(x)[:, :1], heads(x)[:, :1], enable_gqa=True),
        "B, 2, 14, 4",
        "attention with grouped queries is not followed",
    )


def einsum() -> Iterator[Row]:
    op = aten.einsum.default
    yield Row(op, lambda x, w: torch.einsum("bnc,cd->bnd", x, w), STREAM)
    yield Row(op, lambda x: torch.einsum("b n c -> c n b", x), "8, 2+n1, B")
    yield Row(op, lambda x: torch.einsum("bnc,bmc->bnm", x, x), "B, 2+n1, 2+n1")
    yield Row(op, lambda x, old: torch.einsum("bnc,bnc->bn", x, old), "B, 2+n1")
    yield Row(
        op,
        lambda x, memory: torch.einsum("bnc,bnd,bmc->bnm", x, memory, memory),
        "B, 2+n0, 2+n0",
        "it reads one tensor in two ways",
    )
    yield Row(op, lambda x: torch.einsum("bnc,bnd->bcd", x, x), "B, 8, 8", ADDS_UP)
    yield Row(op, lambda x, memory: torch.einsum("bnc,bmc->bnc", x, memory), STREAM)  # all of memory's are there
    yield Row(op, lambda x, w: torch.einsum("...c,cd->...d", x, w), STREAM)
    yield Row(op, lambda x, old: torch.einsum("...nc, ... n c -> n...", x, old).t(), "2+n1, B")
    yield Row(op, lambda x, w: torch.einsum("bnc,cd", x, w), "B, 8, 2+n1")  # alphabetical
    yield Row(op, lambda x: torch.einsum("bnn->bn", x @ x.transpose(1, 2)), "B, 14", "an einsum of a diagonal")


# ---- reduction


def reduction() -> Iterator[Row]:
    for op in (aten.layer_norm.default, aten.rms_norm.default):
        yield Row(op, lambda x, op=op: op(x, [8]), STREAM)
        features = "the features that a norm averages run over tokens"
        yield Row(op, lambda x, op=op: op(x, [14, 8]), "B, 14, 8", features)
    for op, more in ((aten.softmax.int, ()), (aten._softmax.default, (False,)), (aten.log_softmax.int, ())):
        yield Row(op, lambda x, op=op, more=more: op(x, -1, *more), STREAM)
        told = "a softmax over tokens can't be told how many each stands for"
        yield Row(op, lambda x, op=op, more=more: op(x, 1, *more), "B, 2+n0, 8", told)
    for op in (aten.mean.dim, aten.amax.default, aten.amin.default):
        yield Row(op, lambda x, op=op: op(x, [1]), "B, 8")
        yield Row(op, lambda x, op=op: op(x, [-1], True), "B, 2+n1, 1")
        yield Row(op, lambda x, op=op: op(x, [1, 2], True), "B, 1, 1")
        yield Row(op, lambda x, op=op: op(x, []), "")
    totals: dict[Any, Callable[..., Tensor]] = {
        aten.sum.dim_IntList: lambda x, dim, keep: x.sum(dim, keep),
        aten.linalg_vector_norm.default: lambda x, dim, keep: torch.linalg.vector_norm(x, 2, dim, keep),
        aten.logsumexp.default: lambda x, dim, keep: x.logsumexp([0, 1, 2] if dim is None else dim, keep),
        aten.var.correction: lambda x, dim, keep: aten.var.correction(x, dim, correction=0, keepdim=keep),
    }
    for op, function in totals.items():
        yield Row(op, lambda x, f=function: f(x, [-1], True), "B, 2+n1, 1")
        yield Row(op, lambda x, f=function: f(x, [2], False), "B, 2+n1")
        yield Row(op, lambda x, f=function: f(x, [1], False), "B, 8", ADDS_UP)
        yield Row(op, lambda x, f=function: f(x, None, False), "", ADDS_UP)


# ---- random


def random() -> Iterator[Row]:
    dropout = aten.native_dropout.default
    yield Row(dropout, lambda x: dropout(x, 0.5, True)[0], f"{STREAM} | {STREAM}")
    yield Row(aten.bernoulli.p, lambda x: x * aten.bernoulli.p(x, 0.5), STREAM)
    yield Row(aten.bernoulli.default, lambda x: x * torch.bernoulli(x.sigmoid()), STREAM)
    fresh = {aten.new_zeros.default: (), aten.new_ones.default: (), aten.new_full.default: (0.3,)}
    means = "a new tensor is as long as the tokens are many, and nothing tells whether it means them"
    for op, more in fresh.items():
        yield Row(op, lambda x, op=op, more=more: x + op(x, [x.shape[0], 1, 8], *more), "B, 1, 8")
        yield Row(op, lambda x, op=op, more=more: x + op(x, [x.shape[1], 8], *more), "14, 8", means, reads="left")
    empty = aten.new_empty.default
    yield Row(empty, lambda x: x + torch.ones_like(empty(x, [x.shape[0], 1, 8])), "B, 1, 8")
    yield Row(empty, lambda x: x + torch.ones_like(empty(x, [x.shape[1], 8])), "14, 8", means, reads="left")


ROWS = [*pointwise(), *contraction(), *einsum(), *reduction(), *random()]
