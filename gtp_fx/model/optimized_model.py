"""The nn.Module that `optimize` returns, which replaces the original.

It has the original's call, output type and shapes, and its parameters and modules: the very same ones, under the same
names. Layers are called by its graph as they are, with their hooks; what holds them (a block) isn't called. It takes
any batch and supports both modes, `.to()` and `state_dict()`. It has the original's attributes (`config`,
`pretrained_cfg`, …) and methods; methods that take tensors are optimised as well (`gtp_fx.capture.called_as`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from gtp_fx.analysis.returned_tokens import ReturnedTokens
from gtp_fx.capture.signatures import CallSignature, device_of, dtype_of
from gtp_fx.errors import InputError, OptionError, warn
from gtp_fx.graph.torch_internals import with_code
from gtp_fx.model import following, graphs
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.parameters import class_like, stand_for
from gtp_fx.model.pipeline import Optimised
from gtp_fx.model.replacement import Replacement
from gtp_fx.model.saving.card import Evaluated
from gtp_fx.model.saving.write import save
from gtp_fx.model.sizes import add_form, form_taking, prepare
from gtp_fx.model.state import State
from gtp_fx.model.tapping import fire_hooks
from gtp_fx.model.warming import checked_batches, warm
from gtp_fx.options.options import Options
from gtp_fx.options.schedule import Schedule
from gtp_fx.report.attention_maps import attention_maps_runner
from gtp_fx.report.kept_tokens import KeptTokens
from gtp_fx.report.provenance import Provenance, SiteRecord, output_and_provenance_runner, provenance_runner
from gtp_fx.report.report import Report
from gtp_fx.strategies import Strategy

Told = TypeVar("Told")


class OptimizedModel(Replacement):
    """An optimised vision transformer.

    `graph_module` is the rewritten graph, in `gtp_fx` and ATen operators; `report` says what was done to it. `schedule`
    and `strategy` say how many tokens each block removes, and how. Where it was made with `compile`, Inductor compiles
    the graph at the first call. With taps, the graph returns (output, {path: output of that module}).
    """

    def __init__(
        self,
        original: nn.Module,
        signature: CallSignature,
        options: Options,
        compile: bool,
        blocks_needed: bool = True,
        recapture: bool = False,
        taps: tuple[str, ...] = (),
        others: Sequence[CallSignature] = (),
        any_size: bool = False,
        own_calls: frozenset[str] = frozenset(),
    ) -> None:
        """Capture `original` and rewrite its evaluation graph.

        signature: how the original is called, with examples.
        blocks_needed: whether a model without attention over patches is refused.
        recapture: whether a change of the model that its graph can't follow makes a new graph, and is no error.
        taps: paths of modules whose outputs the graph returns, too.
        others: other forms in which it is called, such as image sizes.
        any_size: whether a call of another image size makes a form for it.
        own_calls: paths of layers that no pass may join with others, beside those that aren't plain.
        """
        super().__init__()
        prepare()
        # Set past nn.Module, which would register the original as a child and double every name.
        dtype = dtype_of(original)
        state = State(
            original,
            signature,
            dtype,
            options,
            compile,
            recapture=recapture,
            blocks_needed=blocks_needed,
            taps=taps,
            any_size=any_size,
            own_calls=own_calls,
        )
        object.__setattr__(self, "_gtp", state)
        self.__class__ = class_like(OptimizedModel, type(original))
        stand_for(self, original)
        for path in self._evaluation_runner().watch.hooks():
            following.tell_of_hooks([path])
        for other in others:
            add_form(state, other, self._beside, for_good=True)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten evaluation graph, in `gtp_fx` and ATen operators."""
        return with_code(self._evaluation().optimised.graph_module)

    @property
    def captured_graph(self) -> fx.GraphModule:
        """The evaluation graph as it was captured, before it was rewritten."""
        return with_code(self._evaluation().captured)

    @property
    def report(self) -> Report:
        """FLOPs, sites, passes and refusals."""
        return self._gtp.settled.report

    @property
    def schedule(self) -> Schedule:
        """Number of patch tokens that each attention block removes."""
        return self._gtp.settled.schedule

    @property
    def sites(self) -> tuple[SiteRecord, ...]:
        """The sites that remove tokens, as numbers of the graph's calls; none where tokens only skip branches."""
        return self._evaluation().optimised.sites

    @property
    def returned(self) -> tuple[ReturnedTokens, ...]:
        """The outputs that run over tokens, each with those left; none where they have all tokens (output="full")."""
        return self._evaluation().optimised.returned

    @property
    def strategy(self) -> Strategy:
        """The strategy that was given, or the one that calibration chose."""
        return self._gtp.settled.strategy

    @property
    def inductor_options(self) -> dict[str, Any]:
        """Options for Inductor on this model's device: the target's, overridden by those of the mode."""
        return self._gtp.options.inductor(device_of(self))

    @property
    def signature(self) -> CallSignature:
        """The call's form, with examples of two images, on the model's device and in its dtype."""
        return graphs.signature_now(self._gtp)

    @property
    def forms(self) -> Mapping[str, OptimizedModel]:
        """The optimised model of each form of call: "(float32[*, 3, 224, 224])". The first is this one.

        Each has a graph, a schedule and a report of its own, over the same parameters.
        """
        forms = (self, *self._gtp.forms)
        return MappingProxyType({f._gtp.signature.described: f for f in forms})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the current mode.

        Raises InputError where the call's form differs from the captured one, or where the model was changed in a way
        that its graph doesn't follow.
        """
        return self.with_taps(*args, **kwargs)[0]

    def with_taps(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the model's output and those of the modules that `optimize` was told to tap, by path, from one run.

        Takes the model's own arguments. Tokens that were removed by then are put back, unless output="reduced". Forward
        hooks on those modules fire, here and when the model is called.
        """
        result = self._run(args, kwargs)
        if not self._gtp.taps:
            return result, {}
        output, tapped = result
        fire_hooks(self._gtp.original, tapped)
        return output, tapped

    def with_kept_tokens(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Return the model's output and which tokens it has, from one run, for a model made with output="reduced".

        Takes the model's own arguments. The second has the output's structure, with a `gtp_fx.KeptTokens` in place of
        each output that has fewer tokens than the original's, and None in place of any other. It is computed in the
        graph, which is compiled as the model's own is, at the first call of this method.

        Raises OptionError where the model was made to return all tokens.
        """
        if not self._gtp.options.as_left:
            raise OptionError(
                'with_kept_tokens: the outputs of this model have all tokens; optimize it with output="reduced", or '
                "call with_provenance, which says which of them remained to the end"
            )
        output, kept, _ = self._run(args, kwargs, with_kept=True)
        return (output[0], kept[0]) if self._gtp.taps else (output, kept)

    def kept_by_output(self, *args: Any, **kwargs: Any) -> list[KeptTokens | None]:
        """Return the same for each output, in a flat list, by the numbers of `returned`."""
        kept: list[KeptTokens | None] = self._run(args, kwargs, with_kept=True)[2]
        return kept

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], with_kept: bool = False) -> Any:
        """Return what the graph of the current mode does. with_kept: also which tokens its outputs have."""
        form, args, kwargs = self._form_taking(args, kwargs)
        return graphs.run(form._gtp, form, args, kwargs, with_kept)

    def warm_up(self, batches: Sequence[int] = (1, 8)) -> None:
        """Compile what later calls need, in the mode that this is called in, so that none of them waits.

        batches: numbers of images. One image alone has code of its own; all larger batches share one, whichever are
            given. With `mode="reduce-overhead"` each size that is served has to be given.

        Call it as the model will be called: within `torch.inference_mode()`, autocast and so on. The model is called
        with its example inputs, repeated, in every form that it has by now; in inference mode with tensors made inside
        and outside of it. Forward hooks are called, too. Where the model is eager, a warning says that nothing is
        compiled.

        Raises OptionError for anything but batch sizes, and InputError in training mode, which would change the model.
        """
        sizes = checked_batches(batches)
        if self.training:
            raise InputError("warm_up in training mode would change what the model keeps of its inputs: call eval()")
        if not self._gtp.compiles:
            warn(
                "warm_up: this model isn't compiled, so there is nothing to warm up: optimize(…, compile=True) or "
                "load(…, compile=True)",
            )
        for model in (self, *self._gtp.forms):
            warm(model, model.captured_graph, model.signature, sizes, model._gtp.compiles)

    def provenance(self, *args: Any, **kwargs: Any) -> tuple[Provenance, ...]:
        """Return, for each stream of tokens, which patches each remaining token stands for, and by how much.

        Takes the model's own arguments. Runs the evaluation graph eagerly. Empty where no token is removed.
        """
        return self._told_by(lambda e: provenance_runner(e.graph_module, e.sites, device_of(self)), args, kwargs)

    def attention_maps(self, layers: Sequence[str | int], *args: Any, **kwargs: Any) -> dict[str | int, Tensor]:
        """Return attention maps of some blocks, each [B, H, N, N] in float32, over all tokens, by what `layers` named.

        layers: paths of attention layers, or of modules with one inside, or numbers of blocks as in the report.

        Tokens that were removed before a block have zeros in its map. Takes the model's own arguments after `layers`.
        Runs the evaluation graph eagerly. Raises InputError for what names no attention block.
        """
        return self._told_by(lambda e: attention_maps_runner(e.graph_module, e.attention, layers), args, kwargs)

    def with_provenance(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Provenance, ...]]:
        """Return the model's output and its `provenance`, from one run.

        Takes the model's own arguments. Where the output is a map of tokens in which removed ones have been put back,
        the tokens that remained to the end are those at `index`, after the prefix tokens: a reader of fewer tokens
        takes them.
        """
        output, provenance = self._told_by(
            lambda e: output_and_provenance_runner(e.graph_module, e.sites, device_of(self)), args, kwargs
        )
        return output[0] if self._gtp.taps else output, provenance

    def _told_by(
        self, make: Callable[[Optimised], Callable[..., Told]], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Told:
        """Run what `make` makes of the evaluation graph that takes a call."""
        form, args, kwargs = self._form_taking(args, kwargs)
        evaluation = form._evaluation().optimised
        with internal_errors_reported():
            run = make(evaluation)
        return run(*args, **kwargs)

    def save_pretrained(self, folder: str | Path, *, evaluation: Evaluated | None = None, **options: Any) -> None:
        """Write the whole into a folder, from which `gtp_fx.load` makes it again: the same schedule and result.

        A model with a save_pretrained of its own (Hugging Face's) is written by that as well: the folder is also one
        of the original. Others' weights are in model.safetensors. A save that is broken off leaves nothing to load.

        evaluation: what `gtp_fx.evaluate` found of this model, for a section of README.md, the model card.
        options: what the original's own takes, such as `max_shard_size`.

        Raises SaveError where something of the model can't be in files, and OptionError where the evaluation is of
        other models.
        """
        state = self._gtp
        card = "" if evaluation is None else evaluation.model_card(self)
        with internal_errors_reported():
            self._changing(save, state, self.signature, Path(folder), options, card)

    def _form_taking(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[OptimizedModel, tuple[Any, ...], dict[str, Any]]:
        """Return the model of the form that a call has, and its arguments in canonical form."""
        state = self._gtp
        call = state.signature.bound(args, kwargs)
        return self if state.signature.is_form_of(call) else form_taking(state, call, self._beside), *call

    def _beside(
        self, module: nn.Module, signature: CallSignature, options: Options, blocks_needed: bool, taps: tuple[str, ...]
    ) -> OptimizedModel:
        """Optimise another form of call, or a method, as this model was."""
        state = self._gtp
        with internal_errors_reported(), torch.inference_mode(False):
            return OptimizedModel(module, signature, options, state.compile, blocks_needed, state.recapture, taps)

    def extra_repr(self) -> str:
        """Return the line that nn.Module's repr shows."""
        return f"optimised by gtp_fx, at {self.report.flops_ratio:.4f} of its FLOPs"
