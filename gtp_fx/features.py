"""Which feature is which, through what moves features about: a projection's [3·H·D] that becomes [3, …, H, …, D].

Token types tell places of a grid apart and leave features plain. Where a path is to be computed in another layout than the
model's, heads and features of a head have to be found again as well. So they are given a name: an axis of their own,
divided as a side of a grid is into windows, and the rules of the moves on the path say where each part of it ends up.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx
from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.axes import Dim, Factor, Grid, GridAxis, TensorType, product, split_tokens, whole_size
from gtp_fx.infer import Typing
from gtp_fx.rules.layout import is_view
from gtp_fx.rules.registry import Call, NoRule, find

_MOVES = (
    aten.permute.default,
    aten.transpose.int,
    aten.clone.default,
    aten.contiguous.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.roll.default,
    aten.slice.Tensor,
)


class Lost(Exception):
    """Where a feature went can't be told; the message is the reason a user reads."""


def is_move(node: fx.Node) -> bool:
    """It arranges what it is given, or leaves some tokens out, and computes nothing."""
    return is_view(node) or node.target in _MOVES


def features_of(birth: fx.Node, count: int) -> Grid:
    """The axis of the `count` features that `birth` makes."""
    return Grid(f"features of {birth.name}", (count,))


def named(kind: TensorType, dims: Sequence[int], features: Grid) -> TensorType:
    """`kind` with its plain dimensions `dims`, outermost first, as the parts of `features`."""
    rest = GridAxis(features, 0)
    found = list(kind)
    for d in dims[:-1]:
        outer, rest = rest.split(whole_size(kind[d]))
        found[d] = product([outer])
    found[dims[-1]] = product([rest])
    return tuple(found)


def moved(node: fx.Node, kind: TensorType, typing: Typing) -> TensorType:
    """The type of what the move `node` makes of its operand, where that comes as `kind`. Raises Lost."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rule = find(node.target)
    try:
        answer = rule(Call(node, {**typing.types, source: kind})) if rule is not None else None
    except NoRule as reason:
        raise Lost(f"{node.name} takes features apart ({reason})") from reason
    if answer is None or not isinstance(answer.output, tuple):
        raise Lost(f"{node.name} can't be followed")
    return answer.output


def parts_in(dim: Dim, features: Grid) -> list[GridAxis]:
    """What of `features` lies in `dim`, outermost first."""
    return [f for f in split_tokens(dim) if isinstance(f, GridAxis) and f.grid == features]


def are_last(kind: TensorType, features: Grid) -> bool:
    """All features, in their order, are the last dimension."""
    return split_tokens(kind[-1]) == (GridAxis(features, 0),)


def without_part(dim: Dim, features: Grid, stride: int, parts: int) -> Dim:
    """`dim` where one of `parts` parts of it, `stride` features apart, was taken: what was further apart has moved together."""
    fewer = features_like(features, parts)

    def change(factor: Factor) -> Factor:
        if not isinstance(factor, GridAxis) or factor.grid != features:
            return factor
        near = factor.stride // parts if factor.stride > stride else factor.stride
        return GridAxis(fewer, 0, factor.whole_size, near).canonical()

    return product([change(factor) for factor in split_tokens(dim)])


def features_like(features: Grid, parts: int) -> Grid:
    """The axis of one of `parts` equal parts of `features`."""
    return Grid(f"a part of {features.birth}", (features.shape[0] // parts,))
