"""Models by name: timm's, Hugging Face's, or the user's own.

deit_small_patch16_224          timm's name
path/to/model                   a directory with Hugging Face's config.json, and weights if it has some
google/vit-base-patch16-224     a model on the hub; its weights are only downloaded with `pretrained`
ViTForImageClassification       a class of transformers, with its default configuration
package.module:factory          a function without arguments that returns the model

Only the last form runs code that isn't installed. Code in a directory or on the hub is never run.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtp_fx.cli.weights import (
    LoadedModel,
    build_on_meta,
    fill,
    first_line,
    load_model,
    one_source,
    random_origin,
    read_state_dict,
    seeded,
)
from gtp_fx.errors import LoadError


def load_named(name: str, *, pretrained: bool = False, weights: str | Path | None = None) -> LoadedModel:
    """Return the model in eval mode, float32, on the CPU.

    Its weights are random where neither argument nor the name's directory or factory gives any.

    pretrained: download weights, from timm or the hub.
    weights: file of weights, safetensors or a torch state dict.

    Raises LoadError.
    """
    if not _is_factory(name) and not _is_hugging_face(name):
        return load_model(name, pretrained=pretrained, weights=weights)
    one_source(pretrained, weights)
    if _is_factory(name):
        if pretrained:
            raise LoadError(f"--pretrained: {name} decides itself what weights it loads")
        loaded = LoadedModel(_called(name), name, f"whatever {name} gave")
    else:
        loaded = _hugging_face(name, pretrained)
    if weights is not None:
        fill(loaded.model, read_state_dict(Path(weights)), f"{weights} and {name}")
        return LoadedModel(loaded.model, name, f"file {weights}")
    return loaded


def named_on_meta(name: str) -> nn.Module:
    """Return the model without weights (on the meta device), in eval mode, to plan with. Raises LoadError."""
    if not _is_factory(name) and not _is_hugging_face(name):
        return build_on_meta(name)
    with torch.device("meta"):
        if _is_factory(name):
            return _called(name).to("meta")
        cls, config = _class_and_config(name)
        return _about_images(name, cls(config).eval())


def _is_factory(name: str) -> bool:
    """Return whether `name` has the form package.module:factory."""
    return ":" in name and not Path(name).exists()


def _is_hugging_face(name: str) -> bool:
    """Return whether `name` is a directory, a name on the hub, or a class of transformers."""
    return Path(name).is_dir() or "/" in name or (name[:1].isupper() and name.isidentifier())


def _factory(name: str) -> Callable[[], Any]:
    """Import the factory that `name` refers to. Raises LoadError where there is none."""
    module, _, function = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # import from the working directory, as `python -m` does
    try:
        made = importlib.import_module(module)
    except ImportError as error:
        raise LoadError(f"{name}: {error}; give package.module:factory, in this folder or installed") from error
    found = getattr(made, function, None)
    if not callable(found):
        raise LoadError(f"{name}: {module} has no function {function!r} that returns a model")
    return found  # type: ignore[no-any-return]


def _called(name: str) -> nn.Module:
    """Return the factory's model in eval mode. Raises LoadError where it raises or returns something else."""
    factory = _factory(name)
    try:
        model = factory()
    except Exception as error:  # whatever a user's code raises
        raise LoadError(
            f"{name}() raised {type(error).__name__}: {first_line(error)}; give a function that returns a model when "
            f"it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{name}() returned {type(model).__name__}, no torch.nn.Module")
    return model.eval()


def _hugging_face(name: str, pretrained: bool) -> LoadedModel:
    """Load a model of Hugging Face's, with a directory's weights, the hub's or random ones. Raises LoadError."""
    cls, config = _class_and_config(name)
    has_weights = Path(name).is_dir() and any(Path(name).glob("*.safetensors"))
    if not has_weights and not pretrained:
        made: nn.Module = seeded(lambda: cls(config))
        return LoadedModel(_about_images(name, made.eval()), name, random_origin())
    try:
        filled: nn.Module = cls.from_pretrained(name, config=config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise LoadError(
            f"weights of {name} can't be loaded: {first_line(error)}; check the network or the directory"
        ) from error
    return LoadedModel(_about_images(name, filled.float().eval()), name, f"pretrained ({name})")


def _class_and_config(name: str) -> tuple[Any, Any]:
    """Return the class and configuration of a model. The class is `name` itself, or the one its configuration names.

    Raises LoadError where there is no such class or configuration.
    """
    transformers = _transformers()
    if "/" not in name and not Path(name).is_dir():
        cls: Any = getattr(transformers, name, None)
        if not hasattr(cls, "config_class"):
            raise LoadError(f"transformers has no model class {name!r}; give ViTForImageClassification, say")
        return cls, cls.config_class()
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        where = "the directory" if Path(name).is_dir() else "the name and the network"
        raise LoadError(f"no configuration of {name} can be had: {first_line(error)}; check {where}") from error
    # Not AutoModel, which would leave out the head that these weights include.
    architectures = getattr(config, "architectures", None) or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise LoadError(f"{name}: its configuration names no class of transformers (architectures: {architectures})")
    return getattr(transformers, architectures[0]), config


def _about_images(name: str, model: nn.Module) -> nn.Module:
    """Return `model` if its main input is an image or the like. Raises LoadError otherwise."""
    takes = getattr(model, "main_input_name", "pixel_values")
    if takes not in ("pixel_values", "pixel_values_videos", "input_values"):
        raise LoadError(
            f"{name} is a {type(model).__name__}, which takes {takes}: give its vision tower, by a class of "
            f"transformers or as package.module:factory"
        )
    return model


def _transformers() -> Any:
    """Import transformers. Raises LoadError where it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise LoadError(f"Hugging Face's models need transformers ({error}); pip install transformers") from error
    return transformers
