"""Saving an optimised model: everything is written into a folder beside, and moved into place when it is complete."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gtp_fx.capture.hooks import user_hooks
from gtp_fx.capture.module import capture_module
from gtp_fx.capture.signatures import CallSignature
from gtp_fx.capture.tapped import with_taps
from gtp_fx.errors import SaveError, warn
from gtp_fx.model.saving import record, tensors
from gtp_fx.model.saving.build import recipe_of
from gtp_fx.model.saving.card import write_card
from gtp_fx.model.saving.plain import graph_to_plain, to_plain
from gtp_fx.model.saving.record import Record, versions_of
from gtp_fx.model.state import State
from gtp_fx.options.options import Options
from gtp_fx.strategies.registry import to_plain as strategy_to_plain
from gtp_fx.targets import TARGETS, detect

_NO_OTHERS: Mapping[str, tuple[Any, ...]] = {
    "push_to_hub": (False, None),
    "state_dict": (None,),
    "variant": (None,),
    "is_main_process": (True,),
    "safe_serialization": (True,),
    "distributed_checkpoint": (False,),
}
"""What Hugging Face's save_pretrained takes and this doesn't: the values that ask for nothing."""
_WEIGHTS = re.compile(r"(model(-\d+-of-\d+)?|gtp_fx)\.safetensors(\.index\.json)?")
"""Names of the files that a saved model's weights are in."""


