"""gtp_fx: make any pre-trained vision transformer faster by graph-based token propagation, with no retraining.

    model = gtp_fx.optimize(model, flops_budget=0.74)
    fast = torch.compile(model, backend="gtp", options={"flops_budget": 0.74})

ARCHITECTURE.md is the map.
"""

import sys as _sys

from gtp_fx.checkout import BesideThePackage as _BesideThePackage

_sys.meta_path.insert(0, _BesideThePackage())

from gtp_fx.api import optimize  # noqa: E402
from gtp_fx.damage.calibration import Calibration  # noqa: E402
from gtp_fx.errors import (  # noqa: E402
    BudgetError,
    CaptureError,
    GtpError,
    InputError,
    OptionError,
    Refusal,
    ScheduleError,
    UnsupportedModelError,
)
from gtp_fx.exporting import Exported, ExportError, export, exported_program  # noqa: E402
from gtp_fx.model import OptimizedModel  # noqa: E402
from gtp_fx.provenance import Provenance  # noqa: E402
from gtp_fx.report import Report  # noqa: E402
from gtp_fx.schedule import BlockShape, Schedule  # noqa: E402
from gtp_fx.strategies import GTP, ToMe, TopK  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "GTP",
    "BlockShape",
    "BudgetError",
    "Calibration",
    "CaptureError",
    "ExportError",
    "Exported",
    "GtpError",
    "InputError",
    "OptimizedModel",
    "OptionError",
    "Provenance",
    "Refusal",
    "Report",
    "Schedule",
    "ScheduleError",
    "ToMe",
    "TopK",
    "UnsupportedModelError",
    "export",
    "exported_program",
    "optimize",
]
