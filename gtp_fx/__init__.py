"""gtp_fx: make any pre-trained vision transformer faster by graph-based token propagation, with no retraining.

    model = gtp_fx.optimize(model, flops_budget=0.74)
    fast = torch.compile(model, backend="gtp", options={"flops_budget": 0.74})

ARCHITECTURE.md is the map.
"""

import sys as _sys
from importlib.util import module_from_spec as _module_from_spec
from importlib.util import spec_from_file_location as _spec_from_file_location
from pathlib import Path as _Path


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
from gtp_fx.measure.evaluation.evaluate import evaluate  # noqa: E402
from gtp_fx.measure.evaluation.evaluation import Evaluation  # noqa: E402
from gtp_fx.model.exporting import Exported, ExportError, export, exported_program  # noqa: E402
from gtp_fx.model.optimize import optimize  # noqa: E402
from gtp_fx.model.optimized_model import OptimizedModel  # noqa: E402
from gtp_fx.model.saving.load import load  # noqa: E402
from gtp_fx.options.calibration import Calibration  # noqa: E402
from gtp_fx.options.schedule import BlockShape, Schedule  # noqa: E402
from gtp_fx.report.provenance import Provenance  # noqa: E402
from gtp_fx.report.report import Report  # noqa: E402
from gtp_fx.strategies import GTP, ToMe, TopK  # noqa: E402

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
    "InputError",
    "InternalError",
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
    "load",
    "optimize",
]
