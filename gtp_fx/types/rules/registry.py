"""The form of a rule, and the registry that keeps them.

A rule answers, for one operator and the types of its inputs: which type does the output have, in which type must each
input come, and which arguments hold sizes that change when tokens are removed? The same answer serves four readers:
`infer_types` walks the graph with it, `liveness` follows it backwards, `remove_tokens` repairs the graph by it, and
`cost.terms` reads off it what the operator costs for every count of tokens.

    @rule(aten.linear.default)
    def linear(call):
        x = call.type(0)
        require_plain(x[-1:], "the features that a linear layer mixes")
        return RuleResult((*x[:-1], (Plain(call.output_shape()[-1]),)), operands={call.operand(0): x})

A rule that can't answer raises `NoRule` with the reason. The operator is then a *barrier*, exactly like one that has no
rule at all: its inputs must be whole, and nothing is claimed about its output. So a missing rule costs speed or a named
refusal, but never gives a wrong answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from gtp_fx.errors import NotApplicable
from gtp_fx.graph.symbols import shape_of
from gtp_fx.types.axes import CountOf, Dim, TensorType, holds_images, is_plain, plain, token_axes

NEEDS_ALL: frozenset[fx.Node] = frozenset()
"""The `prefix_operands` of an operator whose every output token needs every input token."""

WEIGHS = "gtp_weighs"
"""Meta key of an operator that reads whole rows of an attention map, of which a removed token takes its row and column.

`passes/exact/mark_blocks.py` sets it.
"""


@dataclass(frozen=True)
class TypeList:
    """The types of the items of an operator that returns a list or a tuple."""

    items: tuple[TensorType, ...]


Output = TensorType | TypeList | None
"""A tensor's type, the types of several, or None for a value that is no tensor."""

Repair = Callable[[CountOf], tuple[Any, ...]]
"""A function from the plan's token counts to new positional arguments for the node."""


class NoRule(NotApplicable):
    """The operator can't be followed with these inputs; the message is the reason that a user reads."""


@dataclass(frozen=True)
class RuleResult:
    """A rule's answer.

    output: the type of what the node returns.
    operands: the type in which a tensor argument must come; an argument not named comes in its own.
    repair: recomputes the arguments that hold sizes; None where there are none.
    prefix_operands: the operands of which the first n output tokens need only the first n tokens. None for a token-wise
        operator, where that holds for every operand; the empty set where the output needs all of everything.
    prefix_needed: for an operand not in `prefix_operands`, how many leading tokens the node reads; all if not named.
    barrier: the reason why the inputs must be whole; empty where the operator is followed.
    broadcasts: operands are right-aligned with the output and may lack its leading dimensions.
    other_images: the output's images aren't the operands': some of them, several batches joined, another order.
    """

    output: Output
    operands: dict[fx.Node, TensorType] = field(default_factory=dict)
    repair: Repair | None = None
    prefix_operands: frozenset[fx.Node] | None = None
    prefix_needed: dict[fx.Node, int] = field(default_factory=dict)
    barrier: str = ""
    broadcasts: bool = False
    other_images: bool = False


@dataclass(frozen=True)
class Call:
    """A node as a rule sees it: arguments by the schema's position, and the types of the tensors among them."""

    node: fx.Node
    types: dict[fx.Node, Output]

    def arg(self, position: int, default: Any = None) -> Any:
        """Return a positional argument, also where it was passed by the schema's name; else `default`."""
        args = self.node.args
        if position < len(args):
            return args[position]
        schema = getattr(self.node.target, "_schema", None)
        if schema is not None and position < len(schema.arguments):
            return self.node.kwargs.get(schema.arguments[position].name, default)
        return default

    def operand(self, position: int) -> fx.Node:
        """Return an argument that is a tensor. Raises NoRule where it isn't one."""
        value = self.arg(position)
        if not isinstance(value, fx.Node):
            raise NoRule(f"argument {position} is not a tensor")
        return value

    def type(self, position: int) -> TensorType:
        """Return the type of an argument that is a single tensor. Raises NoRule where it isn't one."""
        return self.type_of(self.operand(position))

    def type_of(self, node: fx.Node) -> TensorType:
        """Return the type of an operand that is a single tensor. Raises NoRule where it isn't one."""
        found = self.types.get(node)
        if not isinstance(found, tuple):
            raise NoRule(f"{node.name} is not a single tensor")
        return found

    def tensors(self) -> list[fx.Node]:
        """Return the arguments that are tensors, in order."""
        return [node for node in self.node.all_input_nodes if self.types.get(node) is not None]

    def output_shape(self) -> tuple[int, ...]:
        """Return the node's shape in the original graph, symbols as primes."""
        return shape_of(self.node)

    def plain_output(self) -> TensorType:
        """Return the type of the output without any token axis."""
        return plain(*self.output_shape())

    def replace(self, changes: dict[int, Any]) -> tuple[Any, ...]:
        """Return the node's positional arguments with some replaced."""
        return tuple(changes.get(i, arg) for i, arg in enumerate(self.node.args))


Rule = Callable[[Call], RuleResult]
_rules: dict[Any, Rule] = {}
_by_tag: dict[torch.Tag, Rule] = {}


def rule(*operators: Any) -> Callable[[Rule], Rule]:
    """Register a rule for some operators (overloads such as `aten.add.Tensor`)."""

    def register(function: Rule) -> Rule:
        for operator in operators:
            if operator in _rules:
                raise AssertionError(f"{operator} has two rules")
            _rules[operator] = function
        return function

    return register


def for_every_pointwise(function: Rule) -> Rule:
    """Make a rule the one of every element-wise operator without a rule of its own, as torch tags them."""
    _by_tag[torch.Tag.pointwise] = function
    return function


def find(operator: Any) -> Rule | None:
    """Return an operator's rule; None where it has none."""
    if operator in _rules or torch.Tag.pointwise not in getattr(operator, "tags", ()):
        return _rules.get(operator)
    return None if torch.Tag.nondeterministic_seeded in operator.tags else _by_tag[torch.Tag.pointwise]


def has_own_rule(operator: Any) -> bool:
    """Return whether a rule names this operator, which makes it a word of the vocabulary."""
    return operator in _rules


def wanting(pairs: Iterable[tuple[fx.Node, TensorType]]) -> dict[fx.Node, TensorType]:
    """Return the types in which operands must come. Raises NoRule where one operand would have to come in two."""
    wanted: dict[fx.Node, TensorType] = {}
    for node, kind in pairs:
        if wanted.setdefault(node, kind) != kind:
            raise NoRule("it reads one tensor in two ways")
    return wanted


def require_plain(dims: Sequence[Dim], what: str) -> None:
    """Refuse a token axis where an operator mixes all of a dimension.

    Raises NoRule, which says that `what` runs over tokens.
    """
    if not all(is_plain(dim) for dim in dims):
        raise NoRule(f"{what} run over tokens")


def require_own_images(tensor_type: TensorType, dims: Sequence[Dim], what: str) -> None:
    """Refuse images where an operator mixes all of a dimension and tokens have been removed, of each image others.

    Raises NoRule, which says that `what` runs over images.
    """
    if any(map(holds_images, dims)) and any(axis.domain.level for axis in token_axes(tensor_type)):
        raise NoRule(f"{what} run over images, which keep different tokens each")
