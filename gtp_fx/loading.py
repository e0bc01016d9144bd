"""A timm model by name, with random weights, weights from a file, or timm's own."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.errors import GtpError

_SEED = 0
_LISTED = 3
"""Names an error lists of each kind: enough to recognise the wrong checkpoint by."""


class LoadError(GtpError):
    """A model can't be had: unknown name, or weights that are missing, unreadable or another model's."""


@dataclass(frozen=True)
class LoadedModel:
    """model: in eval mode, float32, on the CPU. weights_origin: for people, "random (seed 0), not a trained model"."""

    model: nn.Module
    name: str
    weights_origin: str


def load_model(name: str, *, pretrained: bool = False, weights: str | Path | None = None) -> LoadedModel:
    """The timm model `name`.

    pretrained: download timm's weights for it. weights: a file of this model's weights, safetensors or a torch state dict
    (also under "model" or "state_dict"); nothing but tensors is ever unpickled. With neither, random ones, the same each time.

    Raises LoadError.
    """
    timm = _import_timm()
    one_source(pretrained, weights)
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {name!r}; {_suggestion(name, timm.list_models())}")
    state = None if weights is None else read_state_dict(Path(weights))
    if pretrained:
        return LoadedModel(_pretrained(timm, name), name, f"pretrained (timm {timm.__version__})")
    model = seeded(lambda: _create(timm, name, pretrained=False))
    if state is None:
        return LoadedModel(model, name, random_origin())
    fill(model, state, f"{weights} and {name}")
    return LoadedModel(model, name, f"file {weights}")


def build_on_meta(name: str) -> nn.Module:
    """The timm model `name` without weights, in eval mode: enough to plan by. Raises LoadError."""
    timm = _import_timm()
    if not timm.is_model(name):
        raise LoadError(f"timm has no model {name!r}; {_suggestion(name, timm.list_models())}")
    with torch.device("meta"):
        return _create(timm, name, pretrained=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, from a safetensors file or a torch checkpoint. Raises LoadError."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise LoadError(f"weights {str(path)!r} can't be read: {error.strerror}; give a file") from error
    # By content: files from a cache have no suffix. A safetensors file is the length of its JSON header, then the header.
    return _read_safetensors(path) if head[8:] == b"{" else _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise LoadError(f"weights {str(path)!r} are no whole safetensors file: {error}; fetch it again") from error


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"weights {str(path)!r} hold Python objects or are no checkpoint, and unpickling them could run any code; save the "
            f"tensors alone, torch.save(model.state_dict(), …) or safetensors"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise LoadError(
            f"weights {str(path)!r} are neither safetensors nor a torch checkpoint: {first_line(error)}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        held = (
            f"the entries {_few(map(str, content))}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        )
        raise LoadError(
            f"weights {str(path)!r} hold {held}, no state dict; save one with torch.save(model.state_dict(), …), at the top or "
            f"under 'model' or 'state_dict'"
        )
    return {str(key): value for key, value in content.items()}


def fill(model: nn.Module, state: Mapping[str, Tensor], between: str) -> None:
    """Copy `state` into the model, all of it or nothing."""
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {list(state[key].shape)} for {list(own[key].shape)}"
            for key in own
            if key in state and state[key].shape != own[key].shape
        ],
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names)
        raise LoadError(f"{between} don't fit: {told}; give the weights of this very model")
    model.load_state_dict(state)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """What `build` makes, with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()


def one_source(pretrained: bool, weights: str | Path | None) -> None:
    """Raises LoadError where weights of two origins are asked for."""
    if pretrained and weights is not None:
        raise LoadError(f"pretrained weights and weights={str(weights)!r} were both asked for; give one of them")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_origin() -> str:
    return f"random (seed {_SEED}), not a trained model"


def _pretrained(timm: Any, name: str) -> nn.Module:
    if not timm.is_model_pretrained(name):
        raise LoadError(f"timm has no pretrained weights for {name!r}; give a file with weights, or take random ones")
    try:
        return _create(timm, name, pretrained=True)
    except LoadError:
        raise
    except Exception as error:  # whatever the hub's client, the network or the disk has to say
        raise LoadError(
            f"timm's weights for {name!r} can't be had: {first_line(error)}; check the network, or give a file (--weights FILE, weights=)"
        ) from error


def _create(timm: Any, name: str, pretrained: bool) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        known = timm.list_pretrained(name.partition(".")[0] + ".*")
        raise LoadError(f"timm has no model {name!r}; {_suggestion(name, known)}") from error
    return model.eval()


def _import_timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise LoadError(
            f"models by name come from timm, which can't be imported ({error}); pip install timm"
        ) from error
    return timm


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=_LISTED, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists those it has"


def _few(names: Any) -> str:
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (", …" if len(listed) > _LISTED else "")
