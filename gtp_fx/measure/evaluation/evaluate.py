"""`gtp_fx.evaluate`: what optimised models keep of their original's answers on some images, and how fast they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.capture.wrapped import without_compiling
from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation import data as sources
from gtp_fx.measure.evaluation.contenders import contenders
from gtp_fx.measure.evaluation.data import Data
from gtp_fx.measure.evaluation.evaluation import Evaluation
from gtp_fx.measure.evaluation.found import Outputs, outputs_of
from gtp_fx.measure.evaluation.image_set import NO_CLASSES, read_set
from gtp_fx.measure.evaluation.results import evaluation_of, rows_before, write
from gtp_fx.measure.evaluation.rows import About, Row
from gtp_fx.measure.evaluation.session import How, Session
from gtp_fx.measure.evaluation.subject import Subject
from gtp_fx.measure.preparation import preparation_of
from gtp_fx.model.optimize import optimize
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.model.saving.record import versions_of
from gtp_fx.options.keywords import must_be_known
from gtp_fx.options.options import DEFAULTS
from gtp_fx.options.progress import progress_bar
from gtp_fx.plan.damage.divergence import scores_of
from gtp_fx.strategies import Strategy


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: str | Path | Tensor | Iterable[Any],
    *,
    budgets: Sequence[float] = (),
    latency_budgets: Sequence[float | str] = (),
    strategies: Sequence[str | Strategy] | Mapping[str, str | Strategy] = (DEFAULTS["strategy"],),
    optimised: Mapping[str, OptimizedModel] | None = None,
    class_map: str | Path | None = None,
    limit: int | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    compare: str = "auto",
    batch: int = 32,
    timing: bool = True,
    eager: bool = False,
    rounds: int = 15,
    workers: int = 0,
    out: str | Path | None = None,
    overwrite: bool = False,
    cache: bool = True,
    progress: bool = False,
    name: str = "",
    example_inputs: Any = None,
    **options: Any,
) -> Evaluation:
    """Compare a model with optimised ones on images: accuracy or agreement, distance of outputs, time and memory.

    model: in eval mode.
    data: a folder of images, or of a folder for each class; or a tensor of images; or batches, each a tensor or
        (tensor, labels). Without labels, or with another number of classes than the model has, it is agreement with
        the original's top-1 that is counted, and the result says why.
    budgets: FLOPs budgets, each for every strategy.
    latency_budgets: latency budgets, likewise.
    strategies: their names, or values such as GTP(alpha=0.2); as a mapping, by the names they have in the tables.
    optimised: models that `optimize` has made of `model`, by name, as further rows.
    class_map: a file with a folder's name a line, in the order of the model's outputs; by default a class is the
        folder's index by name, or what a Hugging Face model's configuration says.
    limit: most images of a folder to evaluate, evenly spaced.
    transform: from a picture to the model's input; by default what timm or Hugging Face has for the model.
    compare: what of the outputs is compared, "classes" or "features", where "auto" takes them for something else.
    batch: images in a batch of a folder, and in a timed run.
    timing: whether to time the models; without it nothing is compiled.
    eager: whether to compile nothing, and time eager models.
    rounds: rounds of timing; each runs every model once.
    workers: processes that load a folder's images.
    out: a folder for evaluation.json, .md and .png. What is there already isn't measured again: an evaluation that was
        broken off goes on, and further rows are added.
    overwrite: whether an evaluation of something else in that folder is replaced; else it is an error.
    cache: whether to keep the original's outputs in the user's cache, keyed by weights, images and preparation.
    progress: whether to show a progress bar.
    name: the model's name in the tables; its class's by default.
    options: the others of `gtp_fx.optimize`, the same for every row.

    Every row is timed and evaluated on the same images as the original. A strategy that can't be had at a budget is a
    row with the reason. Raises OptionError and CaptureError, and CheckError where the original's output is wrong.
    """
    model = without_compiling(model)
    _must_be_optional(options)
    for option, value in (("budgets", budgets), ("latency_budgets", latency_budgets)):
        if isinstance(value, str | float | int):
            raise OptionError(f"{option}={value!r}: give a list, {option}=[{value!r}]")
    must_be_positive(batch=batch, rounds=rounds, limit=limit)
    wanted = contenders(budgets, latency_budgets, strategies, optimised or {}, {**options, "batch": batch})
    source = None if isinstance(data, str | Path) else sources.of_batches(data)
    if source is not None and (class_map, limit, transform) != (None, None, None):
        raise OptionError("class_map=, limit= and transform= are for a folder of images, and data= is of tensors")
    subject = Subject.of(model, example_inputs, None if source is None else source.first()[:2])
    output = subject.called(model)(subject.example)
    kind, prepared = outputs_of(model, output, compare), ""
    if source is None:
        source, prepared = folder_of_images(
            model,
            Path(data),  # type: ignore[arg-type]
            _classes(output, kind),
            class_map=class_map,
            limit=limit,
            transform=transform,
            batch=batch,
            workers=workers,
        )
    run = identity(subject, source, prepared, kind, compiled=timing and not eager)
    folder = None if out is None else Path(out)
    about = About(
        name or type(model).__name__,
        run,
        source.name,
        source.images or 0,
        prepared,
        source.unlabelled if kind is Outputs.classes else NO_CLASSES,
        kind,
        sum(parameter.numel() for parameter in model.parameters()),
        subject.machine,
    )
    before = () if folder is None else rows_before(folder, run, overwrite)
    asked = {each.name: each.asked for each in wanted}
    known = {row.name: row for row in before if row.asked == asked.get(row.name)}
    new = [each for each in wanted if each.name not in known or not known[each.name].is_done(timing)]
    missing = {each.name: known[each.name] for each in new if each.name in known}

    def keep(rows: Sequence[Row]) -> None:
        if folder is not None:
            write(evaluation_of(about, before, rows, wanted), folder, whole=False)

    with progress_bar(progress) as show:
        session = Session(
            subject,
            source,
            kind,
            How(timing and not eager, timing, rounds, cache),
            run,
            None if folder is None else folder / "images",
            keep,
            show if progress else None,
        )
        rows, images, labelled = session.measure(new, missing)
    if not labelled and not about.unlabelled:
        about = replace(about, unlabelled="not all batches hold labels")
    done = evaluation_of(replace(about, images=images), before, rows, wanted)
    if folder is not None:
        write(done, folder)
    return done


def folder_of_images(
    model: nn.Module,
    folder: Path,
    classes: int | None,
    *,
    class_map: str | Path | None,
    limit: int | None,
    transform: Callable[[Any], Tensor] | None,
    batch: int,
    workers: int,
) -> tuple[Data, str]:
    """Return a folder as data, and how its pictures become inputs, in words.

    classes: how many the model has; None where its outputs are features.
    The others are those of `evaluate`.
    """
    names = getattr(getattr(model, "config", None), "label2id", None)
    whole = read_set(folder, classes, None if class_map is None else Path(class_map), names)
    images = whole.evenly(limit)
    told = str(folder) + (f" (evenly spaced among {len(whole.items)})" if len(images.items) < len(whole.items) else "")
    if transform is not None:
        prepare, prepared = transform, f"prepared by {getattr(transform, '__qualname__', type(transform).__name__)}"
    else:
        found = preparation_of(model)
        prepare, prepared = found.transform(), str(found)
    return replace(sources.of_folder(images, prepare, batch, workers), name=told), prepared


def identity(subject: Subject, source: Data, prepared: str, kind: Outputs, compiled: bool) -> dict[str, object]:
    """Return what decides the result of an evaluation, beside a row's own options, by name."""
    return {
        **versions_of(type(subject.model)),
        "model": type(subject.model).__name__,
        "weights": subject.weights,
        "data": source.fingerprint,
        "first_image": sources.digest_of_tensors([source.first()[:1]]),
        "images": source.images,
        "prepared": prepared,
        "outputs": kind.value,
        "dtype": subject.dtype,
        "device": subject.device,
        "how": "compiled" if compiled else "eager",
    }


def must_be_positive(**numbers: int | None) -> None:
    """Check that numbers, where they are given, are integers of at least 1. Raises OptionError."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise OptionError(f"{name}={value!r}: give an integer of at least 1")


def _classes(output: Any, kind: Outputs) -> int | None:
    scores = scores_of(output) if kind is Outputs.classes else None
    return None if scores is None else scores.shape[1]


def _must_be_optional(options: Mapping[str, Any]) -> None:
    """Check the names of the others of `optimize`'s options. Raises OptionError for one that isn't any."""
    instead = {
        "flops_budget": "budgets=[…]",
        "latency_budget": "latency_budgets=[…]",
        "strategy": "strategies=[…]",
        "compile": "eager= or timing=",
    }
    for name in options.keys() & instead:
        raise OptionError(f"evaluate makes several models, and takes {instead[name]} in place of {name}=")
    own = [
        parameter.name for parameter in inspect.signature(evaluate).parameters.values() if parameter.name != "options"
    ]
    must_be_known(options, [*own, *inspect.signature(optimize).parameters], "evaluate")
