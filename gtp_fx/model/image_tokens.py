"""Fewer image tokens in a language model's prompt: its vision tower optimised, and what has to fit that.

    images = gtp_fx.fewer_image_tokens(vlm, inputs, tower="model.vision_tower", flops_budget=0.6)
    vlm.set_submodule(images.path, images.tower)
    vlm.generate(**images.prompt(inputs))

`inputs` are what the processor makes of a prompt with images. The tower returns the tokens that are left
(output="reduced"), so a prompt has to have as many places for them. What lies between tower and language model (a
projector) isn't traced. It is run on some of the original tower's tokens: what comes out has to be those tokens' own
features, as by a projector that works token by token. One that merges neighbours is refused.
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
from gtp_fx.errors import CaptureError, InputError, OptionError, UnsupportedModelError
from gtp_fx.graph.verify import rounding_tolerance
from gtp_fx.model.optimize import optimize
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.options import REDUCED
from gtp_fx.report.kept_tokens import KeptTokens

Read = tuple[ReturnedTokens, int]
"""An output of a tower, and the patch tokens that the optimised tower returns of it."""
_ENCODE = "get_image_features"
"""The method of transformers' vision-language models that runs tower and projector, and returns `pooler_output`."""


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """A vision tower that returns fewer tokens, and how prompts change with it.

    tower: the optimised tower, which goes in the original's place.
    path: that place, "model.vision_tower".
    output: which of the tower's outputs the language model gets; its name is "hidden_states[5]".
    image_token: the id that holds an image's places in a prompt.
    before, after: places of one image in the original's prompts, and in the shorter ones.
    around: how many of them, at an image's beginning and end, are for tokens that are no patches (CLS).
    """

    tower: OptimizedModel
    path: str
    output: ReturnedTokens
    image_token: int
    before: int
    after: int
    around: tuple[int, int] = (0, 0)

    def kept_tokens(self, *args: Any, **kwargs: Any) -> KeptTokens | None:
        """Return which tokens the language model gets of some images; None where it gets all.

        Takes the tower's own arguments; flags that the model calls it with need not be given.
        """
        flags = {name: value for name, value in self.tower.signature.kwargs.items() if not isinstance(value, Tensor)}
        return self.tower.kept_by_output(*args, **{**flags, **kwargs})[self.output.number]

    def prompt(self, inputs: Mapping[str, Any], kept: KeptTokens | None = None) -> dict[str, Any]:
        """Return a processor's output with as many image tokens as the tower returns.

        inputs: with input_ids [B, L]. Every tensor [B, L] beside it (attention_mask, token_type_ids, labels) loses the
            same places. They are lost evenly over an image, so that what stands between its rows stays between.
        kept: from `kept_tokens`, of all images in the prompts' order. With them, the result has position_ids: each
            token has the position in the language model that its patch had in the long prompt, and so has the text. By
            default positions follow each other, as they do in any prompt.

        Raises InputError where a prompt has other numbers of image tokens, or prompts of one batch have different ones.
        """
        ids_BL = inputs.get("input_ids")
        if not isinstance(ids_BL, Tensor) or ids_BL.ndim != 2:
            raise InputError("prompt takes a processor's output with input_ids, a tensor [B, L]")
        is_image_BL = ids_BL == self.image_token
        counts = is_image_BL.sum(dim=1)
        number_BL = is_image_BL.cumsum(dim=1) - 1  # of each image token in its row
        if bool((counts % self.before).any()) or bool((counts != counts[0]).any()):
            raise InputError(
                f"these prompts have {counts.tolist()} image tokens ({self.image_token}), and an image of this model "
                f"has {self.before}: give prompts with as many images each, of the size that the tower is optimised for"
            )
        evenly = torch.tensor(_evenly(self.before, self.after), device=ids_BL.device)
        stays_BL = ~is_image_BL | torch.isin(number_BL % self.before, evenly)
        shape, length = tuple(ids_BL.shape), int(stays_BL[0].sum())

        def shorter(value: Any) -> Any:
            if not isinstance(value, Tensor) or tuple(value.shape) != shape:
                return value
            return value[stays_BL.to(value.device)].reshape(shape[0], length)

        result = {name: shorter(value) for name, value in inputs.items()}
        if kept is not None:
            result["position_ids"] = self._positions(inputs, is_image_BL, stays_BL, kept)
        return result

    def _positions(self, inputs: Mapping[str, Any], is_image_BL: Tensor, stays_BL: Tensor, kept: KeptTokens) -> Tensor:
        """Return the position of each token that stays: its own, or its patch's."""
        images, rows = int(is_image_BL.sum()) // self.before, len(is_image_BL)
        prefix, suffix = self.around
        left = self.after - prefix - suffix
        if tuple(kept.positions.shape) != (images, left):
            raise InputError(
                f"kept has positions of shape {list(kept.positions.shape)}, and these prompts have {images} images of "
                f"{left} patch tokens: give those of output {self.output.name!r}, of these images"
            )
        mask_BL = inputs.get("attention_mask")
        mask_BL = torch.ones_like(is_image_BL) if mask_BL is None else mask_BL
        position_BL = (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)
        places = position_BL[is_image_BL].reshape(images, self.before)
        own = kept.positions.to(places.device) + prefix
        taken = [places[:, :prefix], places.gather(1, own), places[:, self.before - suffix :]]
        position_BL = position_BL[stays_BL].reshape(rows, -1)
        position_BL[is_image_BL[stays_BL].reshape(rows, -1)] = torch.cat(taken, dim=1).flatten()
        return position_BL


