"""The function `load`: a model that `OptimizedModel.save_pretrained` wrote, as it was."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtp_fx.capture.signatures import CallSignature, canonical_arguments
from gtp_fx.capture.wrapped import without_compiling
from gtp_fx.errors import GtpError, LoadError, SaveError
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.optimized_model import OptimizedModel
from gtp_fx.model.saving import tensors
from gtp_fx.model.saving.build import build
from gtp_fx.model.saving.plain import graph_to_plain, of_plain
from gtp_fx.model.saving.record import Record, versions_of
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import AUTO, Schedule
from gtp_fx.strategies.registry import of_plain as strategy_of_plain

_MOST = 3
"""The most differences that a message lists."""


def load(folder: str | Path, model: nn.Module | None = None, *, compile: bool | None = None) -> OptimizedModel:
    """Return the model that `save_pretrained` wrote into a folder: the same schedule, weights and result.

    Nothing is planned or calibrated, and no code is taken from the folder.

    model: built as the saved one was; it gets the folder's weights, in place. None builds it, in eval mode on the CPU,
        where timm or transformers has it by name.
    compile: let Inductor compile the graph at its first call; None does so where the saved model did.

    Raises LoadError where the files are missing, broken or of another format, or where the model, its weights or its
    forward aren't what was saved; a model given is as it was then. OptionError where the strategy isn't registered.
    """
    path = Path(folder)
    model = without_compiling(model) if isinstance(model, nn.Module) else model
    if model is not None and (not isinstance(model, nn.Module) or isinstance(model, OptimizedModel)):
        raise LoadError(f"model is a {type(model).__name__}: give the nn.Module that gtp_fx.optimize was given")
    saved = Record.read(path)
    try:
        forms = [_Form.read(saved, form) for form in saved.forms]
    except (KeyError, TypeError) as error:
        raise LoadError(f"{path} holds a record that can't be read: {error!r}") from error
    stored = tensors.read_files(path / name for name in saved.files)
    wanted = {name: stored.get(key) for name, (_, key) in saved.tensors.items()}
    with internal_errors_reported():
        target = build(saved.recipe, path, saved.model) if model is None else model
        how = "the model that is built by name" if model is None else "the model given"
        advice = "give model=, built as it was" if model is None else "build it as it was"
        if model is None:
            _take_dtypes(target, wanted)
        before = _must_have(target, saved, f"{how} isn't the one that was saved", advice)
        if model is not None:
            before = {name: tensor.detach().clone() for name, tensor in before.items()}
        try:
            _fill(target, wanted, saved, path)
            return _made(target, forms, saved, compile, how, advice)
        except BaseException:
            if model is not None:
                _put(target, before)
            raise


@dataclass(frozen=True)
class _Form:
    """One form of call, as saved.

    call: arguments.
    fixed: whether the values of its integers are part of it.
    options: what makes the saved graph from a captured one.
    graph: the captured graph's operators and digest.
    """

    call: tuple[tuple[Any, ...], dict[str, Any]]
    fixed: bool
    options: Options
    graph: dict[str, Any]

    @classmethod
    def read(cls, saved: Record, form: Mapping[str, Any]) -> _Form:
        """Read a form of the record."""
        inputs = form["inputs"]
        call = tuple(of_plain(value) for value in inputs["args"]), of_plain({"dict": inputs["kwargs"]})
        schedule = Schedule.from_json(json.dumps(form["schedule"]))
        # Without blocks only the exact passes ran.
        counts: dict[str, Any] = {"schedule": schedule} if len(schedule) else {"schedule": AUTO, "flops_budget": 1.0}
        options = Options.of(**_given(saved), **counts, strategy=strategy_of_plain(saved.strategy))
        return cls(call, bool(inputs.get("fixed")), options, form["graph"])


def _given(saved: Record) -> dict[str, Any]:
    """Return the saved options that are those of `Options`, without budgets."""
    others = ("budget", "planned_by", "compile", "recapture", "any_size")
    return {name: value for name, value in saved.options.items() if name not in others}


def _must_have(model: nn.Module, saved: Record, what: str, advice: str) -> dict[str, Tensor]:
    """Return a model's tensors. Raises LoadError where its class, or their names or forms, aren't those saved."""
    try:
        held = tensors.state_of(model)
    except SaveError as error:
        raise LoadError(f"{what}: its {error}") from error
    forms = {name: tensors.form(tensor) for name, tensor in held.items()}
    wanted = {name: form for name, (form, _) in saved.tensors.items()}
    differ = [f"no {name}" for name in wanted if name not in forms]
    differ += [f"{name}, which that had not" for name in forms if name not in wanted]
    differ += [
        f"{name} of {forms[name]}, not {wanted[name]}"
        for name in wanted
        if forms.get(name, wanted[name]) != wanted[name]
    ]
    if type(model).__name__ != saved.model:
        differ.insert(0, f"the class {type(model).__name__}, not {saved.model}")
    if differ:
        more = f" and {len(differ) - _MOST} more" if len(differ) > _MOST else ""
        raise LoadError(
            f"{what}: it has {'; '.join(differ[:_MOST])}{more}. {advice.capitalize()}{_versions(saved, model)}"
        )
    return held


def _take_dtypes(model: nn.Module, wanted: Mapping[str, Tensor | None]) -> None:
    """Give every parameter and buffer of a new model the saved one's dtype, each for itself."""
    for name, held in tensors.state_of(model).items():
        value = wanted.get(name)
        if value is not None and held.dtype != value.dtype:
            held.data = held.data.to(value.dtype)


