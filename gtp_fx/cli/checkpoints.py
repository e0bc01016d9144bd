"""Files of weights: what is in them is found, said, and put into a model. Only tensors are ever unpickled.

A checkpoint of a training run holds its state dict under a key, beside an optimiser's state and perhaps averaged (EMA)
weights, and wrappers put a prefix before every name (DDP "module.", torch.compile "_orig_mod.", Lightning "model.").
"""

from __future__ import annotations

import argparse
import itertools
import textwrap
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.errors import LoadError

_EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
_PLAIN = ("state_dict", "model", "model_state_dict", "model_state")
"""Keys under which checkpoints hold a state dict. Averaged weights come first: they are what a run is judged by."""
_PICKLE = b"\x80"
"""How a pickle begins, and a torch checkpoint from before they were zip archives."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
_COUNTER = "n_averaged"
"""What torch's AveragedModel keeps beside the weights."""
_LISTED, _WIDTH = 3, 160
"""Most names, and most letters of a line of torch's, in an error: enough to recognise the wrong checkpoint."""
_NO_STATE_DICT = (
    "no state dict; save only the tensors, with torch.save(model.state_dict(), …) or safetensors, because unpickling "
    "anything else could run any code"
)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors from a file.

    path: the file.
    tensors: by name, on the CPU.
    told: which of the file's state dicts they are, in words; empty where it is one and nothing else.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    told: str = ""


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Return the tensors of a safetensors file or of a torch checkpoint.

    key: which of a checkpoint's entries holds them; None takes averaged (EMA) weights where there are some, else those
        under a usual key, else the only state dict in it.

    Raises LoadError where the file can't be read, holds no such entry, or several without a usual key.
    """
    content = _content(path)
    inside = {str(name): tensors for name, value in content.items() if (tensors := _state_dict(value))}
    if key is None and (tensors := _state_dict(content)):
        return Checkpoint(path, tensors)
    if not inside:
        what = "are" if key is None else f"have no entry {key!r}, and are"
        entries = f" hold the entries {_few(map(str, content))}:" if key is None else ""
        raise LoadError(f"weights {str(path)!r}{entries} {'' if entries else what + ' '}{_NO_STATE_DICT}")
    usual = next((name for name in (*_EMA, *_PLAIN) if name in inside), None)
    chosen = key or usual or (next(iter(inside)) if len(inside) == 1 else None)
    if chosen not in inside:
        wrong = f"have no state dict under {key!r}" if key else "hold several state dicts"
        raise LoadError(f"weights {str(path)!r} {wrong}: give --weights-key {' or '.join(inside)}")
    others = [name for name in inside if name != chosen]
    what = f"its {'EMA weights ' if chosen in _EMA else ''}{chosen!r}"
    return Checkpoint(path, inside[chosen], what + (f", not {' or '.join(map(repr, others))}" if others else ""))


def fill(model: nn.Module, found: Checkpoint, name: str) -> str:
    """Copy a checkpoint into a model, without the prefixes that wrappers gave all of its names.

    name: of the model, for the message.

    Returns where the weights came from: the file, which of its state dicts, and the prefix that was removed. Raises
    LoadError unless the checkpoint then has exactly the model's tensors.
    """
    own = model.state_dict()
    tensors, removed = _unwrapped(found.tensors, own)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        _, *problems = (textwrap.shorten(line, _WIDTH, placeholder=" …") for line in str(error).splitlines())
        advice = _other_head(model, own, tensors) or "give this model's own weights"
        raise LoadError(f"{found.path} and {name} don't fit: {' '.join(problems)} {advice}") from error
    told = ", ".join(filter(None, (found.told, f"without {' and '.join(map(repr, removed))}" if removed else "")))
    return f"file {found.path}" + (f" ({told})" if told else "")


def _content(path: Path) -> Mapping[Any, Any]:
    """Return what a file holds. Raises LoadError where it can't be read or is no mapping."""
    from safetensors.torch import load_file

    try:
        with path.open("rb") as file:
            head = file.read(9)
        # A safetensors file begins with the length of its header in 8 bytes, then the header, which is JSON.
        if head[8:] == b"{":
            return load_file(path)
        # What a run's command line was is plain data, which timm's and other scripts keep in their checkpoints.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise LoadError(f"weights {str(path)!r} can't be read: {error.strerror or error}; give a file") from error
    except Exception as error:  # a broken file, or a pickle that would run code; readers raise many types
        if not zipfile.is_zipfile(path) and head[:1] != _PICKLE:
            raise LoadError(f"weights {str(path)!r} are neither a torch checkpoint nor safetensors") from error
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0]  # torch goes on to say how to unpickle anyway
        raise LoadError(f"weights {str(path)!r} are {_NO_STATE_DICT} ({type(error).__name__}: {reason})") from error
    if not isinstance(content, Mapping):
        raise LoadError(f"weights {str(path)!r} hold a {type(content).__name__}: {_NO_STATE_DICT}")
    return content


def _state_dict(value: Any) -> dict[str, Tensor] | None:
    """Return a mapping to tensors alone with its names as text; None for anything else, and for an empty one."""
    if not isinstance(value, Mapping) or not value or not all(isinstance(held, Tensor) for held in value.values()):
        return None
    return {str(name): held for name, held in value.items()}


def _unwrapped(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return tensors without prefixes that all of their names have and none of the model's `own`, and what was removed.

    The counter of torch's AveragedModel goes, too.
    """
    found, removed = dict(tensors), []
    if _COUNTER in found and _COUNTER not in own:
        del found[_COUNTER]
        removed.append(_COUNTER)
    while found and found.keys() != own.keys():
        prefix = next((start for start in _PREFIXES if all(name.startswith(start) for name in found)), None)
        if prefix is None or any(name.startswith(prefix) for name in own):
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
        removed.append(prefix)
    return found, removed


def _other_head(model: nn.Module, own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Return what to do where weights differ from the model in nothing but the number of classes; else ""."""
    config = getattr(model, "config", None)
    classes = getattr(model, "num_classes", None) or getattr(config, "num_labels", None)
    if own.keys() != given.keys():
        return ""
    pairs = [(own[name].shape, given[name].shape) for name in own if own[name].shape != given[name].shape]
    heads = {theirs[0] for ours, theirs in pairs if ours[:1] == (classes,) and ours[1:] == theirs[1:] and theirs}
    alike = len(heads) == 1 and all(ours[:1] == (classes,) and ours[1:] == theirs[1:] for ours, theirs in pairs)
    if not alike:
        return ""
    number = heads.pop()
    return f"these are weights for {number} classes: --num-classes {number} builds the model with as many"


def _few(names: Iterable[str]) -> str:
    """Return the first few names as text."""
    listed = list(itertools.islice(names, _LISTED + 1))
    return ", ".join(listed[:_LISTED]) + (", …" if len(listed) > _LISTED else "")
