"""The JSON file in a saved model's folder: what the model is made of, beside its weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from gtp_fx.errors import LoadError

FILE = "gtp_fx.json"
FORMAT = 1
"""Version of the file's format: of the fields of `Record`, and what they mean."""


@dataclass(frozen=True)
class Record:
    """Everything that a saved model is made of, as plain values.

    versions: of gtp_fx, torch, and the package that the original's class is from.
    model: the name of the original's class.
    recipe: how the original is built by name (`gtp_fx.model.saving.build`); None where it can't be.
    forms: for each form of call, the first one first: `inputs`, the `args` and `kwargs` that it was captured with, and
        whether it is for their integers alone, `fixed` (`gtp_fx.model.saving.plain`), `schedule`,
        `Schedule.to_json`'s values, and the captured `graph`'s `operators`, by name with their number, and its
        `digest`.
    strategy: `gtp_fx.strategies.registry.to_plain`'s.
    options: the rest of what `optimize` was given and needs again; `budget` is only there to be read.
    own_calls: paths of the layers that no pass joins with others.
    taps: paths of the modules whose outputs the graphs return, too.
    files: the files with weights; where two have a tensor, the later one counts.
    weights: digest of all weights.
    tensors: each parameter's and buffer's name, with its form ("float32[3, 4]") and its name in the files.
    """

    versions: dict[str, str]
    model: str
    recipe: dict[str, Any] | None
    forms: list[dict[str, Any]]
    strategy: dict[str, Any]
    options: dict[str, Any]
    own_calls: list[str]
    taps: list[str]
    files: list[str]
    weights: str
    tensors: dict[str, list[str]]

    def write(self, folder: Path) -> None:
        """Write the record into a folder."""
        (folder / FILE).write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Return the record in a folder. Raises LoadError where there is none of this format."""
        try:
            found = json.loads((folder / FILE).read_text())
        except NotADirectoryError:
            raise LoadError(f"{folder} is a file: give the folder that save_pretrained wrote") from None
        except FileNotFoundError:
            raise LoadError(
                f"{folder} is no folder: give the one that save_pretrained wrote"
                if not folder.exists()
                else f"{folder} has no {FILE}, which save_pretrained of what gtp_fx.optimize returned writes last"
            ) from None
        except (OSError, ValueError) as error:
            raise LoadError(f"{folder / FILE} can't be read: {error}") from error
        version = found.pop("format", None) if isinstance(found, dict) else None
        if version != FORMAT:
            raise LoadError(
                f"{folder / FILE} is of format {version!r}, and this gtp_fx reads format {FORMAT}: load it with the "
                f"gtp_fx that wrote it, or optimize and save the model again"
            )
        named = {field.name for field in fields(cls)}
        wrong = sorted(found.keys() ^ named) or [name for name, is_right in _RIGHT.items() if not is_right(found[name])]
        if wrong:
            raise LoadError(f"{folder / FILE} is no record of a saved model, by its {', '.join(wrong)}")
        return cls(**found)

    def other_versions(self, now: Mapping[str, str]) -> str:
        """Return which versions aren't those that a model was saved with, as a sentence's part; "" where none."""
        differ = [(name, then, now.get(name, "none")) for name, then in self.versions.items() if then != now.get(name)]
        return ", ".join(f"{name} {then} then and {is_now} now" for name, then, is_now in differ)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _has(**kinds: type) -> Callable[[Any], bool]:
    """Return whether a value is a dict that has these keys, with values of these types."""
    return lambda value: isinstance(value, dict) and all(isinstance(value.get(key), kinds[key]) for key in kinds)


def _is_form(value: Any) -> bool:
    """Return whether a value is one of a record's forms."""
    whole = _has(inputs=dict, schedule=dict, graph=dict)(value)
    return whole and _has(args=list, kwargs=dict)(value["inputs"]) and _has(operators=dict, digest=str)(value["graph"])


_RIGHT: Mapping[str, Callable[[Any], bool]] = {
    "versions": _has(gtp_fx=str, torch=str),
    "model": lambda value: isinstance(value, str),
    "recipe": lambda value: value is None or _has(transformers=str)(value) or _has(timm=str, args=dict)(value),
    "forms": lambda value: isinstance(value, list) and bool(value) and all(map(_is_form, value)),
    "strategy": _has(name=str, code=list, fields=dict),
    "options": _has(compile=bool, recapture=bool, any_size=bool),
    "own_calls": _are_names,
    "taps": _are_names,
    "files": lambda value: _are_names(value) and all(Path(name).name == name for name in value),
    "weights": lambda value: isinstance(value, str),
    "tensors": lambda value: _has()(value) and all(_are_names(pair) and len(pair) == 2 for pair in value.values()),
}
"""What each field has to be, where a file may hold anything."""


def versions_of(cls: type) -> dict[str, str]:
    """Return the versions of gtp_fx, torch, and the package that a class is from, where that has one."""
    names = dict.fromkeys(("gtp_fx", "torch", cls.__module__.partition(".")[0]))
    return {name: found for name in names if (found := _version(name))}


def _version(package: str) -> str:
    known = getattr(sys.modules.get(package), "__version__", None)
    if known is not None:
        return str(known)
    try:
        return metadata.version(package)
    except (metadata.PackageNotFoundError, ValueError):
        return ""