def fewer_image_tokens(
    model: nn.Module, inputs: Mapping[str, Any], *, tower: str, image_token: int | None = None, **options: Any
) -> ImageTokens:
    """Optimise the vision tower of a vision-language model so that the language model gets fewer image tokens.

    model: of transformers, with `get_image_features`. It is not changed.
    inputs: what its processor makes of a prompt with an image, of the size that it will be called with.
    tower: path of the vision tower, "model.vision_tower". It is captured as the model calls it.
    image_token: the id that holds an image's places in a prompt; None takes the configuration's `image_token_id`.
    options: `gtp_fx.optimize`'s, such as flops_budget; output="reduced" goes without saying.

    Raises what `gtp_fx.optimize` raises; OptionError where there is no such tower or no such id, and
    UnsupportedModelError where what follows the tower doesn't take its tokens one by one.
    """
    if options.get("output", REDUCED) != REDUCED or "example_inputs" in options:
        raise OptionError(
            "fewer_image_tokens finds example_inputs by itself and always has output='reduced': for the same output as "
            "the original's, call gtp_fx.optimize(tower, …) and put the result in the tower's place"
        )
    original, encode, token = _tower_of(model, tower), _encoder(model, inputs), _image_token(model, image_token)
    calls: list[_Called] = []
    with torch.no_grad(), _recording(original, calls):
        whole = _features(encode())
    if len(calls) != 1:
        raise UnsupportedModelError(f"{tower} is called {len(calls)} times for the images of a prompt, not once")
    called = calls[0]
    fast = optimize(original, example_inputs=called.by_name(original), output=REDUCED, **options)
    rest = _Rest(original, encode, called, whole)
    outputs = [
        (kept, row.tokens - _others(kept)) for kept, row in zip(fast.returned, fast.report.returned, strict=True)
    ]
    try:
        with torch.no_grad():
            (read, left), around = rest.read(outputs)
    except _Mixes as why:
        raise UnsupportedModelError(
            f"what follows {tower} doesn't take its tokens one by one, so the language model can't get fewer of them: "
            f"{why}. gtp_fx.optimize(model.get_submodule({tower!r}), …) makes the tower alone faster, and its output "
            f"keeps its form"
        ) from None
    return ImageTokens(fast, tower, read, token, len(whole[0]), left + sum(around), around)


class _Mixes(Exception):
    """What follows a tower doesn't take its tokens one by one; the message says what it does."""


