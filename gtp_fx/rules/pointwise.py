"""Element by element: the output has the joined type of the inputs, and each input must come in it."""

from __future__ import annotations

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import Plain, TensorType, whole_size
from gtp_fx.rules.registry import Call, Typed, join, rule, wanting

_BINARY = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.div.Tensor_mode,
    aten.eq.Tensor,
    aten.ge.Tensor,
    aten.gt.Tensor,
    aten.le.Tensor,
    aten.lt.Tensor,
    aten.logical_and.default,
    aten.logical_or.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.pow.Tensor_Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
)

_UNARY = (
    aten.add.Scalar,
    aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.pow.Tensor_Scalar,
    aten.pow.Scalar,
    aten.bitwise_not.default,
    aten.logical_not.default,
    aten.eq.Scalar,
    aten.ne.Scalar,
    aten.ge.Scalar,
    aten.gt.Scalar,
    aten.le.Scalar,
    aten.lt.Scalar,
    aten.hardtanh.default,
    aten.mish.default,
    aten.relu6.default,
    aten.selu.default,
    aten.sign.default,
    aten.square.default,
    aten.to.device,
    aten.to.dtype_layout,
    aten.expm1.default,
    aten.log1p.default,
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
    operands = wanting((tensor, broadcast_to(call.type_of(tensor), joined)) for tensor in tensors)
    return Typed(joined, operands=operands, broadcasts=True)


@rule(aten.type_as.default, aten.to.other)
def cast_like(call: Call) -> Typed:
    """The second tensor only lends its dtype, at whatever level it comes."""
    return Typed(call.type(0), operands={call.operand(0): call.type(0)})


def broadcast_to(own: TensorType, joined: TensorType) -> TensorType:
    """The type an operand must come in: `joined`'s dimensions where it has them, size one where it broadcasts."""
    tail = joined[len(joined) - len(own) :]
    return tuple(
        (Plain(1),) if whole_size(mine) == 1 and whole_size(wanted) != 1 else wanted
        for mine, wanted in zip(own, tail, strict=True)
    )
