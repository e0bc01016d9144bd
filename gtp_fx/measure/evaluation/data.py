"""Images to evaluate on, as batches with labels and places: from a folder, or from batches that a user gives."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gtp_fx.errors import OptionError
from gtp_fx.measure.evaluation.image_set import NO_LABEL, ImageSet, Transformed
from gtp_fx.model.saving.tensors import digest_of


@dataclass(frozen=True)
class Batch:
    """Some images.

    images: [B, …], as they come.
    labels: their classes, or `NO_LABEL`.
    places: their numbers in the set.
    """

    images: Tensor
    labels: list[int]
    places: list[int]


@dataclass(frozen=True, eq=False)
class Data:
    """Images to evaluate on.

    name: what they are, in words.
    images: how many there are; None where that isn't known before they are read.
    fingerprint: recognises them in another run; "" where that can't be done.
    unlabelled: why there are no labels; "" where there are, or where it isn't known before they are read.
    first: returns the images of a first batch, which isn't used up by that.
    batches: yields batches with at least those of the given places that there are; all where it is given None.
    """

    name: str
    images: int | None
    fingerprint: str
    unlabelled: str
    first: Callable[[], Tensor]
    batches: Callable[[Collection[int] | None], Iterator[Batch]]


def of_folder(images: ImageSet, transform: Callable[[Any], Tensor], batch: int, workers: int) -> Data:
    """Return a folder's images as data.

    transform: from a picture to a tensor.
    batch: images in a batch.
    workers: processes that load images.
    """

    def batches(places: Collection[int] | None) -> Iterator[Batch]:
        todo = range(len(images.items)) if places is None else sorted(places)
        loader = DataLoader(Transformed(images, todo, transform), batch, num_workers=workers)
        for tensors, labels, numbers in loader:
            yield Batch(tensors, labels.tolist(), numbers.tolist())

    @functools.cache
    def first() -> Tensor:
        return next(batches(range(min(batch, len(images.items))))).images

    return Data(str(images.root), len(images.items), images.fingerprint, images.unlabelled, first, batches)


def of_batches(given: Iterable[Any]) -> Data:
    """Return a user's batches as data: each a tensor of images, or such a tensor and their labels.

    A tensor or a list is recognised in another run, by what it holds; an iterator or a DataLoader isn't.

    Raises OptionError for something else.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise OptionError(f"data={type(given).__name__}: give a folder, a tensor of images, or batches")
    name = f"a {type(given).__name__}"
    if isinstance(given, Tensor) or _is_labelled_batch(given):
        given = [given]
    start, given = _begun(given)
    if not isinstance(given, Sequence):
        return Data(name, None, "", "", lambda: start[0], lambda places: _numbered(map(_parts, given), places))
    known = list(map(_parts, given))
    return Data(
        name if len(known) == 1 else f"{len(known)} batches",
        sum(len(images) for images, _ in known),
        digest_of_tensors([images for images, _ in known], str([labels for _, labels in known])),
        "" if all(labels is not None for _, labels in known) else "the batches hold no labels",
        lambda: start[0],
        lambda places: _numbered(known, places),
    )


def digest_of_tensors(tensors: Iterable[Tensor], beside: str = "") -> str:
    """Return a digest of tensors and of what is told beside them."""
    digest = hashlib.sha256(beside.encode())
    for tensor in tensors:
        digest.update(digest_of(tensor).encode())
    return digest.hexdigest()[:16]


def _is_labelled_batch(given: Any) -> bool:
    """Return whether a pair is a batch of images and their labels, and not two batches of images."""
    is_pair = isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given)
    return is_pair and given[0].ndim > 1 == given[1].ndim


def _begun(given: Iterable[Any]) -> tuple[tuple[Tensor, list[int] | None], Iterable[Any]]:
    """Return the first batch, and what still yields all of them. Raises OptionError where there is none."""
    iterator = iter(given)
    try:
        first = next(iterator)
    except StopIteration:
        raise OptionError("data holds no batch: give at least one") from None
    return _parts(first), itertools.chain([first], iterator) if iterator is given else given


def _numbered(parts: Iterable[tuple[Tensor, list[int] | None]], places: Collection[int] | None) -> Iterator[Batch]:
    """Yield the batches that hold one of the places, or all of them."""
    start = 0
    for images, labels in parts:
        numbers = list(range(start, start + len(images)))
        start += len(images)
        if places is None or any(number in places for number in numbers):
            yield Batch(images, labels or [NO_LABEL] * len(images), numbers)


def _parts(batch: Any) -> tuple[Tensor, list[int] | None]:
    """Return a batch's images and labels. Raises OptionError for something else."""
    images, labels = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
    if not isinstance(images, Tensor) or not images.ndim:
        raise OptionError(
            f"data holds a {type(batch).__name__}, and a batch is a tensor of images [B, …] or (tensor, labels)"
        )
    if labels is None:
        return images, None
    numbers = torch.as_tensor(labels)
    if numbers.shape != images.shape[:1] or numbers.is_floating_point():
        raise OptionError(
            f"data holds {len(images)} images with labels {numbers.dtype}{list(numbers.shape)}: give an integer each"
        )
    return images, numbers.tolist()