def save(state: State, signature: CallSignature, folder: Path, options: Mapping[str, Any], card: str = "") -> None:
    """Write an optimised model into a folder, which is made where there is none.

    signature: how it is called, on its device.
    options: what the original's own save_pretrained is called with, where it has one.
    card: a section for README.md; "" for none.

    Raises SaveError, OptionError where the strategy can't be written down, and CaptureError.
    """
    model = state.original
    tensors.required()
    for name, value in options.items():
        if name in _NO_OTHERS and value not in _NO_OTHERS[name]:
            raise SaveError(
                f"save_pretrained({name}={value!r}) isn't done for an optimised model, which is saved whole into one "
                f"folder: leave it out (the original's own save_pretrained, model.save_pretrained, takes it)"
            )
    own = getattr(model, "save_pretrained", None)
    if own is None and options:
        raise SaveError(f"save_pretrained takes no {', '.join(options)} for a {type(model).__name__}")
    described = _described(state, signature)
    _tell_of_hooks(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # On the same file system, so that files are moved in one step each.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".gtp_fx_") as scratch:
            draft = Path(scratch)
            if own is None:
                tensors.write_state_dict(draft / tensors.MODEL, model)
            else:
                _write_own(model, draft, options)
            _complete(described, model, draft)
            if card:
                write_card(card, draft, folder)
            _move(draft, folder)
    except OSError as error:
        raise SaveError(f"{folder}: {error.strerror or error}; nothing that can be loaded was written") from error


def _described(state: State, signature: CallSignature) -> dict[str, Any]:
    """Return all fields of the record but those of the weights."""
    model, options = state.original, state.options
    signatures = [signature, *(form.signature.like(model, form.dtype) for form in state.of_each_form[1:])]
    forms = [_form(*each) for each in zip(state.of_each_form, signatures, strict=True)]
    return {
        "versions": versions_of(type(model)),
        "model": type(model).__name__,
        "recipe": recipe_of(model),
        "forms": forms,
        "strategy": strategy_to_plain(state.settled.strategy),
        "options": {
            "budget": options.budget,
            "planned_by": _planned_by(options),
            "target": _target(options),
            "batch": options.batch,
            "disabled_passes": list(options.disabled_passes),
            "prefix_tokens": options.prefix_tokens,
            "mode": options.mode,
            "output": options.output,
            "compile": state.compile,
            "recapture": state.recapture,
            "any_size": state.any_size,
        },
        "own_calls": sorted(state.own_calls),
        "taps": list(state.taps),
    }


def _form(state: State, signature: CallSignature) -> dict[str, Any]:
    """Return what the record has of one form of call."""
    model = state.original
    # Captured anew: the graphs there are call layers, whatever has been put in a layer's place since.
    captured = capture_module(with_taps(model, state.taps), signature)
    args, kwargs = (to_plain(given, signature.fixed) for given in (list(signature.args), signature.kwargs))
    return {
        "inputs": {"args": args["list"], "kwargs": kwargs["dict"], "fixed": signature.fixed},
        "schedule": json.loads(state.settled.schedule.to_json()),
        "graph": graph_to_plain(captured, tensors.state_of(model)),
    }


def _planned_by(options: Options) -> dict[str, Any] | None:
    """Return the options by which another image size is planned; None where counts were given."""
    if not isinstance(options.schedule, str):
        return None
    budget = options.latency_budget
    latency = None if budget is None else budget.ratio if budget.seconds is None else f"{1e6 * budget.seconds:.6f} us"
    return {"schedule": options.schedule, "flops_budget": options.flops_budget, "latency_budget": latency}


def _target(options: Options) -> str:
    """Return the name of the target; "auto" where it is this machine's own, so that it is another machine's there."""
    name = options.target.name
    if name == detect().name:
        return "auto"
    if name not in TARGETS:
        raise SaveError(
            f"target {name!r} has no name that a file could have: put it into gtp_fx.targets.TARGETS[{name!r}], here "
            f"and where the model is loaded"
        )
    return name


def _complete(described: Mapping[str, Any], model: nn.Module, draft: Path) -> None:
    """Write the weights that aren't in a folder yet, and the record."""
    held = tensors.state_of(model)
    digests = {name: tensors.digest_of(tensor) for name, tensor in held.items()}
    stored = tensors.written_state(draft, held, digests)
    files = sorted(file.name for file in draft.glob("*.safetensors"))
    Record(
        **described,
        files=files,
        weights=tensors.digest_of_all(digests),
        tensors={name: [tensors.form(tensor), stored[name]] for name, tensor in held.items()},
    ).write(draft)


def _move(draft: Path, folder: Path) -> None:
    """Move all files of a draft into place; the record goes first from there and comes last, since it vouches."""
    (folder / record.FILE).unlink(missing_ok=True)
    written = sorted(draft.iterdir(), key=lambda path: path.name == record.FILE)
    names = {path.name for path in written}
    for old in folder.iterdir():
        if _WEIGHTS.fullmatch(old.name) and old.name not in names:
            old.unlink()  # Hugging Face would read it in place of the new ones
    for path in written:
        path.replace(folder / path.name)


def _write_own(model: nn.Module, draft: Path, options: Mapping[str, Any]) -> None:
    """Let the original write what its own save_pretrained writes."""
    with _configuration_kept(model):
        try:
            model.save_pretrained(str(draft), **options)  # type: ignore[operator]
        except OSError:
            raise
        except Exception as error:  # whatever another's code raises
            raise SaveError(f"{type(model).__name__}'s own save_pretrained failed: {error}") from error


@contextlib.contextmanager
def _configuration_kept(model: nn.Module) -> Iterator[None]:
    """Put the attributes of a model's configuration back: Hugging Face writes the class and dtype there as it saves."""
    held = getattr(getattr(model, "config", None), "__dict__", None)
    before = dict(held) if isinstance(held, dict) else {}
    try:
        yield
    finally:
        if isinstance(held, dict) and held != before:
            held.clear()
            held.update(before)


def _tell_of_hooks(model: nn.Module) -> None:
    """Warn of the user's forward hooks, which are code."""
    hooked = [path or "the model" for path, module in model.named_modules() if user_hooks(module)]
    if hooked:
        warn(
            f"forward hooks on {', '.join(hooked[:4])} aren't saved: register them on what gtp_fx.load returns",
        )