@dataclass(frozen=True, eq=False)
class _Called:
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
class _Rest:
    """What a model does with its tower's outputs, found out by running it on others.

    tower: the tower.
    encode: encodes images, by the tower and what follows it.
    called: how the tower was called for them, and what it returned.
    whole: the features of each image that were made of that, [places, D].
    """

    tower: nn.Module
    encode: Callable[[], Any]
    called: _Called
    whole: list[Tensor]

    def read(self, outputs: Sequence[Read]) -> tuple[Read, tuple[int, int]]:
        """Return the output that features are made of, and how many before and behind are no patches'.

        Raises _Mixes where the features of some of its tokens aren't those that these have among all.
        """
        read = [(kept, left) for kept, left in outputs if self._is_read(kept)]
        if not read:
            raise _Mixes("it reads none of the outputs that can have fewer")
        if len({left for _, left in read}) > 1:
            counts = ", ".join(f"{kept.name} with {left} patches" for kept, left in read)
            raise _Mixes(f"it reads several together, of which different ones are left ({counts})")
        (kept, left), count = read[0], len(self.whole[0])
        before, behind, patches = kept.axis.prefix, kept.axis.suffix, kept.axis.domain.whole_count
        around = next((ends for ends in ((0, 0), (before, behind)) if patches + sum(ends) == count), None)
        if around is None:
            raise _Mixes(f"of {patches} patches it makes {count} features")
        try:
            fewer = self._features({one.number: _cut(one, among) for one, among in outputs})
        except Exception as error:  # whatever a model's code raises where it counts on the number of tokens
            first = (str(error).splitlines() or [""])[0]
            raise _Mixes(f"with {left} of {patches} patches it fails ({type(error).__name__}: {first})") from error
        rows = [*range(around[0]), *(around[0] + i for i in _evenly(patches, left)), *range(count - around[1], count)]
        for few, all_of_them in zip(fewer, self.whole, strict=True):
            wanted = all_of_them[rows]
            limit = rounding_tolerance(wanted.dtype) * float(wanted.abs().max())
            if few.shape != wanted.shape or not bool((few - wanted).abs().max() <= limit):
                raise _Mixes(f"a patch's features depend on which others there are ({left} of {patches} were left)")
        return read[0], around

    def _is_read(self, kept: ReturnedTokens) -> bool:
        """Return whether features depend on an output of the tower."""
        poisoned = self._features({kept.number: lambda value: torch.full_like(value, torch.nan)})
        return any(bool(image.isnan().any()) for image in poisoned)

    def _features(self, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> list[Tensor]:
        """Return the features where some outputs of the tower, by number, are changed."""
        changed = [changes[i](value) if i in changes else value for i, value in enumerate(self.called.values)]
        with _answering(self.tower, pytree.tree_unflatten(changed, self.called.structure)):
            return _features(self.encode())


def _cut(kept: ReturnedTokens, left: int) -> Callable[[Tensor], Tensor]:
    """Return what takes some of an output's patch tokens, spread evenly, and all others."""
    axis = kept.axis
    size, last = axis.whole_size, axis.whole_size - axis.suffix
    rows = [*range(axis.prefix), *(axis.prefix + i for i in _evenly(axis.domain.whole_count, left)), *range(last, size)]
    return lambda value: value.index_select(kept.dim, torch.tensor(rows, device=value.device))


def _others(kept: ReturnedTokens) -> int:
    """Return how many of an output's tokens are no patches."""
    return kept.axis.prefix + kept.axis.suffix


def _evenly(whole: int, some: int) -> list[int]:
    """Return as many numbers below `whole`, spread evenly."""
    return [i for i in range(whole) if (i + 1) * some // whole > i * some // whole]


def _tower_of(model: nn.Module, path: str) -> nn.Module:
    """Return the vision tower. Raises OptionError where there is none, or one that is optimised already."""
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise OptionError(f"tower={path!r}: {error}; give the path of the vision tower in the model") from None
    if isinstance(found, OptimizedModel):
        raise OptionError(f"tower={path!r} is optimised already: put the original in its place first")
    return found


def _image_token(model: nn.Module, given: int | None) -> int:
    """Return the id of image tokens. Raises OptionError where it isn't known."""
    found = getattr(getattr(model, "config", None), "image_token_id", None) if given is None else given
    if not isinstance(found, int):
        raise OptionError("the model's configuration has no image_token_id: give image_token=")
    return found


def _encoder(model: nn.Module, inputs: Mapping[str, Any]) -> Callable[[], Any]:
    """Return what encodes the images of `inputs`. Raises OptionError where the model has no such method."""
    method = getattr(getattr(model, "base_model", model), _ENCODE, None)
    if method is None:
        raise OptionError(
            f"{type(model).__name__} has no {_ENCODE}, by which transformers' models run their tower and projector: "
            f"call gtp_fx.optimize(tower, output='reduced') and shorten prompts as that model's processor needs it"
        )
    taken = {name: inputs[name] for name in inspect.signature(method).parameters if name in inputs}
    if not any(isinstance(value, Tensor) and value.is_floating_point() for value in taken.values()):
        raise OptionError(f"inputs hold no images that {_ENCODE} takes: give a processor's output for text and image")
    return lambda: method(**taken, return_dict=True)


@contextmanager
def _recording(module: nn.Module, calls: list[_Called]) -> Iterator[None]:
    """Append each of a module's calls to `calls`."""

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Called(args, kwargs, *pytree.tree_flatten(output)))

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


def _features(encoded: Any) -> list[Tensor]:
    """Return the features of each image, [places, D]. Raises UnsupportedModelError where images differ in number."""
    features = getattr(encoded, "pooler_output", encoded)
    features = list(features) if isinstance(features, list | tuple | Tensor) else []
    alike = {tuple(image.shape) for image in features if isinstance(image, Tensor)}
    if len(alike) != 1 or len(next(iter(alike))) != 2:
        raise UnsupportedModelError(
            f"{_ENCODE} returns features of shapes {sorted(alike)}, and images of one size are needed, with features "
            f"[places, D] each"
        )
    return features
