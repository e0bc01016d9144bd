"""Record of what the passes do: in the log, in torch's trace (tlparse), and on request in files.

TORCH_LOGS="gtp_fx"     operators and share of the FLOPs after each pass; "+gtp_fx": also those added and removed
TORCH_TRACE=folder      every graph as an artifact that `tlparse folder/*.log` shows
dump_graphs="folder"    every graph as a file (00_captured.py, 01_normalise.py, …), in one folder per captured graph
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from gtp_fx.graph.nodes import operator_name
from gtp_fx.graph.torch_internals import log_artifact

log = logging.getLogger(__name__)


@dataclass
class Journal:
    """Record of one graph on its way through the passes.

    folder: where its states are written; None for nowhere.
    pages: how many states have been recorded.
    last: operators of the last state, with their counts.
    """

    folder: Path | None = None
    pages: int = 0
    last: Counter[str] = field(default_factory=Counter)

    @classmethod
    def beginning(cls, captured: fx.GraphModule, dump: str | None) -> Journal:
        """Start the record of a captured graph. dump: where to make a folder for it, None for no files."""
        folder = None
        if dump is not None:
            numbered = (Path(dump) / f"graph_{number}" for number in itertools.count())
            folder = next(path for path in numbered if not path.exists())
            folder.mkdir(parents=True)
        journal = cls(folder)
        journal.page("captured", captured)
        return journal

    def page(self, name: str, gm: fx.GraphModule) -> None:
        """Record the graph after the pass `name`."""
        counts = Counter(operator_name(node) for node in gm.graph.nodes if node.op == "call_function")
        if self.pages and log.isEnabledFor(logging.DEBUG):
            added, removed = _listed(counts - self.last), _listed(self.last - counts)
            log.debug("%s: added %s; removed %s", name, added or "nothing", removed or "nothing")
        label = f"{self.pages:02d}_{name}"
        log_artifact(f"gtp_fx_{label}", lambda: _readable(gm))
        if self.folder is not None:
            (self.folder / f"{label}.py").write_text(_readable(gm) + "\n")
        self.pages, self.last = self.pages + 1, counts

    def note(self, name: str, text: str) -> None:
        """Record a text beside the graphs: the schedule, the report."""
        log.info("%s\n%s", name, text)
        log_artifact(f"gtp_fx_{name}", lambda: text)
        if self.folder is not None:
            (self.folder / f"{name}.txt").write_text(text + "\n")


def _readable(gm: fx.GraphModule) -> str:
    """Return the graph as Python code with shapes."""
    return gm.print_readable(print_output=False)


def _listed(counts: Counter[str]) -> str:
    """List operators with their counts, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())
