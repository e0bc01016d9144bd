"""timm models by name, with random weights, weights from a file, or timm's own; and the reading of weights' files."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.errors import LoadError

_SEED = 0
_LISTED, _WIDTH = 3, 160
"""Most names, and most letters of a line of torch's, in an error: enough to recognise the wrong checkpoint."""


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from.

    model: in eval mode, float32, on the CPU.
    name: what the user called it.
    weights_origin: text for the user, such as "random (seed 0), not a trained model".
    """

    model: nn.Module
    name: str
    weights_origin: str


def load_model(name: str, *, pretrained: bool = False, weights: str | Path | None = None) -> LoadedModel:
    """Return the timm model `name`. Without weights, it gets random ones, the same each time.

    pretrained: download timm's weights for it.
    weights: file of this model's weights, safetensors or a torch state dict (also under "model" or "state_dict"). Only
        tensors are ever unpickled.

    Raises LoadError.
    """
    timm = import_timm()
    one_source(pretrained, weights)
    if pretrained:
        return LoadedModel(_pretrained(timm, name), name, f"pretrained (timm {timm.__version__})")
    model = seeded(lambda: _create(timm, name, pretrained=False))
    if weights is None:
        return LoadedModel(model, name, random_origin())
    fill(model, read_state_dict(Path(weights)), f"{weights} and {name}")
    return LoadedModel(model, name, f"file {weights}")


def build_on_meta(name: str) -> nn.Module:
    """Return the timm model `name` without weights (on the meta device), in eval mode. Raises LoadError."""
    with torch.device("meta"):
        return _create(import_timm(), name, pretrained=False)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file or a torch checkpoint by name, on the CPU. Raises LoadError."""
    from safetensors.torch import load_file

    timm = import_timm()
    try:
        with path.open("rb") as file:
            head = file.read(9)
        # timm goes by the suffix, which files in a cache don't have. A safetensors file begins with the length of its
        # header in 8 bytes, then the header, which is JSON.
        is_safetensors = head[8:] == b"{"
        content: Any = load_file(path) if is_safetensors else timm.models.load_state_dict(str(path), weights_only=True)
    except OSError as error:
        raise LoadError(f"weights {str(path)!r} can't be read: {error.strerror}; give a file") from error
    except Exception as error:  # a broken file, or a pickle that would run code; readers raise many types
        reason = first_line(error).partition(". ")[0]  # torch goes on to say how to unpickle it anyway
        raise LoadError(f"weights {str(path)!r} are {_NO_STATE_DICT} ({reason})") from error
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise LoadError(f"weights {str(path)!r} hold the entries {_few(map(str, content))}: {_NO_STATE_DICT}")
    return {str(key): value for key, value in content.items()}


_NO_STATE_DICT = (
    "no state dict; save only the tensors, with torch.save(model.state_dict(), …) or safetensors, because unpickling "
    "anything else could run any code"
)


def fill(model: nn.Module, state: Mapping[str, Tensor], between: str) -> None:
    """Copy `state` into the model. Raises LoadError unless it has exactly the model's tensors.

    between: names of the file and the model, "FILE and MODEL", for the message.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        _, *problems = (textwrap.shorten(line, _WIDTH, placeholder=" …") for line in str(error).splitlines())
        raise LoadError(f"{between} don't fit: {' '.join(problems)} give this model's own weights") from error


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Return `build()`, with the same random weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()


def one_source(pretrained: bool, weights: str | Path | None) -> None:
    """Check that weights come from one source. Raises LoadError where two are given."""
    if pretrained and weights is not None:
        raise LoadError(f"pretrained weights and weights={str(weights)!r} were both asked for; give one of them")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def random_origin() -> str:
    """Return the `weights_origin` of random weights."""
    return f"random (seed {_SEED}), not a trained model"


def _pretrained(timm: Any, name: str) -> nn.Module:
    """Return a timm model with timm's weights. Raises LoadError where there are none or they can't be downloaded."""
    if timm.is_model(name) and not timm.is_model_pretrained(name):
        raise LoadError(f"timm has no pretrained weights for {name!r}; give a file of weights, or use random ones")
    try:
        return _create(timm, name, pretrained=True)
    except LoadError:
        raise
    except Exception as error:  # of the hub's client, the network or the disk
        raise LoadError(
            f"timm's weights for {name!r} can't be loaded: {first_line(error)}; check the network, or give a file "
            f"(--weights FILE, weights=)"
        ) from error


def _create(timm: Any, name: str, pretrained: bool) -> nn.Module:
    """Return a timm model in eval mode. Raises LoadError, with similar names, where timm has no such model."""
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:
        if "pretrained tag" not in str(error) and "Unknown model" not in str(error):
            raise
        known = timm.list_pretrained(name.partition(".")[0] + ".*") or timm.list_models()
        close = difflib.get_close_matches(name, known, n=_LISTED, cutoff=0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models('*vit*') lists those it has"
        raise LoadError(f"timm has no model {name!r}; {hint}") from error
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


def _few(names: Any) -> str:
    """Return the first few names as text."""
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (", …" if len(listed) > _LISTED else "")
