"""Planner for a model that is captured once and planned for several budgets and targets, as `gtp-fx plan` does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from gtp_fx.analysis.returned_tokens import returned_tokens
from gtp_fx.analysis.typed_graph import typed_graph
from gtp_fx.capture.inputs import call_signature
from gtp_fx.capture.module import capture_call
from gtp_fx.capture.wrapped import without_compiling
from gtp_fx.model.internal_errors import internal_errors_reported
from gtp_fx.model.pipeline import run_exact_passes
from gtp_fx.model.shorter_outputs import must_be_shorter
from gtp_fx.options.calibration import bound
from gtp_fx.options.options import Options
from gtp_fx.passes.runner import apply_plan_unverified
from gtp_fx.plan.make_plan import make_plan
from gtp_fx.report.forecast import Forecast
from gtp_fx.report.forecasting import forecast


class Planner:
    """A captured model, to be planned for any number of budgets and targets."""

    def __init__(self, model: nn.Module, example_inputs: Any = None) -> None:
        model = without_compiling(model)
        with internal_errors_reported():
            signature = call_signature(model, example_inputs)
            self._captured, self._signature = capture_call(model, signature)

    def plan(self, options: Options) -> Forecast:
        """Return the forecast for one set of options. Raises what `optimize` raises for the same options."""
        if options.calibration is not None:
            options = replace(options, calibration=bound(options.calibration, self._signature.canonical))
        with internal_errors_reported():
            exact = run_exact_passes(self._captured, options)
            planned = make_plan(exact.graph_module, options, exact.original, apply_plan_unverified)
            if options.as_left:
                graph = exact.graph_module.graph
                typing = typed_graph(graph).whole if planned.found is None else planned.found.typing
                must_be_shorter(graph, returned_tokens(typing), planned.plan)
            return forecast(exact.graph_module, exact.original, planned, options)
