"""Models by name: timm's, Hugging Face's, or the user's own.

deit_small_patch16_224          timm's name
path/to/model                   a directory with Hugging Face's config.json, and weights if it has some
google/vit-base-patch16-224     a model on the hub; its weights are only downloaded with `pretrained`
ViTForImageClassification       a class of transformers, with its default configuration
package.module:factory          a function without arguments that returns the model

All but the hub's and a directory's weights may be built with arguments: num_classes and img_size, which are
transformers' num_labels and image_size, and others by their own names.

Only the last form runs code that isn't installed. Code in a directory or on the hub is never run.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtp_fx.cli.checkpoints import fill, read_checkpoint
from gtp_fx.cli.weights import (
    LoadedModel,
    build_on_meta,
    first_line,
    load_model,
    not_built,
    one_source,
    random_origin,
    seeded,
    with_arguments,
)
from gtp_fx.errors import LoadError, did_you_mean
from gtp_fx.model.saving.record import FILE as RECORD

_NOTHING: Mapping[str, Any] = {}
_THEIRS = {"num_classes": "num_labels", "img_size": "image_size"}
"""What transformers' configurations call timm's arguments."""


def load_named(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    built_with: Mapping[str, Any] = _NOTHING,
) -> LoadedModel:
    """Return the model in eval mode, float32, on the CPU.

    Its weights are random where neither argument nor the name's directory or factory gives any.

    pretrained: download weights, from timm or the hub.
    weights: file of weights, safetensors or a torch checkpoint.
    weights_key: which of the checkpoint's entries, as for `gtp_fx.cli.checkpoints.read_checkpoint`.
    built_with: arguments of the model, its configuration or the factory.

    Raises LoadError.
    """
    _must_hold_a_model(name)
    if not _is_factory(name) and not _is_hugging_face(name):
        return load_model(name, pretrained=pretrained, weights=weights, weights_key=weights_key, built_with=built_with)
    one_source(pretrained, weights, weights_key)
    if _is_factory(name):
        if pretrained:
            raise LoadError(f"--pretrained: {name} decides itself what weights it loads")
        loaded = LoadedModel(_called(name, built_with), with_arguments(name, built_with), f"whatever {name} gave")
    else:
        loaded = _hugging_face(name, pretrained, built_with)
    if weights is not None:
        origin = fill(loaded.model, read_checkpoint(Path(weights), weights_key), loaded.name)
        return LoadedModel(loaded.model, loaded.name, origin)
    return loaded


def named_on_meta(name: str, built_with: Mapping[str, Any] = _NOTHING) -> nn.Module:
    """Return the model without weights (on the meta device), in eval mode, to plan with. Raises LoadError."""
    _must_hold_a_model(name)
    if not _is_factory(name) and not _is_hugging_face(name):
        return build_on_meta(name, built_with)
    with torch.device("meta"):
        if _is_factory(name):
            return _called(name, built_with).to("meta")
        return _about_images(name, _of_config(name, built_with, *_class_and_config(name, built_with)))


def _must_hold_a_model(name: str) -> None:
    """Raise LoadError for a folder that isn't there, or that holds a result of gtp_fx instead of a model."""
    folder = Path(name)
    if name.startswith(("./", "../", "/", "~")) and ":" not in name and not folder.exists():
        raise LoadError(f"there is no folder {name}: give one with Hugging Face's config.json, or a model's name")
    if (folder / RECORD).exists() and not (folder / "config.json").exists():
        raise LoadError(
            f"{name} holds what save_pretrained wrote of an optimised model, which gtp_fx.load({name!r}) brings back "
            f"in Python: give the model's own name here"
        )


def _is_factory(name: str) -> bool:
    """Return whether `name` has the form package.module:factory."""
    return ":" in name and not Path(name).exists()


def _is_hugging_face(name: str) -> bool:
    """Return whether `name` is a directory, a name on the hub, or a class of transformers."""
    return Path(name).is_dir() or "/" in name or (name[:1].isupper() and name.isidentifier())


def _factory(name: str) -> Callable[..., Any]:
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


