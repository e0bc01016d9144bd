"""Element by element: the output has the joined type of the inputs, and each input must come in it."""

from __future__ import annotations

from gtp_fx.graph.operators import BINARY, CASTS_LIKE, UNARY
from gtp_fx.types.axes import Plain, TensorType, whole_size
from gtp_fx.types.rules.registry import Call, RuleResult, join, rule, wanting


@rule(*BINARY, *UNARY)
def pointwise(call: Call) -> RuleResult:
    tensors = call.tensors()
    joined = call.type_of(tensors[0])
    for tensor in tensors[1:]:
        joined = join(joined, call.type_of(tensor))
    operands = wanting((tensor, broadcast_to(call.type_of(tensor), joined)) for tensor in tensors)
    return RuleResult(joined, operands=operands, broadcasts=True)


@rule(*CASTS_LIKE)
def cast_like(call: Call) -> RuleResult:
    """The second tensor only lends its dtype, at whatever level it comes."""
    return RuleResult(call.type(0), operands={call.operand(0): call.type(0)})


def broadcast_to(own: TensorType, joined: TensorType) -> TensorType:
    """The type an operand must come in: `joined`'s dimensions where it has them, size one where it broadcasts."""
    tail = joined[len(joined) - len(own) :]
    return tuple(
        (Plain(1),) if whole_size(mine) == 1 and whole_size(wanted) != 1 else wanted
        for mine, wanted in zip(own, tail, strict=True)
    )
