"""Rules for operators that rearrange dimensions one by one: permutations, squeezing, expand."""

from __future__ import annotations

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.graph.operators import SQUEEZES
from gtp_fx.types.axes import Plain, TensorType, holds_images, is_plain, token_axes, whole_size
from gtp_fx.types.merging import in_rows
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, require_plain, rule
from gtp_fx.types.rules.views import resize


@rule(aten.permute.default)
def permute(call: Call) -> RuleResult:
    """Reorder the dimensions."""
    x = call.type(0)
    return RuleResult(in_rows(tuple(x[d] for d in call.arg(1))), operands={call.operand(0): x})


@rule(aten.transpose.int)
def transpose(call: Call) -> RuleResult:
    """Swap two dimensions."""
    x = list(call.type(0))
    a, b = call.arg(1), call.arg(2)
    x[a], x[b] = x[b], x[a]
    return RuleResult(in_rows(tuple(x)), operands={call.operand(0): call.type(0)})


@rule(aten.t.default, aten.numpy_T.default)
def reverse(call: Call) -> RuleResult:
    """Reverse the dimensions."""
    return RuleResult(tuple(reversed(call.type(0))), operands={call.operand(0): call.type(0)})


@rule(aten.view_as_complex.default)
def view_as_complex(call: Call) -> RuleResult:
    """Make the last dimension, real and imaginary parts, one number."""
    x = call.type(0)
    require_plain(x[-1:], "the parts of a complex number")
    return RuleResult(x[:-1], operands={call.operand(0): x})


@rule(aten.view_as_real.default)
def view_as_real(call: Call) -> RuleResult:
    """Add a last dimension for the real and the imaginary part."""
    x = call.type(0)
    return RuleResult((*x, (Plain(2),)), operands={call.operand(0): x})


@rule(aten.unsqueeze.default)
def unsqueeze(call: Call) -> RuleResult:
    """Insert a dimension of size one."""
    x = list(call.type(0))
    position = call.arg(1)
    x.insert(position if position >= 0 else len(x) + 1 + position, (Plain(1),))
    return RuleResult(tuple(x), operands={call.operand(0): call.type(0)})


@rule(*SQUEEZES)
def squeeze(call: Call) -> RuleResult:
    """Remove dimensions of size one."""
    x = call.type(0)
    wanted = call.arg(1)
    dims = {d % len(x) for d in ([wanted] if isinstance(wanted, int) else wanted)}
    kept = tuple(dim for i, dim in enumerate(x) if i not in dims or whole_size(dim) != 1)
    if any(holds_images(x[d]) for d in dims) and any(axis.domain.level for axis in token_axes(x)):
        raise NoRule("it drops the dimension of the images, which says whose tokens are left")
    kept = in_rows(kept)
    # All tokens are needed: if only one were computed, its dimension would be removed too.
    tokens = not all(is_plain(x[d]) for d in dims)
    return RuleResult(kept, operands={call.operand(0): x}, prefix_operands=NEEDS_ALL if tokens else None)


@rule(aten.expand.default)
def expand(call: Call) -> RuleResult:
    """Give broadcast dimensions plain sizes. The others keep their type, and their sizes follow the tokens."""
    x, shape = call.type(0), call.output_shape()
    padded: TensorType = ((Plain(1),),) * (len(shape) - len(x)) + x
    output = tuple(
        dim if whole_size(dim) == wanted else (Plain(wanted),) for dim, wanted in zip(padded, shape, strict=True)
    )
    return RuleResult(output, operands={call.operand(0): x}, repair=resize(call, 1, output))


@rule(aten.repeat_interleave.self_int)
def repeat_each(call: Call) -> RuleResult:
    """Repeat each entry of a plain dimension several times in a row, as grouped queries share their keys."""
    x, dim = list(call.type(0)), call.arg(2)
    if dim is None:
        raise NoRule("it flattens what it repeats")
    require_plain([x[dim]], "what is repeated")
    images = holds_images(x[dim])
    x[dim] = (Plain(call.output_shape()[dim], images),)
    return RuleResult(tuple(x), operands={call.operand(0): call.type(0)}, other_images=images)
