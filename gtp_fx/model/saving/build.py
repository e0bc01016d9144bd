"""A model built by timm's or Hugging Face's name, as a saved folder has it.

No code comes from a folder: timm's models are built by its registered names, Hugging Face's by transformers' classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtp_fx.capture.example_images import timm_shape
from gtp_fx.errors import LoadError, warn

_PLAIN = (bool, int, float, str)


def recipe_of(model: nn.Module) -> dict[str, Any] | None:
    """Return how `build` makes a model of this kind again, as plain values; None where its library doesn't tell."""
    if _is_hugging_face(model):
        attention = getattr(model.config, "_attn_implementation", None)  # which its config.json leaves out
        return {"transformers": type(model).__name__, "attention": attention if isinstance(attention, str) else None}
    return _timm_recipe(model)


def build(recipe: Mapping[str, Any] | None, folder: Path, name: str) -> nn.Module:
    """Return the model that a recipe describes, with random weights, in eval mode.

    name: of the saved model's class, for messages. Raises LoadError where it can't be built.
    """
    if recipe is None:
        raise LoadError(
            f"{folder}: a {name} isn't built by a name of timm's or transformers' alone: give model=, built as it was"
        )
    with torch.random.fork_rng(devices=[]):
        try:
            model = _hugging_face(recipe, folder) if "transformers" in recipe else _timm(recipe)
        except LoadError:
            raise
        except Exception as error:  # of the library that builds it, or of what is missing of it
            raise LoadError(
                f"{folder}: the {name} can't be built again ({type(error).__name__}: {error}): give model=, built as "
                f"it was"
            ) from error
    return model.eval()


def _is_hugging_face(model: nn.Module) -> bool:
    """Return whether a model is of a class that transformers has under its name."""
    names = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "transformers" not in names or not hasattr(model, "config"):
        return False
    import transformers

    return getattr(transformers, type(model).__name__, None) is type(model)


def _hugging_face(recipe: Mapping[str, Any], folder: Path) -> nn.Module:
    import transformers

    cls = getattr(transformers, recipe["transformers"], None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise LoadError(
            f"transformers {transformers.__version__} has no model {recipe['transformers']!r}: give model=, built as "
            f"it was"
        )
    given = {} if recipe.get("attention") is None else {"attn_implementation": recipe["attention"]}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **given)
    model: nn.Module = cls(config)
    return model


def _timm_recipe(model: nn.Module) -> dict[str, Any] | None:
    """Return timm's name of a model, and in what its attributes differ from those of the model of that name."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("architecture"):
        return None
    import timm

    name = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    if not timm.is_model(name):
        return None
    try:
        with torch.device("meta"):
            usual = timm.create_model(name)
    except Exception:  # a model that can't be built without numbers, or only with arguments
        return None
    if type(usual) is not type(model):  # a wrapper, which has the attributes of what is inside
        return None
    given: dict[str, Any] = {}
    for parameter in inspect.signature(type(usual).__init__).parameters:
        own, others = getattr(model, parameter, None), getattr(usual, parameter, None)
        if type(own) in _PLAIN and type(others) in _PLAIN and own != others:
            given[parameter] = own
    # Sizes of the image are no attributes of the model itself.
    shape, usual_shape = timm_shape(model), timm_shape(usual)
    if shape is not None and usual_shape is not None:
        if shape[0] != usual_shape[0]:
            given["in_chans"] = shape[0]
        if shape[1:] != usual_shape[1:]:
            given["img_size"] = list(shape[1:])
    if not _has_tensors_of(timm, name, given, model):
        warn(
            f"this {type(model).__name__} isn't built by timm's name {name!r} with what can be read off the model "
            f"({', '.join(given) or 'no arguments'}), and timm doesn't keep the arguments that it was built with: "
            f"gtp_fx.load(folder, model=…) will need it, built as it was",
        )
        return None
    return {"timm": name, "args": given}


def _has_tensors_of(timm: Any, name: str, given: Mapping[str, Any], model: nn.Module) -> bool:
    """Return whether timm's model of a name, built with arguments, has a model's tensors, by name and shape."""
    try:
        with torch.device("meta"):
            found = timm.create_model(name, **given)
    except Exception:  # of the library that builds it
        return False
    shapes = [{key: tensor.shape for key, tensor in each.state_dict().items()} for each in (found, model)]
    return shapes[0] == shapes[1]


def _timm(recipe: Mapping[str, Any]) -> nn.Module:
    import timm

    name, given = recipe["timm"], recipe["args"]
    if not timm.is_model(name):  # nothing that create_model would look for on a hub
        raise LoadError(f"timm {timm.__version__} has no model {name!r}: give model=, built as it was")
    if others := sorted(given.keys() & inspect.signature(timm.create_model).parameters.keys()):
        raise LoadError(f"timm's {name!r} is built with {', '.join(others)}, which is no part of a model: give model=")
    model: nn.Module = timm.create_model(name, pretrained=False, **given)
    return model