def _called(name: str, built_with: Mapping[str, Any]) -> nn.Module:
    """Return the factory's model in eval mode. Raises LoadError where it raises or returns something else."""
    factory = _factory(name)
    try:
        model = factory(**built_with)
    except Exception as error:  # whatever a user's code raises
        called = f"with {', '.join(built_with)}" if built_with else "without arguments"
        raise LoadError(
            f"{name}() raised {type(error).__name__}: {first_line(error)}; give a function that returns a model when "
            f"it is called {called}"
        ) from error
    if not isinstance(model, nn.Module):
        raise LoadError(f"{name}() returned {type(model).__name__}, no torch.nn.Module")
    return model.eval()


def _hugging_face(name: str, pretrained: bool, built_with: Mapping[str, Any]) -> LoadedModel:
    """Load a model of Hugging Face's, with a directory's weights, the hub's or random ones. Raises LoadError."""
    cls, config = _class_and_config(name, built_with)
    called = with_arguments(name, built_with)
    has_weights = Path(name).is_dir() and any(Path(name).glob("*.safetensors"))
    if not has_weights and not pretrained:
        made = seeded(lambda: _of_config(name, built_with, cls, config))
        return LoadedModel(_about_images(name, made), called, random_origin())
    try:
        filled: nn.Module = cls.from_pretrained(name, config=config, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        check = f"those are not weights of a model with {', '.join(built_with)}" if built_with else "the directory"
        raise LoadError(
            f"weights of {called} can't be loaded: {first_line(error)}; check the network or {check}"
        ) from error
    return LoadedModel(_about_images(name, filled.float().eval()), called, f"pretrained ({name})")


def _of_config(name: str, built_with: Mapping[str, Any], cls: Any, config: Any) -> nn.Module:
    """Return a model of transformers in eval mode, without weights. Raises LoadError where arguments don't fit it."""
    try:
        made: nn.Module = cls(config)
    except Exception as error:
        if not built_with:
            raise
        raise not_built(name, built_with, error) from error
    return made.eval()


def _class_and_config(name: str, built_with: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return the class and configuration of a model. The class is `name` itself, or the one its configuration names.

    built_with: fields of the configuration, also by timm's names.

    Raises LoadError where there is no such class, configuration or field.
    """
    transformers = _transformers()
    given = {_THEIRS.get(key, key): value for key, value in built_with.items()}
    if "/" not in name and not Path(name).is_dir():
        cls: Any = getattr(transformers, name, None)
        if not hasattr(cls, "config_class"):
            meant = did_you_mean(name, dir(transformers)) or "; give ViTForImageClassification, say"
            raise LoadError(f"transformers has no model class {name!r}{meant}")
        _must_have_fields(name, cls.config_class(), given)
        try:
            return cls, cls.config_class(**given)
        except Exception as error:  # of a validation that isn't transformers' own
            raise not_built(name, built_with, error) from error
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        _must_have_fields(name, config, given)
    except LoadError:
        raise
    except (OSError, ValueError) as error:
        where = "the directory" if Path(name).is_dir() else "the name and the network"
        raise LoadError(f"no configuration of {name} can be had: {first_line(error)}; check {where}") from error
    if given:
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **given)
        except Exception as error:  # of a validation that isn't transformers' own
            raise not_built(name, built_with, error) from error
    # Not AutoModel, which would leave out the head that these weights include.
    architectures = getattr(config, "architectures", None) or []
    if not architectures or not hasattr(transformers, architectures[0]):
        raise LoadError(f"{name}: its configuration names no class of transformers (architectures: {architectures})")
    return getattr(transformers, architectures[0]), config


def _must_have_fields(name: str, config: Any, given: Mapping[str, Any]) -> None:
    """Check that a configuration has the fields given, since transformers takes others without a word."""
    if unknown := [key for key in given if not hasattr(config, key)]:
        close = difflib.get_close_matches(unknown[0], config.to_dict(), n=1)
        raise LoadError(
            f"{name}: a {type(config).__name__} has no field {unknown[0]!r} (num_classes is num_labels there, img_size "
            f"image_size)" + (f"; did you mean {close[0]!r}?" if close else "; --model-arg gives fields that it has")
        )


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
