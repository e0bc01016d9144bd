"""The user's options: one dataclass whose fields carry their defaults, help texts and checks.

`gtp_fx.optimize`, the backend's `options={…}` and the command line take all three from here. Names, defaults and help
texts are there without torch, which a check imports when it is needed: `gtp-fx --help` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from gtp_fx.errors import OptionError, did_you_mean
from gtp_fx.options import values
from gtp_fx.options.calibration import Calibration
from gtp_fx.options.latency_budget import LatencyBudget
from gtp_fx.options.schedule import AUTO, Schedule
from gtp_fx.options.values import FULL, REDUCED
from gtp_fx.targets import Target

if TYPE_CHECKING:
    import torch

    from gtp_fx.strategies import Auto, Strategy


def _option(default: Any, check: Callable[[Any], Any], help: str) -> Any:
    """Return a dataclass field for an option.

    default: as the user would write it.
    check: converts what the user wrote to a value, or raises OptionError.
    help: one or two sentences, shown by the command line and the documentation.
    """
    return field(default=default, metadata={"check": check, "help": help})


@dataclass(frozen=True)
class Options:
    """Validated options. Each field takes what the user wrote and holds the value that the code works with.

    `HELP` describes the fields. Raises OptionError with the bad value, the accepted ones and what to do.
    """

    flops_budget: float | None = _option(
        None,
        values.flops_budget,
        "Strict upper bound on FLOPs(result) / FLOPs(original), in (0, 1], including gtp_fx's own work; 1.0 applies "
        "only the exact passes, which keep the original's numbers.",
    )
    latency_budget: LatencyBudget | None = _option(
        None,
        values.latency_budget,
        "Upper bound on the predicted time of the compiled model on the target, for the batch; replaces the FLOPs "
        'budget: a ratio of the original\'s predicted time, in (0, 1], or a time such as "4.5ms".',
    )
    batch: int = _option(8, values.batch, "Images per run; used for predicted times only.")
    schedule: str | Schedule | tuple[int, ...] = _option(
        AUTO,
        values.schedule,
        '"auto" (least expected damage within the budget), "uniform" (the paper\'s constant count per block), "even" '
        "(uniform, with the remainder spread token by token), the number of tokens removed at each attention block, in "
        "order, or a Schedule, also as a file of its JSON, x.json.",
    )
    strategy: Strategy | Auto = _option(
        "regeneration",
        values.strategy,
        'Which tokens are removed, and what becomes of them: "regeneration", "gtp" (as published), …, with values '
        'where they are others than its own, "gtp(alpha=0.2)" or GTP(alpha=0.2), or "auto": with calibration images, '
        "the one that moves outputs least of all strategies, their variants and schedules; without any, the default.",
    )
    target: Target = _option(
        "auto",
        values.target,
        'Processor to compile and predict for, by name; "auto" is this machine\'s own. `gtp-fx tune` measures the '
        "rates that predictions for this machine use.",
    )
    disabled_passes: tuple[str, ...] = _option(
        (), values.disabled_passes, "Names of exact passes to leave out, to see what one does or to do without it."
    )
    dump_graphs: str | None = _option(
        None,
        values.dump_graphs,
        'Folder for the graph after each pass; TORCH_LOGS="+gtp_fx" and TORCH_TRACE report the same while it runs.',
    )
    calibration: Calibration | None = _option(
        None,
        values.calibration,
        'Some dozens of unlabelled images (a tensor, a list of batches, or a Calibration), on which schedule="auto" '
        "measures how many tokens each block can do without, instead of using a prior.",
    )
    prefix_tokens: int | None = _option(
        None,
        values.prefix_tokens,
        "Number of tokens before the patches (CLS, registers) where tokens come in as an argument, which doesn't show "
        "it: an encoder without its embedding, or what follows a graph break. By default the first five stay.",
    )
    mode: str | None = _option(
        None,
        values.mode,
        "torch.compile's mode: reduce-overhead (CUDA graphs, for small batches), max-autotune, …; it overrides the "
        "target's options for Inductor.",
    )
    shapes: str = _option(
        "auto",
        values.shapes,
        '"shared": blocks that differ in nothing but their number of tokens share compiled code, so the first call '
        "takes about as long as the original's, and runs are up to some per cent slower; "
        '"static": every number of tokens has code of its own; '
        '"auto": "shared" on a CPU where no gradients are computed, no mode is given and blocks hold no convolutions, '
        'else "static".',
    )
    output: str = _option(
        FULL,
        values.output,
        '"full": maps of tokens that the model returns have all of them, those removed put back; "reduced": they have '
        "the tokens that are left, for a reader that takes any number (a language model after a vision tower), and "
        "`with_kept_tokens` says which these are.",
    )
    strict: bool = _option(
        False,
        values.strict,
        "The backend's own: raise where it would warn and compile a graph as it is (no attention over patches in it, "
        "or a fault of gtp_fx). `optimize` always raises.",
    )

    def __post_init__(self) -> None:
        """Check each value separately, then the combinations that exclude each other."""
        from gtp_fx.strategies.plain_numbers import plain

        given_schedule, given_latency = self.schedule, self.latency_budget
        for option in fields(self):
            value = getattr(self, option.name)
            value = value if option.name == "calibration" else plain(value)
            object.__setattr__(self, option.name, option.metadata["check"](value))
        if self.flops_budget is None and self.latency_budget is None and isinstance(self.schedule, str):
            raise OptionError(
                f"schedule={self.schedule!r} needs a budget: give flops_budget=0.74 (a ratio in (0, 1]) or "
                f"latency_budget=0.74, or give the tokens removed at each attention block, schedule=[8, 8, …]"
            )
        if self.latency_budget is not None and (self.flops_budget is not None or not isinstance(self.schedule, str)):
            other = "flops_budget" if self.flops_budget is not None else "a schedule that gives its counts"
            raise OptionError(f"latency_budget={given_latency!r} and {other}: give one of them")
        if self.calibration is not None and self.schedule != AUTO:
            raise OptionError(
                f"calibration= is what schedule='auto' learns from, alone or together with strategy='auto', and the "
                f"schedule is {given_schedule!r}: give one"
            )

    @classmethod
    def of(cls, **given: Any) -> Options:
        """Return options from keyword arguments, named and written as the user writes them."""
        return cls(**given)

    @classmethod
    def of_backend(cls, given: Mapping[str, Any]) -> Options:
        """Return the options of `torch.compile(backend="gtp", options={…})`. Raises OptionError for an unknown name."""
        known = [option.name for option in fields(cls) if option.name != "calibration"]
        if "calibration" in given:
            raise OptionError(
                "calibration runs the model, but a backend has only its graph: call gtp_fx.optimize(model, "
                "calibration=…) once and give what it found, options={'schedule': optimised.schedule, 'strategy': "
                "optimised.strategy}"
            )
        unknown = sorted(set(given) - set(known))
        if unknown:
            meant = did_you_mean(unknown[0], known) or "."
            raise OptionError(
                f"unknown option {', '.join(map(repr, unknown))}{meant} The backend knows {', '.join(known)}"
            )
        options = cls(**given)
        if options.output != FULL:
            raise OptionError(
                f"output={options.output!r} changes the shape of what a model returns, which the code that Dynamo "
                f"traced around this graph was compiled for: call gtp_fx.optimize(model, output={options.output!r}, …)"
            )
        return options

    @property
    def first_strategy(self) -> Strategy:
        """Return the strategy given, or the one that "auto" is without calibration images."""
        from gtp_fx.strategies import Auto

        return self.strategy.first if isinstance(self.strategy, Auto) else self.strategy

    @property
    def as_left(self) -> bool:
        """Return whether maps of tokens are returned with those that are left."""
        return self.output == REDUCED

    @property
    def exact_only(self) -> bool:
        """Return whether only the exact passes are requested."""
        return isinstance(self.schedule, str) and self.flops_budget == 1.0

    @property
    def budget(self) -> str:
        """Return the budget as the user writes it."""
        if self.latency_budget is not None:
            return f"latency_budget={self.latency_budget}"
        return "the counts given" if self.flops_budget is None else f"flops_budget={self.flops_budget:g}"

    def inductor(self, device: torch.device) -> dict[str, Any]:
        """Return the options for Inductor, for a graph that runs on `device`."""
        from gtp_fx.options.inductor import inductor_options

        return inductor_options(self.target, self.mode, device)

    def limit(self, original: float) -> float:
        """Return the most that the result may cost, in FLOPs or seconds, where the original costs `original`."""
        if self.latency_budget is not None:
            return self.latency_budget.limit(original)
        assert self.flops_budget is not None
        return self.flops_budget * original


HELP: Mapping[str, str] = {option.name: option.metadata["help"] for option in fields(Options)}
"""Each option's help text, by name."""
DEFAULTS: Mapping[str, Any] = {option.name: option.default for option in fields(Options)}
"""Each option's default, as the user would write it."""
