"""An evaluation's tables: accuracy, distance from the original, cost. Each fits 80 columns."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from tabulate import tabulate

from gtp_fx.measure.benchmark import ORIGINAL
from gtp_fx.measure.evaluation.found import Outputs
from gtp_fx.measure.evaluation.intervals import Estimate
from gtp_fx.measure.evaluation.rows import About, Row
from gtp_fx.measure.evaluation.times import Times

_WIDTH = 80
_NONE = "–"


def text(about: About, rows: Sequence[Row]) -> str:
    """Return an evaluation for a terminal."""
    return "\n\n".join([*_tables(about, rows, "simple"), *(_wrapped(note) for note in _notes(about, rows))])


def markdown(about: About, rows: Sequence[Row]) -> str:
    """Return an evaluation in Markdown."""
    return "\n\n".join([*_tables(about, rows, "github"), *_notes(about, rows)])


def _tables(about: About, rows: Sequence[Row], form: str) -> list[str]:
    done = [row for row in rows if row.sums is not None]
    found = [_apart(done, about.outputs, form), _cost(done, form)] if done else []
    return [_accuracy(done, form), *found] if done and not about.unlabelled else found


def _accuracy(rows: Sequence[Row], form: str) -> str:
    """Top-1 and top-5, and what of top-1 was lost."""
    assert rows[0].sums is not None, "only rows with sums come here"
    one, five = rows[0].sums.original
    lines = [[ORIGINAL, *_percent(one), "", "", _percent(five)[0]]]
    for row in rows:
        assert row.sums is not None
        one, five = row.sums.optimised
        lines.append([row.label, *_percent(one), *_percent(row.sums.gained, "+"), _percent(five)[0]])
    return _table(lines, ["accuracy, %", "top-1", "95 %", "change", "95 %", "top-5"], form)


def _apart(rows: Sequence[Row], outputs: Outputs, form: str) -> str:
    """How far the outputs are from the original's."""
    lines = []
    for row in rows:
        assert row.sums is not None
        alike = _percent(row.sums.agreement) if outputs is Outputs.classes else _numbers(row.sums.mean_cosine, "{:.4f}")
        lines.append([row.label, *alike, *_numbers(row.sums.mean_divergence, "{:.3g}", "{:.2g}")])
    names = ["same, %", "divergence"] if outputs is Outputs.classes else ["cosine", "distance"]
    return _table(lines, ["to the original", names[0], "95 %", names[1], "95 %"], form)


def _cost(rows: Sequence[Row], form: str) -> str:
    """FLOPs, time and memory."""
    timed = [row.times for row in rows if row.times is not None]
    with_memory = any(times.peak_bytes is not None for times in timed)
    headers = ["cost", "FLOPs"]
    if timed:
        headers += ["ms", "images/s", "speed-up", "quartiles", *(["MiB"] if with_memory else [])]
    lines = []
    if timed:
        original = timed[0].original
        about = [f"{original * 1e3:.1f}", f"{timed[0].batch / original:.1f}", "1", "", ""]
        lines.append([ORIGINAL, "1", *about][: len(headers)])
    for row in rows:
        lines.append([row.label, f"{row.flops_ratio:.4f}", *_timed(row.times)][: len(headers)])
    return _table(lines, headers, form)


def _timed(times: Times | None) -> list[str]:
    if times is None:
        return [_NONE] * 5
    gain = times.speed_up
    return [
        f"{times.seconds.median * 1e3:.1f}",
        f"{times.images_per_second:.1f}",
        f"{gain.median:.3f}×",
        f"{gain.lower:.3f} – {gain.upper:.3f}",
        _NONE if times.peak_bytes is None else f"{times.peak_bytes / 2**20:.0f}",
    ]


def _notes(about: About, rows: Sequence[Row]) -> list[str]:
    """What the tables are of, and what isn't in them."""
    run, is_classes = about.run, about.outputs is Outputs.classes
    prepared = f", {about.prepared}" if about.prepared else ""
    notes = [
        f"{about.model}, {run['dtype']} on {about.machine}; {about.parameters / 1e6:.2f} M parameters, "
        f"the same in every row. {about.images} images of {about.data}{prepared}."
    ]
    if about.unlabelled and is_classes:
        notes.append(f"No top-1 and top-5 of {about.data}: {about.unlabelled}.")
    notes.append(
        "Intervals are of 95 %: Wilson's for shares, a paired one for the change (both models saw the same images). "
        "Same: share of images with the original's top-1; agreement, not accuracy. Divergence: Kullback-Leibler, "
        "of the original's distribution, in nats, mean over images."
        if is_classes
        else "The outputs are features, for which top-1 agreement isn't defined. Cosine: of an image's features with "
        "the original's; distance: |difference|² / |original|²; means over images with intervals of 95 %."
    )
    timed = [row.times for row in rows if row.times is not None]
    if timed:
        how = f"{run['how']} against {run['how']}"
        batches = sorted({times.batch for times in timed})
        rounds = sorted({times.rounds for times in timed})
        told = (
            f"Times: {how}, medians of {' or '.join(map(str, rounds))} interleaved rounds, batch "
            f"{' or '.join(map(str, batches))}; speed-ups within rounds."
        )
        originals = sorted({times.original for times in timed})
        if len(originals) > 1:
            took = " and ".join(f"{1e3 * seconds:.1f}" for seconds in originals)
            told += f" They are of {len(originals)} runs, in which the original took {took} ms."
        if any(times.peak_bytes is not None for times in timed):
            told += " MiB: most memory of the GPU that tensors took in a run, weights included."
        else:
            told += " Peak memory isn't measured on a CPU, where torch keeps no such count."
        notes.append(told)
    else:
        notes.append(f"Times were not measured; outputs are those of {run['how']} models.")
    notes += [f'{row.name} is {row.strategy}, as strategy="auto" has it.' for row in rows if row.chosen]
    return notes + [f"No {row.name}: {row.reason}" for row in rows if row.reason]


def _table(lines: Sequence[Sequence[str]], headers: Sequence[str], form: str) -> str:
    align = ("left", *("right",) * (len(headers) - 1))
    return tabulate(lines, headers, tablefmt=form, disable_numparse=True, colalign=align)


def _percent(estimate: Estimate, sign: str = "") -> list[str]:
    """Return an estimate and its interval in per cent, or in points, with a sign."""
    hundred = Estimate(*(100 * value for value in (estimate.value, estimate.low, estimate.high)))
    return _numbers(hundred, f"{{:{sign}.2f}}", f"{{:{sign}.1f}}")


def _numbers(estimate: Estimate, form: str, of_interval: str = "") -> list[str]:
    if math.isnan(estimate.low):
        return [form.format(estimate.value), _NONE]
    low, high = ((of_interval or form).format(value) for value in (estimate.low, estimate.high))
    return [form.format(estimate.value), f"{low} – {high}"]


def _wrapped(note: str) -> str:
    return textwrap.fill(note, _WIDTH, break_long_words=False, break_on_hyphens=False)
