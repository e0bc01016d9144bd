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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.analysis.returned_tokens import ReturnedTokens
from gtp_fx.errors import InputError, OptionError, UnsupportedModelError
from gtp_fx.model.after_tower import AfterTower, Called, Mixes, encoder, evenly, features_of, recording
from gtp_fx.model.optimize import optimize
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.options.values import REDUCED
from gtp_fx.report.kept_tokens import KeptTokens


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

    def __repr__(self) -> str:
        """Return the counts, without the tower itself."""
        return (
            f"{type(self).__name__}(tower={self.path!r} at {self.tower.report.flops_ratio:.3f} of its FLOPs, "
            f"output={self.output.name!r}, image_token={self.image_token}: {self.after} tokens of an image instead of "
            f"{self.before})"
        )

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
        places = torch.tensor(evenly(self.before, self.after), device=ids_BL.device)
        stays_BL = ~is_image_BL | torch.isin(number_BL % self.before, places)
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
    if model.training:
        raise OptionError("the model is in training mode, in which features may be random: call model.eval() first")
    original, encode, token = _tower_of(model, tower), encoder(model, inputs), _image_token(model, image_token)
    calls: list[Called] = []
    with torch.no_grad(), recording(original, calls):
        whole = features_of(encode())
    if len(calls) != 1:
        raise UnsupportedModelError(f"{tower} is called {len(calls)} times for the images of a prompt, not once")
    (called,) = calls
    fast = optimize(original, example_inputs=called.by_name(original), output=REDUCED, **options)
    rest = AfterTower(original, encode, called, whole)
    outputs = [
        (kept, row.tokens - kept.axis.prefix - kept.axis.suffix)
        for kept, row in zip(fast.returned, fast.report.returned, strict=True)
    ]
    try:
        with torch.no_grad():
            (read, left), around = rest.read(outputs)
    except Mixes as why:
        raise UnsupportedModelError(
            f"what follows {tower} doesn't take its tokens one by one, so the language model can't get fewer of them: "
            f"{why}. gtp_fx.optimize(model.get_submodule({tower!r}), …) makes the tower alone faster, and its output "
            f"keeps its form"
        ) from None
    return ImageTokens(fast, tower, read, token, len(whole[0]), left + sum(around), around)


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
