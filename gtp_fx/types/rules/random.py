"""Rules for what training adds: dropout, and the new tensors that stochastic depth draws random numbers in."""

from __future__ import annotations

from torch.ops import aten

from gtp_fx.types.axes import token_axes, whole_size
from gtp_fx.types.rules.registry import Call, NoRule, RuleResult, TypeList, rule


@rule(aten.native_dropout.default)
def dropout(call: Call) -> RuleResult:
    """Type the dropped values and the mask, both shaped like the input."""
    x = call.type(0)
    return RuleResult(TypeList((x, x)), operands={call.operand(0): x})


@rule(aten.bernoulli.p, aten.bernoulli.default)
def coins(call: Call) -> RuleResult:
    """Keep the type."""
    x = call.type(0)
    return RuleResult(x, operands={call.operand(0): x})


@rule(aten.new_empty.default, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default)
def fresh(call: Call) -> RuleResult:
    """Make a plain tensor of the stated sizes.

    Only type and device of its first argument are read, which may therefore come at any level.
    """
    x = call.type(0)
    token_sizes = {whole_size(dim) for dim in x if token_axes((dim,))}
    if token_sizes & set(call.output_shape()):
        raise NoRule("a new tensor is as long as the tokens are many, and nothing tells whether it means them")
    return RuleResult(call.plain_output(), operands={call.operand(0): x})
