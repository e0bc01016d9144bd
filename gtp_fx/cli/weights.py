"""timm models by name, with random weights, weights from a file, or timm's own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gtp_fx.cli.checkpoints import fill, read_checkpoint
from gtp_fx.errors import LoadError

_SEED = 0
_LISTED = 3
"""Most names in an error."""
_NOTHING: Mapping[str, Any] = {}


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    model: in eval mode, float32, on the CPU.
    name: what the user called it, and what it was built with.
    weights_origin: text for the user, such as "random (seed 0), not a trained model".
    """

    model: nn.Module
    name: str
    weights_origin: str


def load_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    built_with: Mapping[str, Any] = _NOTHING,
) -> LoadedModel:
    """Return the timm model `name`. Without weights, it gets random ones, the same each time.

    pretrained: download timm's weights for it.
    weights: file of this model's weights, safetensors or a torch checkpoint.
    weights_key: which of the checkpoint's entries, as for `gtp_fx.cli.checkpoints.read_checkpoint`.
    built_with: arguments of timm's model, such as num_classes.

    Raises LoadError.
    """
    timm = import_timm()
    one_source(pretrained, weights, weights_key)
    called = with_arguments(name, built_with)
    if pretrained:
        return LoadedModel(_pretrained(timm, name, built_with), called, _pretrained_origin(timm, name, built_with))
    model = seeded(lambda: _create(timm, name, built_with))
    if weights is None:
        return LoadedModel(model, called, random_origin())
    return LoadedModel(model, called, fill(model, read_checkpoint(Path(weights), weights_key), called))


def build_on_meta(name: str, built_with: Mapping[str, Any] = _NOTHING) -> nn.Module:
    """Return the timm model `name` without weights (on the meta device), in eval mode. Raises LoadError."""
    with torch.device("meta"):
        return _create(import_timm(), name, built_with)


def with_arguments(name: str, built_with: Mapping[str, Any]) -> str:
    """Return a model's name with the arguments that it is built with: "vit_tiny_patch16_224(num_classes=7)"."""
    given = ", ".join(f"{key}={value!r}" for key, value in built_with.items())
    return f"{name}({given})" if given else name


def not_built(name: str, built_with: Mapping[str, Any], error: Exception) -> LoadError:
    """Return the error for arguments that a model can't be built with."""
    told = " ".join(str(error).split()) or type(error).__name__
    return LoadError(
        f"{with_arguments(name, built_with)} can't be built: {type(error).__name__}: {told}; check --num-classes, "
        f"--img-size and --model-arg"
    )


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()`, with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()


def one_source(pretrained: bool, weights: str | Path | None, weights_key: str | None) -> None:
    """Check that weights come from one source. Raises LoadError where two are given, or a key without its file."""
    if pretrained and weights is not None:
        raise LoadError(f"pretrained weights and weights={str(weights)!r} were both asked for; give one of them")
    if weights_key is not None and weights is None:
        raise LoadError(f"weights_key={weights_key!r} is an entry of a file: give weights (--weights FILE), too")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_origin() -> str:
    """Return the `weights_origin` of random weights."""
    return f"random (seed {_SEED}), not a trained model"


def _pretrained(timm: Any, name: str, built_with: Mapping[str, Any]) -> nn.Module:
    """Return a timm model with timm's weights. Raises LoadError where there are none or they can't be downloaded."""
    if timm.is_model(name) and not timm.is_model_pretrained(name):
        raise LoadError(f"timm has no pretrained weights for {name!r}; give a file of weights, or use random ones")
    try:
        return seeded(lambda: _create(timm, name, built_with, pretrained=True))
    except LoadError:
        raise
    except Exception as error:  # of the hub's client, the network or the disk
        raise LoadError(
            f"timm's weights for {name!r} can't be loaded: {first_line(error)}; check the network, or give a file "
            f"(--weights FILE, weights=)"
        ) from error


def _pretrained_origin(timm: Any, name: str, built_with: Mapping[str, Any]) -> str:
    """Return the `weights_origin` of timm's weights, of which a head for other classes has none."""
    classes = built_with.get("num_classes")
    usual = getattr(timm.get_pretrained_cfg(name), "num_classes", classes)
    head = f"; the head of {classes} classes is random (seed {_SEED})" if classes and classes != usual else ""
    return f"pretrained (timm {timm.__version__}){head}"


def _create(timm: Any, name: str, built_with: Mapping[str, Any], pretrained: bool = False) -> nn.Module:
    """Return a timm model in eval mode.

    Raises LoadError, with similar names, where timm has no such model, and where it can't be built with these
    arguments.
    """
    if others := sorted(built_with.keys() & inspect.signature(timm.create_model).parameters.keys()):
        raise LoadError(
            f"--model-arg {others[0]}: this is timm.create_model's own, and no part of a model; --weights FILE and "
            f"--pretrained say where weights come from"
        )
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **built_with)
    except Exception as error:
        if isinstance(error, RuntimeError) and ("pretrained tag" in str(error) or "Unknown model" in str(error)):
            known = timm.list_pretrained(name.partition(".")[0] + ".*") or timm.list_models()
            # Names are long, and what was typed may be the beginning of one.
            begun = {each[: len(name) + 1]: each for each in reversed(known)}
            close = [begun[start] for start in difflib.get_close_matches(name, begun, n=_LISTED, cutoff=0.6)]
            hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists those it has"
            raise LoadError(f"timm has no model {name!r}; {hint}") from error
        wrong = (TypeError,) if pretrained else (TypeError, ValueError, AssertionError, RuntimeError)
        if built_with and isinstance(error, wrong):
            raise not_built(name, built_with, error) from error
        raise
    return model.eval()


def import_timm(what: str = "models by name") -> Any:
    """Import timm. Raises LoadError where it can't be imported.

    what: what needs it, for the message.
    """
    try:
        import timm
    except ImportError as error:
        raise LoadError(f"{what} come from timm, which can't be imported ({error}); pip install timm") from error
    return timm
