"""Element by element: the output has the joined type of the inputs, and each input must come in it."""

from __future__ import annotations

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import Plain, TensorType, whole_size
from gtp_fx.rules.registry import Call, Typed, join, rule

_BINARY = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    aten.where.self,
)

_UNARY = (
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.pow.Tensor_Scalar,
    aten.abs.default,
    aten.alias.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.cos.default,
    aten.detach.default,
    aten.dropout.default,
    aten.elu.default,
    aten.erf.default,
    aten.exp.default,
    aten.gelu.default,
    aten.hardsigmoid.default,
    aten.hardswish.default,
    aten.leaky_relu.default,
    aten.lift_fresh_copy.default,
    aten.log.default,
    aten.neg.default,
    aten.reciprocal.default,
    aten.relu.default,
    aten.rsqrt.default,
    aten.sigmoid.default,
    aten.silu.default,
    aten.sin.default,
    aten.softplus.default,
    aten.sqrt.default,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.ones_like.default,
    aten.zeros_like.default,
)


@rule(*_BINARY, *_UNARY)
def pointwise(call: Call) -> Typed:
    tensors = call.tensors()
    joined = call.type_of(tensors[0])
    for tensor in tensors[1:]:
        joined = join(joined, call.type_of(tensor))
    return Typed(joined, operands={tensor: broadcast_to(call.type_of(tensor), joined) for tensor in tensors})


def broadcast_to(own: TensorType, joined: TensorType) -> TensorType:
    """The type an operand must come in: `joined`'s dimensions where it has them, size one where it broadcasts."""
    tail = joined[len(joined) - len(own) :]
    return tuple(
        (Plain(1),) if whole_size(mine) == 1 and whole_size(wanted) != 1 else wanted
        for mine, wanted in zip(own, tail, strict=True)
    )
