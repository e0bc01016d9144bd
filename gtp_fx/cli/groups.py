"""Groups of options that several commands share, each defined once: where a model is from, and what is made of it.

A command's function takes a group as one value; `grouped` spells its fields out for Typer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gtp_fx.cli.arguments import (
    Batch,
    Calibration,
    Device,
    Dtype,
    FlopsBudget,
    FlopsBudgets,
    ImgSize,
    LatencyBudget,
    LatencyBudgets,
    ModelArgs,
    NumClasses,
    Pretrained,
    ScheduleText,
    Strategies,
    Strategy,
    Target,
    Weights,
    WeightsKey,
)
from gtp_fx.cli.endings import say_aside
from gtp_fx.cli.typed import budgets, built_with, option_values
from gtp_fx.errors import OptionError
from gtp_fx.options.options import DEFAULTS, Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gtp_fx.cli.weights import LoadedModel


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the fields of its groups as options of its own, where the groups stand.

    A group is a parameter whose type is a dataclass of fields that Typer reads.
    """
    hints = get_type_hints(command, include_extras=True)
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not (isinstance(kind, type) and hasattr(kind, "__dataclass_fields__")):
            parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=kind))
            continue
        groups[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = parameter.empty if field.default is MISSING else field.default
            parameters.append(
                inspect.Parameter(field.name, parameter.KEYWORD_ONLY, default=default, annotation=types[field.name])
            )

    def flat(**given: Any) -> None:
        made = {
            name: kind(**{field.name: given.pop(field.name) for field in fields(kind)}) for name, kind in groups.items()
        }
        command(**given, **made)

    flat.__name__, flat.__doc__, flat.__module__ = command.__name__, command.__doc__, command.__module__
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return flat


@dataclass(frozen=True)
class Build:
    """How MODEL is built."""

    num_classes: NumClasses = None
    img_size: ImgSize = None
    model_arg: ModelArgs = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Return the arguments it is built with. Raises OptionError where one is written wrongly."""
        return built_with(self.num_classes, self.img_size, self.model_arg)


@dataclass(frozen=True)
class Source(Build):
    """How MODEL is built, and where its weights are from."""

    weights: Weights = None
    weights_key: WeightsKey = None
    pretrained: Pretrained = False

    def load(self, name: str, dtype: Dtype = Dtype.float32, device: Device = Device.cpu) -> LoadedModel:
        """Load the model onto a device, in a dtype. Raises OptionError where there is no GPU, and LoadError."""
        import torch

        from gtp_fx.cli.models import load_named

        if device is Device.cuda and not torch.cuda.is_available():
            raise OptionError("--device cuda: torch finds no GPU here; give --device cpu")
        loaded = load_named(
            name,
            pretrained=self.pretrained,
            weights=self.weights,
            weights_key=self.weights_key,
            built_with=self.arguments,
        )
        loaded.model.to(device.value, getattr(torch, dtype.value))
        return loaded


@dataclass(frozen=True)
class Placed(Source):
    """How MODEL is built, where its weights are from, and where it runs."""

    dtype: Annotated[Dtype, typer.Option(help="Dtype of the weights and images.")] = Dtype.float32
    device: Annotated[Device, typer.Option(help="Where the models run.")] = Device.cpu

    def placed(self, name: str) -> LoadedModel:
        """Load the model onto its device. Raises OptionError where there is none, and LoadError."""
        return self.load(name, self.dtype, self.device)

    def told(self, loaded: LoadedModel) -> str:
        """Return a line on what was loaded."""
        return f"{loaded.name}, weights: {loaded.weights_origin}; {self.dtype.value} on {self.device.value}"


@dataclass(frozen=True)
class Making:
    """What is made of a model: the options of `gtp_fx.optimize` for one result."""

    flops_budget: FlopsBudget = DEFAULTS["flops_budget"]
    latency_budget: LatencyBudget = DEFAULTS["latency_budget"]
    schedule: ScheduleText = DEFAULTS["schedule"]
    strategy: Strategy = DEFAULTS["strategy"]
    calibration: Calibration = None
    target: Target = DEFAULTS["target"]
    batch: Batch = DEFAULTS["batch"]

    def checked(self, **others: Any) -> Chosen:
        """Return the options, with `others` of `gtp_fx.optimize`, before any model is loaded. Raises OptionError."""
        values = option_values(
            self.flops_budget, self.latency_budget, self.schedule, self.strategy, self.target, self.batch, **others
        )
        return Chosen(values, _pictures(self.calibration, [self.strategy], values))


@dataclass(frozen=True)
class Makings:
    """What is made of a model: the options of `gtp_fx.optimize` for several results, by strategy and budget."""

    flops_budget: FlopsBudgets = None
    latency_budget: LatencyBudgets = None
    strategy: Strategies = None
    schedule: ScheduleText = DEFAULTS["schedule"]
    calibration: Calibration = None
    target: Target = DEFAULTS["target"]

    @property
    def strategies(self) -> list[str]:
        """Return the strategies that were given, or the default."""
        return self.strategy or [DEFAULTS["strategy"]]

    @property
    def budgets(self) -> list[tuple[float | None, str | None]]:
        """Return the budgets as pairs (FLOPs, latency). Raises OptionError where there is none."""
        return budgets(self.flops_budget, self.latency_budget, self.schedule)

    def checked(self, batch: int, mode: str | None) -> dict[tuple[str, float | None, str | None], Chosen]:
        """Return the options of each result, by strategy and budget, before any model is loaded. Raises OptionError."""
        values = {
            (strategy, *budget): option_values(*budget, self.schedule, strategy, self.target, batch, mode)
            for strategy in self.strategies
            for budget in self.budgets
        }
        pictures = _pictures(self.calibration, self.strategies, *values.values())
        return {which: Chosen(each, pictures) for which, each in values.items()}


@dataclass(frozen=True)
class Chosen:
    """Checked options of one result.

    values: keyword arguments of `gtp_fx.optimize`.
    pictures: files of calibration's photographs; None without calibration.
    """

    values: dict[str, Any]
    pictures: Sequence[Path] | None

    def images(self, model: nn.Module) -> Tensor | None:
        """Return calibration's photographs, prepared for a model. Raises OptionError where one can't be read."""
        if self.pictures is None:
            return None
        from gtp_fx.cli.photo import prepared_batch

        return prepared_batch(model, self.pictures)

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Return the keyword arguments of `gtp_fx.optimize` for a model."""
        images = self.images(model)
        return self.values if images is None else {**self.values, "calibration": images}


def _pictures(folder: Path | None, strategies: Collection[str], *values: dict[str, Any]) -> list[Path] | None:
    """Return the files of calibration's photographs, where there is a folder of them.

    Raises OptionError where the folder holds none, or options don't go together with it.
    """
    if folder is None:
        tell_of_auto(strategies, "give --calibration FOLDER, by whose photographs one is chosen")
        return None
    from gtp_fx.cli.photo import pictures_in

    pictures = pictures_in(folder)
    for each in values:
        Options.of(**each, calibration=pictures)
    return pictures


def tell_of_auto(strategies: Collection[str], advice: str) -> None:
    """Say on stderr what becomes of --strategy auto where there are no photographs. advice: what to do about it."""
    from gtp_fx.strategies.registry import AUTO  # which imports torch

    if AUTO in strategies:
        say_aside(f"--strategy {AUTO}: without photographs this is {DEFAULTS['strategy']}, the default: {advice}")
