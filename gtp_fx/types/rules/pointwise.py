"""Rules for element-wise operators: the output has the joined type of the inputs, and each input must come in it."""

from __future__ import annotations

from gtp_fx.graph.operators import BINARY, CASTS_LIKE, UNARY
from gtp_fx.types.axes import Plain, TensorType, whole_size
from gtp_fx.types.rules.broadcasting import join
from gtp_fx.types.rules.registry import Call, RuleResult, for_every_pointwise, rule, wanting


@for_every_pointwise
@rule(*BINARY, *UNARY)
def pointwise(call: Call) -> RuleResult:
    """Join the types of all tensors."""
    tensors = call.tensors()
    joined = call.type_of(tensors[0])
    for tensor in tensors[1:]:
        joined = join(joined, call.type_of(tensor))
    operands = wanting((tensor, broadcast_to(call.type_of(tensor), joined)) for tensor in tensors)
    return RuleResult(joined, operands=operands, broadcasts=True)


@rule(*CASTS_LIKE)
def cast_like(call: Call) -> RuleResult:
    """Keep the type. Only the dtype of the second tensor is read, so its level doesn't matter."""
    return RuleResult(call.type(0), operands={call.operand(0): call.type(0)})


def broadcast_to(own: TensorType, joined: TensorType) -> TensorType:
    """Return the type that an operand must come in: dimensions of `joined`, or size one where it broadcasts."""
    tail = joined[len(joined) - len(own) :]
    return tuple(
        (Plain(1),) if whole_size(mine) == 1 and whole_size(wanted) != 1 else wanted
        for mine, wanted in zip(own, tail, strict=True)
    )
