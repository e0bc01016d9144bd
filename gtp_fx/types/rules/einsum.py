"""The rule for einsum, where every dimension has a name: the type is read off the equation."""

from __future__ import annotations

import collections
import string
from collections.abc import Sequence
from dataclasses import dataclass

from torch.ops import aten  # type: ignore[import-not-found]

from gtp_fx.types.axes import Dim, Plain, is_plain, token_axes, whole_size
from gtp_fx.types.rules.broadcasting import join
from gtp_fx.types.rules.registry import NEEDS_ALL, Call, NoRule, RuleResult, require_own_images, rule, wanting


@dataclass(frozen=True)
class Equation:
    """An einsum's equation.

    terms: the labels of each operand's dimensions.
    result: the labels of the output's dimensions.
    """

    terms: tuple[str, ...]
    result: str

    @classmethod
    def parse(cls, text: str, ranks: Sequence[int]) -> Equation | None:
        """Parse an equation of operands that have so many dimensions; None for a diagonal.

        The dimensions of an ellipsis get labels of their own, from the right. An output that isn't stated has those,
        and every label that occurs once, in alphabetical order.
        """
        left, arrow, result = text.replace(" ", "").partition("->")
        terms = left.split(",")
        unused = [label for label in string.ascii_letters if label not in text]
        hidden = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
        most = max((n for n, term in zip(hidden, terms, strict=True) if "..." in term), default=0)
        if most > len(unused):
            return None
        ellipsis = "".join(unused[:most])
        terms = [term.replace("...", ellipsis[most - n :] if n else "") for n, term in zip(hidden, terms, strict=True)]
        if arrow:
            result = result.replace("...", ellipsis)
        else:
            counts = collections.Counter(label for label in "".join(terms) if label not in ellipsis)
            result = ellipsis + "".join(sorted(label for label, count in counts.items() if count == 1))
        if any(len(set(term)) != len(term) for term in (*terms, result)):
            return None
        return cls(tuple(terms), result)


@rule(aten.einsum.default)
def einsum(call: Call) -> RuleResult:
    """Keep the type of every label in the output. The others are summed over: no tokens, or all of them."""
    operands = call.arg(1)
    equation = Equation.parse(call.arg(0), [len(call.type_of(operand)) for operand in operands])
    if equation is None:
        raise NoRule("an einsum of a diagonal")
    # A label is one dimension for all operands that have it: their joined type.
    labels: dict[str, Dim] = {}
    for term, operand in zip(equation.terms, operands, strict=True):
        for label, dim in zip(term, call.type_of(operand), strict=True):
            labels[label] = join((labels.get(label, (Plain(1),)),), (dim,))[0]
    added_up = [dim for label, dim in labels.items() if label not in equation.result]
    if any(axis.domain.level for axis in token_axes(tuple(added_up))):
        raise NoRule("it adds up tokens, so its value depends on how many are left")
    for term, operand in zip(equation.terms, operands, strict=True):
        # A label that one operand has alone pairs each of its images with all of another operand's.
        mixed = [label for label in labels if label not in equation.result or label not in term]
        require_own_images(call.type_of(operand), [labels[label] for label in mixed], "what an einsum adds up or pairs")
    wanted = wanting(
        (
            operand,
            tuple(
                own if whole_size(own) == 1 else labels[label]
                for label, own in zip(term, call.type_of(operand), strict=True)
            ),
        )
        for term, operand in zip(equation.terms, operands, strict=True)
    )
    output = tuple(labels[label] for label in equation.result)
    token_wise = len(operands) == 1 and all(map(is_plain, added_up))
    return RuleResult(output, operands=wanted, prefix_operands=None if token_wise else NEEDS_ALL)
