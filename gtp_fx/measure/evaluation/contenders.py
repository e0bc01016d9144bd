"""The optimised models that an evaluation is asked for, by name, as options of `gtp_fx.optimize`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.data import digest_of_tensors
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.options import DEFAULTS, Options
from gtp_fx.options.values import REDUCED
from gtp_fx.strategies import Strategy


@dataclass(frozen=True, eq=False)
class Contender:
    """One optimised model to be made.

    name: its name in the tables.
    options: for `gtp_fx.optimize`.
    asked: the same as text, which tells it from others.
    """

    name: str
    options: Mapping[str, Any]
    asked: Mapping[str, str]


def contenders(
    budgets: Sequence[float],
    latency_budgets: Sequence[float | str],
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy],
    optimised: Mapping[str, OptimizedModel],
    options: Mapping[str, Any],
) -> list[Contender]:
    """Return each strategy at each budget, and models that there are already.

    strategies: by name, or in a row; one with other numbers than its name stands for is called by its class there.
    optimised: by name; they are made again, of the same schedule and strategy.
    options: the others of `gtp_fx.optimize`, the same for all.

    Raises OptionError where an option is wrong, two have one name, or nothing is asked for.
    """
    if options.get("output") == REDUCED or any(fast.returned for fast in optimised.values()):
        raise OptionError(
            "output='reduced': outputs are compared with the original's, token by token, and these have fewer; "
            "evaluate a model of the same schedule and output='full', which has the same tokens where they are left"
        )
    wanted: list[tuple[dict[str, Any], str]] = [({"flops_budget": ratio}, f"{ratio:g}") for ratio in budgets]
    wanted += [({"latency_budget": value}, f"{value} time") for value in latency_budgets]
    if not wanted and not isinstance(options.get("schedule", DEFAULTS["schedule"]), str):
        wanted = [({}, "")]  # counts that were given need no budget
    found = [
        _contender(f"{name} {budget}".strip(), name, {**options, **limit, "strategy": strategy})
        for name, strategy in _named(strategies)
        for limit, budget in wanted
    ]
    without = {name: value for name, value in options.items() if name not in ("schedule", "calibration")}
    found += [
        _contender(name, name, {**without, "schedule": fast.schedule, "strategy": fast.strategy})
        for name, fast in optimised.items()
    ]
    if not found:
        raise OptionError("nothing to evaluate: give budgets=[0.74, 0.6], latency_budgets=, or optimised={'mine': …}")
    names = [contender.name for contender in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError(f"two rows are called {twice[0]!r}: give strategies as a mapping with a name for each")
    return found


def _named(strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy]) -> Iterable[tuple[str, str | Strategy]]:
    if isinstance(strategies, Mapping):
        return strategies.items()
    given = [strategies] if isinstance(strategies, str) else strategies
    return [(strategy if isinstance(strategy, str) else strategy.name, strategy) for strategy in given]


def _contender(name: str, strategy: str, options: Mapping[str, Any]) -> Contender:
    """Return a contender whose options are checked."""
    known = {key: value for key, value in options.items() if key in DEFAULTS}
    checked = Options.of(**known)
    asked = {key: _told(value) for key, value in sorted(options.items()) if key not in ("strategy", "batch")}
    return Contender(name, options, {**asked, "strategy": strategy, "strategy_value": str(checked.strategy)})


def _told(value: Any) -> str:
    """Return an option's value as text; of tensors in it, a digest."""
    if isinstance(value, Calibration):
        value = (value.points, value.refine, value.images)
    leaves = pytree.tree_leaves(value)
    held = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not held:
        return str(value)
    rest = [str(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
    return " ".join([digest_of_tensors(held), *rest])
