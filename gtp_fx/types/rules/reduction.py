"""Rules for norms over channels, and for pooling over tokens."""

from __future__ import annotations

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import FEATURE_NORMS, SOFTMAXES
from gtp_fx.types.axes import Plain, TensorType, is_plain, token_axes
from gtp_fx.types.merging import in_rows
from gtp_fx.types.rules.grids import pooled
from gtp_fx.types.rules.registry import (
    NEEDS_ALL,
    WEIGHS,
    Call,
    NoRule,
    RuleResult,
    require_own_images,
    require_plain,
    rule,
)


@rule(*FEATURE_NORMS)
def norm(call: Call) -> RuleResult:
    """Keep the type: only features are mixed."""
    x = call.type(0)
    averaged = x[len(x) - len(call.arg(1)) :]
    require_plain(averaged, "the features that a norm averages")
    require_own_images(x, averaged, "the features that a norm averages")
    for parameter in call.tensors()[1:]:
        require_plain(call.type_of(parameter), "the parameters of a norm")
    return RuleResult(x, operands={call.operand(0): x})


@rule(*SOFTMAXES, aten.log_softmax.int)
def softmax(call: Call) -> RuleResult:
    """Keep the type. Over tokens, each output needs every input along that axis.

    Plain attention is an operator of its own by now (`fuse_attention`), which reads how many tokens a key stands for.
    So does one that is marked as part of an attention which stays spelled out. No other softmax can, so it gets all
    tokens back.
    """
    x = call.type(0)
    dim = call.arg(1) % len(x)
    node = call.operand(0)
    if any(axis.domain.level for axis in token_axes((x[dim],))) and WEIGHS not in call.node.meta:
        raise NoRule("a softmax over tokens can't be told how many each stands for")
    require_own_images(x, (x[dim],), "the values of a softmax")
    return RuleResult(x, operands={node: x}, prefix_operands=None if is_plain(x[dim]) else NEEDS_ALL)


@rule(aten.logsumexp.default)
def log_of_sum(call: Call) -> RuleResult:
    """Reduce over channels only: a sum of exponentials over tokens shrinks with every token removed."""
    return _reduce(call, over_tokens=False)


@rule(aten.mean.dim, aten.amax.default, aten.amin.default)
def pool(call: Call) -> RuleResult:
    """Reduce over features or tokens.

    A mean over the remaining tokens is the method's own pooling, and a maximum over them needs no weights either.
    """
    return _reduce(call, over_tokens=True)


@rule(aten.sum.dim_IntList, aten.linalg_vector_norm.default, aten.var.correction)
def total(call: Call) -> RuleResult:
    """Reduce over channels. A sum over tokens counts them, so it would shrink with every token removed.

    A sum over a row of an attention map is what the row is divided by.
    """
    return _reduce(call, over_tokens=False)


def _reduce(call: Call, over_tokens: bool) -> RuleResult:
    """Reduce over the dimensions that a node names, which may be tokens where `over_tokens`."""
    x = call.type(0)
    node = call.operand(0)
    # linalg_vector_norm(x, ord, dim, keepdim) has its order before the dimensions.
    at = 2 if call.node.target is aten.linalg_vector_norm.default else 1
    wanted = call.arg(at)
    keepdim = call.arg(3 if call.node.target is aten.var.correction else at + 1, False)
    dims = {d % len(x) for d in wanted} if wanted else set(range(len(x)))
    mixes_tokens = not all(is_plain(x[d]) for d in dims)
    shortened = any(axis.domain.level for d in dims for axis in token_axes((x[d],)))
    if shortened and not over_tokens and WEIGHS not in call.node.meta:
        raise NoRule("it adds up tokens, so its value depends on how many are left")
    output: TensorType = tuple((Plain(1),) if i in dims else dim for i, dim in enumerate(x) if keepdim or i not in dims)
    # What keeps its dimensions, or gets them back at once, is about to meet the grid that it is of again.
    returns = keepdim or any(user.target is aten.unsqueeze.default for user in call.node.users)
    if mixes_tokens and not returns:
        output = pooled([x[d] for d in sorted(dims)], output, call.node.name)
    return RuleResult(in_rows(output), operands={node: x}, prefix_operands=NEEDS_ALL if mixes_tokens else None)