def _fill(model: nn.Module, wanted: Mapping[str, Tensor | None], saved: Record, folder: Path) -> None:
    """Put the saved weights into a model that has their names and forms. Raises LoadError where they aren't those."""
    missing = [name for name, value in wanted.items() if value is None]
    if not missing:
        _put(model, wanted)  # type: ignore[arg-type]
    digests = {name: tensors.digest_of(tensor) for name, tensor in tensors.state_of(model).items()}
    if missing or tensors.digest_of_all(digests) != saved.weights:
        raise LoadError(
            f"{folder}: the weights in {', '.join(saved.files)} aren't those that were saved with the rest, or the "
            f"model ties some of them that weren't tied then: save the optimised model again"
        )


def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put numbers into a model's parameters and buffers, in place."""
    persistent = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in values.items() if name in persistent})
    buffers = dict(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name in values.keys() - persistent:
            buffers[name].copy_(values[name])


def _made(
    model: nn.Module, forms: Sequence[_Form], saved: Record, compile: bool | None, how: str, advice: str
) -> OptimizedModel:
    """Return the optimised model. Raises LoadError where its forward isn't the saved one's."""
    parameters = inspect.signature(model.forward)
    compiles = saved.options["compile"] if compile is None else compile
    made: list[OptimizedModel] = []
    for form in forms:
        try:
            args, kwargs = canonical_arguments(parameters, *form.call)
            signature = CallSignature(parameters, args, kwargs, fixed=form.fixed).like(model, None)
        except TypeError as error:
            raise LoadError(f"{how} can't be called as the saved one was: {error}. {advice.capitalize()}") from error
        try:
            fast = OptimizedModel(
                model,
                signature,
                form.options,
                compiles,
                recapture=saved.options["recapture"],
                taps=tuple(saved.taps),
                any_size=saved.options["any_size"] and not made,
                own_calls=frozenset(saved.own_calls),
            )
        except GtpError as error:
            raise LoadError(
                f"{how} can't be optimised as it was: {error}. {advice.capitalize()}{_versions(saved, model)}"
            ) from error
        found = graph_to_plain(fast.captured_graph, saved.tensors)
        if found != form.graph:
            raise LoadError(
                f"{how} has the saved one's weights and another forward: {_differing(found, form.graph)}. "
                f"{advice.capitalize()}{_versions(saved, model)}"
            )
        made.append(fast)
    first, *others = made
    for other in others:
        first._gtp.forms.add(other, for_good=True)
    if saved.options.get("planned_by"):  # for sizes that come later
        planned = Options.of(**_given(saved), **saved.options["planned_by"], strategy=first.strategy)
        first._gtp.options = planned
    return first


def _differing(found: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Return in which operators two graphs differ."""
    now, then = found["operators"], saved["operators"]
    differ = [
        f"{name} {then.get(name, 0)} times then and {now.get(name, 0)} now"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
    ]
    more = f" and {len(differ) - _MOST} more" if len(differ) > _MOST else ""
    return f"{'; '.join(differ[:_MOST])}{more}" if differ else "the same operators are called with other arguments"


def _versions(saved: Record, model: nn.Module) -> str:
    """Return the end of a message: what else may be the reason."""
    others = saved.other_versions(versions_of(type(model)))
    return (
        f"; or it is the versions ({others}): optimize the model again, with schedule="
        f"gtp_fx.Schedule.from_json(json.dumps(record['forms'][0]['schedule'])), and save it"
        if others
        else ""
    )
