"""A progress bar on stderr, for what takes a minute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

Progress = Callable[[str, int, int], object]
"""Told what begins now, and how many steps of how many are done."""


@contextlib.contextmanager
def progress_bar(shown: bool = True) -> Iterator[Progress]:
    """A bar that is gone when the work is done, and none where stderr is no terminal; the total may still change while it goes."""
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
    """Counts steps for whoever is told. total: of all of them."""

    # tqdm counts too, but whoever is told here need not be a bar of tqdm's: a test, or nobody.

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
