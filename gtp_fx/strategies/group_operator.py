"""A strategy's `group` as an operator of the graph, `torch.ops.gtp_fx.group_<name>`.

Composite, like every operator of the package: any batch, any device, and the compiler sees through it. The strategy's fields travel with
it as JSON, so that a graph holds nothing but operators and plain values.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.ops import gtp_fx  # type: ignore[import-not-found]

from gtp_fx.errors import OptionError
from gtp_fx.ops.register import operator
from gtp_fx.strategies.tokens import Groups, Tokens

if TYPE_CHECKING:
    from gtp_fx.strategies.grouping import Grouping


def group_operator(name: str) -> Any:
    """The operator of a registered strategy. Raises OptionError for another one."""
    found = getattr(gtp_fx, f"group_{name}", None)
    if found is None:
        raise OptionError(f"strategy {name!r} isn't registered: put @gtp_fx.register_strategy over its class")
    return found.default


def options_of(strategy: Grouping) -> str:
    """The strategy's fields as JSON, from which `define_operator` makes it again."""
    return json.dumps({field.name: getattr(strategy, field.name) for field in fields(strategy)})


def define_operator(name: str, classes: dict[str, type]) -> None:
    """`gtp_fx::group_<name>`: `classes[name].group` as an operator; once for each name, whatever the class is later."""
    if hasattr(gtp_fx, f"group_{name}"):
        return

    def made_again(options: str) -> Any:
        said = {key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(options).items()}
        return classes[name](**said)

    def shapes(x, k, v, score, size, index, carried, grid, around, options):  # type: ignore[no-untyped-def]
        strategy, (leaving, prefix, suffix, _) = made_again(options), around
        batch, count = x.shape[0], x.shape[1] - prefix - suffix
        kept = count - leaving
        whole, number = torch.int64, torch.float32
        known = {
            "kept": ((batch, kept), whole),
            "left": ((batch, leaving), whole),
            "weights": ((batch, kept, leaving), number),
            "own": ((batch, kept), number),
            "size": ((batch, kept), number),
            "carried": ((batch, count), number),
        }
        return [x.new_empty(known[result][0], dtype=known[result][1]) for result in strategy.results()]

    def grouped(
        x_BNC: Tensor,
        k_BHND: Tensor | None,
        v_BHND: Tensor | None,
        score_Bn: Tensor | None,
        size_Bn: Tensor | None,
        index_Bn: Tensor | None,
        carried_Bn: Tensor | None,
        grid: list[int],
        around: list[int],
        options: str,
    ) -> list[Tensor]:
        strategy, (leaving, prefix, suffix, block) = made_again(options), around
        count = x_BNC.shape[1] - prefix - suffix
        if index_Bn is None:
            index_Bn = torch.arange(count, device=x_BNC.device).expand(x_BNC.shape[0], count)
        seen = (x_BNC, k_BHND, v_BHND, score_Bn, size_Bn, index_Bn, carried_Bn)
        groups = strategy.group(Tokens(*seen, tuple(grid), leaving, prefix, suffix, block))
        return _listed(strategy, groups)

    grouped.__name__ = f"group_{name}"
    operator(shapes, opaque=True)(grouped)


def _listed(strategy: Grouping, groups: Any) -> list[Tensor]:
    """What `group` decided, as the strategy has said that it would."""
    if not isinstance(groups, Groups):
        raise OptionError(f"{strategy.name}.group() returned {type(groups).__name__}: return gtp_fx.Groups")
    found: dict[str, Any] = {
        "kept": groups.kept_BK,
        "left": groups.left_BP,
        "weights": groups.weights_BKP,
        "own": groups.own_BK,
        "size": groups.size_BK,
        "carried": groups.carried_Bn,
    }
    if groups.weights_BKP is not None and groups.own_BK is None:
        found["own"] = torch.ones_like(groups.kept_BK, dtype=torch.float32)
    named, given = strategy.results(), [name for name, value in found.items() if value is not None]
    if given != named:
        raise OptionError(
            f"{strategy.name}.group() gave {', '.join(given)}, and its class says {', '.join(named)}: merges= for weights and "
            f"own, sized= for sizes and carries= for what is carried have to agree with it"
        )
    return [found[name].float() if found[name].is_floating_point() else found[name] for name in named]
