"""A pass over images: the original and every optimised model run on each batch, and what is found is recorded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from gtp_fx.errors import CheckError
from gtp_fx.measure.benchmark import ORIGINAL
from gtp_fx.measure.evaluation.base_outputs import BaseOutputs
from gtp_fx.measure.evaluation.data import Batch, Data
from gtp_fx.measure.evaluation.found import Found, Outputs, compared, found_on
from gtp_fx.measure.evaluation.record import Record
from gtp_fx.measure.evaluation.subject import Model
from gtp_fx.options.progress import Progress


def evaluate_on(
    data: Data,
    models: Mapping[str, Model],
    records: Mapping[str, Record],
    kind: Outputs,
    base: BaseOutputs,
    placed: Callable[[Tensor], Tensor],
    *,
    size: int = 0,
    progress: Progress | None = None,
) -> tuple[int, bool, dict[str, str]]:
    """Run models on the images that their records lack; what is found goes there.

    models: by name, the original among them.
    records: of each optimised model.
    base: the original's outputs, as far as they are kept.
    placed: puts images on the models' device.
    size: images in a batch, to which a smaller one is filled up so that no model is compiled anew; 0 for none.

    Returns how many images there were, whether they had labels, and by name why a model's outputs aren't right.
    Raises CheckError where the original's aren't.
    """
    todo = None if data.images is None else _lacking(data.images, records)
    total, done, labelled, wrong = 0 if todo is None else len(todo), 0, True, {}
    for batch in () if todo is not None and not todo else data.batches(todo):
        if progress is not None:
            progress("images", done, max(total, done))
        full = _filled(placed(batch.images), size)
        count = len(batch.places)
        run = functools.partial(_outputs, ORIGINAL, models[ORIGINAL], full, kind, count)
        before = base.at(batch.places, run)
        for name, record in records.items():
            lacking = [i for i, place in enumerate(batch.places) if place not in record.found]
            if not lacking or name in wrong:
                continue
            try:
                since = _outputs(name, models[name], full, kind, count)
                _must_match(before, since)
            except CheckError as error:
                wrong[name] = str(error)
                continue
            record.add(_found(before, since, kind, batch, lacking))
        labelled = labelled and min(batch.labels) >= 0
        done += count
    return (done if data.images is None else data.images), labelled, wrong


def _lacking(images: int, records: Mapping[str, Record]) -> set[int]:
    """Return the places of images that a record lacks."""
    return {place for record in records.values() for place in range(images) if place not in record.found}


def _outputs(name: str, model: Model, images: Tensor, kind: Outputs, count: int) -> list[Tensor]:
    """Return a model's outputs on the first `count` images. Raises CheckError where one isn't finite."""
    outputs = [t[:count] for t in compared(model(images), kind)]
    if not all(bool(t.isfinite().all()) for t in outputs):
        raise CheckError(f"the output of {name} is not finite; are these weights whole?")
    return outputs


def _must_match(before: list[Tensor], since: list[Tensor]) -> None:
    shapes = [[list(t.shape[1:]) for t in outputs] for outputs in (before, since)]
    if shapes[0] != shapes[1]:
        raise CheckError(f"the optimised model's output is {shapes[1]} an image, the original's {shapes[0]}")


def _found(before: list[Tensor], since: list[Tensor], kind: Outputs, batch: Batch, rows: list[int]) -> Iterable[Found]:
    mine, theirs = ([t[rows] for t in outputs] for outputs in (before, since))
    labels, places = ([values[i] for i in rows] for values in (batch.labels, batch.places))
    return found_on(mine, theirs, kind, labels, places)


def _filled(images: Tensor, size: int) -> Tensor:
    """Return images with the last one repeated, up to `size`."""
    missing = size - len(images)
    return images if missing <= 0 else torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])
