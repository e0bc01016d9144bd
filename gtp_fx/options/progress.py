"""Progress bar on stderr, for work that takes a minute or more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

Progress = Callable[[str, int, int], object]
"""Called with a label of what begins now, the number of steps done, and the total."""


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """Show a progress bar within the context, and remove it afterwards; nothing where stderr is no terminal.

    Yields a function that updates the bar. The total may change from one update to the next.
    """
    with tqdm(
        disable=None if shown else True,
        bar_format="{desc} |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]",
        leave=False,
    ) as bar:

        def show(label: str, done: int, total: int) -> None:
            bar.total, bar.n = total, done
            bar.set_description_str(label)

        yield show


@dataclass
class Steps:
    """Counter of steps that reports to a `Progress` callback.

    total: number of steps.
    progress: callback, or None.
    finished: steps done so far.
    label: what runs now.
    """

    # tqdm counts too, but the callback may be something other than tqdm's bar: a test's function, or None.

    total: int
    progress: Progress | None = None
    finished: int = 0
    label: str = ""

    def begin(self, label: str) -> None:
        self.label = label
        self._tell()

    def done(self) -> None:
        self.finished += 1
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.label, self.finished, self.total)
