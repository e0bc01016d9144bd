"""In a checkout that isn't installed, passes/ and targets/ stand beside this package, and are found there as its subpackages.

Not by the package's `__path__`: whoever walks that (torch does, for TORCH_LOGS) would find this package in itself, without end.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

_ROOT = Path(__file__).resolve().parent.parent
_BESIDE = {"gtp_fx.passes": "find_blocks.py", "gtp_fx.targets": "target.py"}
"""And a file of each, by which it is told from somebody else's folder of that name in a site-packages."""


class BesideThePackage(MetaPathFinder):
    """Asked first: another checkout may be installed, and the two belong to the one that is running."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _BESIDE:
            return None
        folder = _ROOT / fullname.rpartition(".")[2]
        if not (folder / _BESIDE[fullname]).exists():
            return None
        return spec_from_file_location(fullname, folder / "__init__.py", submodule_search_locations=[str(folder)])
