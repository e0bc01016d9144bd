"""What a vision-language model does with its tower's output, found out by running it on other outputs.

What lies between tower and language model (a choice of layers, a projector) is Python that is never traced. The tower's
own output is recorded once. Then its forward answers with changed ones: with nan in one of them, to see which are read,
and with some tokens alone, to see whether those get the features that they have among all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gtp_fx.analysis.returned_tokens import ReturnedTokens
from gtp_fx.errors import CaptureError, OptionError, UnsupportedModelError
from gtp_fx.graph.verify import rounding_tolerance

Read = tuple[ReturnedTokens, int]
"""An output of a tower, and the patch tokens that the optimised tower returns of it."""
ENCODE = "get_image_features"
"""The method of transformers' vision-language models that runs tower and projector, and returns `pooler_output`."""


class Mixes(Exception):
    """What follows a tower doesn't take its tokens one by one; the message says what it does."""


@dataclass(frozen=True, eq=False)
class Called:
    """One call of a tower: its arguments, and the output's values, flat, with its structure.

    Whoever gets the output may change it: some models put their features in.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    values: list[Any]
    structure: pytree.TreeSpec

    def by_name(self, tower: nn.Module) -> dict[str, Any]:
        """Return the arguments by name. Raises CaptureError where they have none."""
        try:
            bound = inspect.signature(tower.forward).bind_partial(*self.args)
        except (TypeError, ValueError) as error:
            raise CaptureError(f"the model calls its tower in a way that has no names: {error}") from error
        return {**bound.arguments, **self.kwargs}


@dataclass(frozen=True, eq=False)
class AfterTower:
    """What a model does with its tower's outputs, found out by running it on others.

    tower: the tower.
    encode: encodes images, by the tower and what follows it.
    called: how the tower was called for them, and what it returned.
    whole: the features of each image that were made of that, [places, D].
    """

    tower: nn.Module
    encode: Callable[[], Any]
    called: Called
    whole: list[Tensor]

    def read(self, outputs: Sequence[Read]) -> tuple[Read, tuple[int, int]]:
        """Return the output that features are made of, and how many before and behind are no patches'.

        Raises Mixes where the features of some of its tokens aren't those that these have among all.
        """
        read = [(kept, left) for kept, left in outputs if self._is_read(kept)]
        if not read:
            raise Mixes("it reads none of the outputs that can have fewer")
        if len({left for _, left in read}) > 1:
            counts = ", ".join(f"{kept.name} with {left} patches" for kept, left in read)
            raise Mixes(f"it reads several together, of which different ones are left ({counts})")
        (kept, left), count = read[0], len(self.whole[0])
        before, behind, patches = kept.axis.prefix, kept.axis.suffix, kept.axis.domain.whole_count
        around = next((ends for ends in ((0, 0), (before, behind)) if patches + sum(ends) == count), None)
        if around is None:
            raise Mixes(f"of {patches} patches it makes {count} features")
        try:
            fewer = self._features({one.number: _cut(one, among) for one, among in outputs})
        except Exception as error:  # whatever a model's code raises where it counts on the number of tokens
            first = (str(error).splitlines() or [""])[0]
            raise Mixes(f"with {left} of {patches} patches it fails ({type(error).__name__}: {first})") from error
        rows = [*range(around[0]), *(around[0] + i for i in evenly(patches, left)), *range(count - around[1], count)]
        for few, all_of_them in zip(fewer, self.whole, strict=True):
            wanted = all_of_them[rows]
            limit = rounding_tolerance(wanted.dtype) * float(wanted.abs().max())
            if few.shape != wanted.shape or not bool((few - wanted).abs().max() <= limit):
                raise Mixes(f"a patch's features depend on which others there are ({left} of {patches} were left)")
        return read[0], around

    def _is_read(self, kept: ReturnedTokens) -> bool:
        """Return whether features depend on an output of the tower."""
        poisoned = self._features({kept.number: lambda value: torch.full_like(value, torch.nan)})
        return any(bool(image.isnan().any()) for image in poisoned)

    def _features(self, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Return the features where some outputs of the tower, by number, are changed."""
        changed = [changes[i](value) if i in changes else value for i, value in enumerate(self.called.values)]
        with _answering(self.tower, pytree.tree_unflatten(changed, self.called.structure)):
            return features_of(self.encode())


def _cut(kept: ReturnedTokens, left: int) -> Callable[[Tensor], Tensor]:
    """Return what takes some of an output's patch tokens, spread evenly, and all others."""
    axis = kept.axis
    size, last = axis.whole_size, axis.whole_size - axis.suffix
    rows = [*range(axis.prefix), *(axis.prefix + i for i in evenly(axis.domain.whole_count, left)), *range(last, size)]
    return lambda value: value.index_select(kept.dim, torch.tensor(rows, device=value.device))


def evenly(whole: int, some: int) -> list[int]:
    """Return as many numbers below `whole`, spread evenly."""
    return [i for i in range(whole) if (i + 1) * some // whole > i * some // whole]


def encoder(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """Return what encodes the images of `inputs`. Raises OptionError where the model has no such method."""
    method = getattr(getattr(model, "base_model", model), ENCODE, None)
    if method is None:
        raise OptionError(
            f"{type(model).__name__} has no {ENCODE}, by which transformers' models run their tower and projector: "
            f"call gtp_fx.optimize(tower, output='reduced') and shorten prompts as that model's processor needs it"
        )
    taken = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in taken.values()):
        raise OptionError(f"inputs hold no images that {ENCODE} takes: give a processor's output for text and image")
    return lambda: method(**taken, return_dict=True)


@contextmanager
def recording(module: nn.Module, calls: list[Called]) -> Iterator[None]:
    """Append each of a module's calls to `calls`."""

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Called(args, kwargs, *pytree.tree_flatten(output)))

    handle = module.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _answering(module: nn.Module, answer: Any) -> Iterator[None]:
    """Let a module's forward return `answer`, whatever it is called with."""
    before = vars(module).get("forward")
    module.__dict__["forward"] = lambda *_, **__: answer
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def features_of(encoded: Any) -> list[Tensor]:
    """Return the features of each image, [places, D]. Raises UnsupportedModelError where images differ in number."""
    features = getattr(encoded, "pooler_output", encoded)
    features = list(features) if isinstance(features, list | tuple | Tensor) else []
    alike = {tuple(image.shape) for image in features if isinstance(image, Tensor)}
    if len(alike) != 1 or len(next(iter(alike))) != 2:
        raise UnsupportedModelError(
            f"{ENCODE} returns features of shapes {sorted(alike)}, and images of one size are needed, with features "
            f"[places, D] each"
        )
    return features
