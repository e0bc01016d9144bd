"""gtp_fx: make any pre-trained vision transformer faster by graph-based token propagation, with no retraining.

    model = gtp_fx.optimize(model, flops_budget=0.74)
    fast = torch.compile(model, backend="gtp", options={"flops_budget": 0.74})

ARCHITECTURE.md is the map.

Importing this package imports no torch, which takes seconds: the command line's --help has no use for it. The rest
comes with the first look at a name that isn't there yet, and the operators `torch.ops.gtp_fx` with torch.
"""

import sys as _sys
import typing as _typing
from collections.abc import Sequence as _Sequence
from importlib import import_module as _import_module
from importlib.abc import MetaPathFinder as _MetaPathFinder
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import module_from_spec as _module_from_spec
from importlib.util import spec_from_file_location as _spec_from_file_location
from pathlib import Path as _Path
from types import ModuleType as _ModuleType


def _import_beside(name: str) -> None:
    """Import a folder that lies beside this package, in a checkout, as its subpackage.

    Not by the package's `__path__`: whoever walks that (torch does, for TORCH_LOGS) would find this package in itself,
    without end. And before anybody asks: another checkout may be installed, and the two belong to the one that runs.
    """
    folder = _Path(__file__).resolve().parents[1] / name
    spec = _spec_from_file_location(f"gtp_fx.{name}", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    _sys.modules[spec.name] = module = _module_from_spec(spec)
    globals()[name] = module
    spec.loader.exec_module(module)


if not (_Path(__file__).parent / "passes").exists():  # an installed package has both inside
    _import_beside("targets")
    _import_beside("passes")

from gtp_fx.errors import (  # noqa: E402
    BudgetError,
    CaptureError,
    ExportError,
    GtpError,
    InputError,
    InternalError,
    LoadError,
    OptionError,
    Refusal,
    SaveError,
    ScheduleError,
    UnsupportedModelError,
)

if _typing.TYPE_CHECKING:
    from gtp_fx.measure.evaluation.evaluate import evaluate
    from gtp_fx.measure.evaluation.evaluation import Evaluation
    from gtp_fx.model.exporting import Exported, export, exported_program, load_cache
    from gtp_fx.model.image_tokens import ImageTokens, fewer_image_tokens
    from gtp_fx.model.optimize import optimize
    from gtp_fx.model.optimized_model import OptimizedModel
    from gtp_fx.model.saving.load import load
    from gtp_fx.options.calibration import Calibration
    from gtp_fx.options.schedule import BlockShape, Schedule
    from gtp_fx.report.kept_tokens import KeptTokens
    from gtp_fx.report.provenance import Provenance
    from gtp_fx.report.report import Report
    from gtp_fx.strategies import GTP, ToMe, TopK

__version__ = "0.1.0"

__all__ = [
    "GTP",
    "BlockShape",
    "BudgetError",
    "Calibration",
    "CaptureError",
    "Evaluation",
    "ExportError",
    "Exported",
    "GtpError",
    "ImageTokens",
    "InputError",
    "InternalError",
    "KeptTokens",
    "LoadError",
    "OptimizedModel",
    "OptionError",
    "Provenance",
    "Refusal",
    "Report",
    "SaveError",
    "Schedule",
    "ScheduleError",
    "ToMe",
    "TopK",
    "UnsupportedModelError",
    "evaluate",
    "export",
    "exported_program",
    "fewer_image_tokens",
    "load",
    "load_cache",
    "optimize",
]

_LATER = {
    "gtp_fx.measure.evaluation.evaluate": ("evaluate",),
    "gtp_fx.measure.evaluation.evaluation": ("Evaluation",),
    "gtp_fx.model.exporting": ("Exported", "export", "exported_program", "load_cache"),
    "gtp_fx.model.image_tokens": ("ImageTokens", "fewer_image_tokens"),
    "gtp_fx.model.optimize": ("optimize",),
    "gtp_fx.model.optimized_model": ("OptimizedModel",),
    "gtp_fx.model.saving.load": ("load",),
    "gtp_fx.options.calibration": ("Calibration",),
    "gtp_fx.options.schedule": ("BlockShape", "Schedule"),
    "gtp_fx.report.kept_tokens": ("KeptTokens",),
    "gtp_fx.report.provenance": ("Provenance",),
    "gtp_fx.report.report": ("Report",),
    "gtp_fx.strategies": ("GTP", "ToMe", "TopK"),
}
"""Modules that import torch, and the names that this package has from each: those above, for type checkers."""


def _later(name: str) -> object:
    """Import everything, at the first look at a name or a subpackage that isn't there yet."""
    if not name.startswith("_"):
        found = {public: getattr(_import_module(module), public) for module in _LATER for public in _LATER[module]}
        globals().update(found)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if not _typing.TYPE_CHECKING:  # a type checker would take any name for one of this package's
    __getattr__ = _later  # PEP 562


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _WithTorch(_MetaPathFinder):
    """Finds torch where the others do, and registers gtp_fx's operators once it is imported.

    A graph that was pickled names them as torch.ops.gtp_fx.…, which this package doesn't hear of.
    """

    def find_spec(
        self, fullname: str, path: _Sequence[str] | None, target: _ModuleType | None = None
    ) -> _ModuleSpec | None:
        if fullname != "torch":
            return None
        others = (finder.find_spec(fullname, path, target) for finder in _sys.meta_path if finder is not self)
        spec = next(filter(None, others), None)
        if spec is None or spec.loader is None:
            return spec
        loader: _typing.Any = spec.loader

        def run_and_register(module: _ModuleType) -> None:
            del loader.exec_module  # back to its class's
            loader.exec_module(module)
            _sys.meta_path.remove(self)
            _import_module("gtp_fx.ops")

        loader.exec_module = run_and_register
        return spec


if _sys.modules.get("torch") is not None:
    _import_module("gtp_fx.ops")
else:
    _sys.meta_path.insert(0, _WithTorch())
