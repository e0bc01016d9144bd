"""Answers from `bench.gpu_quarter`'s results, a line per question, to decide what to run next. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench.gpu_plan import GOALS
from bench.gpu_turns import Outcome

MOST_LINES = 30
_WRONG_TOLD = 4
Found = Mapping[str, Any]
"""Results that a stage kept."""


def answers(found: Mapping[str, Found], outcomes: Sequence[Outcome]) -> list[str]:
    """Return at most `MOST_LINES` lines of answers. The last line says which stages were skipped or failed.

    found: results by stage.
    outcomes: how the stages ended.
    """
    lines: list[str] = []
    for what, lines_of in _QUESTIONS.items():
        names = sorted((name for name in found if name.split("-")[0] == what and found[name]), key=_order)
        try:
            lines += lines_of(names, found)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # don't lose the other answers
            lines.append(f"{what}? it can't be read off what was kept, {type(error).__name__}: {error}")
    trouble = [f"{outcome.stage} ({outcome.trouble})" for outcome in outcomes if outcome.trouble]
    last = f"left out or failed: {'; '.join(trouble)}" if trouble else "nothing was left out"
    return [*lines[: MOST_LINES - 1], last[:2000]]


def _order(name: str) -> tuple[bool, int, str]:
    """Return a sort key of stages: large batches before batch 1, then nets in the order of `GOALS`."""
    _, *rest = name.split("-")
    nets = list(GOALS)
    return rest[-1:] == ["1"], nets.index(rest[0]) if rest and rest[0] in nets else len(nets), name


def wrong_checks(found: Mapping[str, Found]) -> list[Found]:
    """Return the checks of kernels that failed."""
    parts = [part for name, part in found.items() if name.split("-")[0] == "checks"]
    return [check for part in parts for check in part["checks"] if not check["right"]]


def _environment(name: str, part: Found) -> Iterator[str]:
    chosen, versions = part["attention_chosen"], part["versions"]
    yield (
        f"where? {part['processor']}, torch {versions['torch']}, triton {versions['triton']}, cuDNN {part['cudnn']}; "
        f"torch's attention is {chosen['plain']}, with a mask {chosen['mask']}; "
        f"a copy {part['copy']['bytes_a_second'] / 1e12:.3g} TB/s, a product "
        f"{part['product']['flops_a_second'] / 1e12:.4g} TFLOP/s; commit {part['commit'][:9]}"
    )


def _checks(names: Sequence[str], found: Mapping[str, Found]) -> Iterator[str]:
    parts = [found[name] for name in names]
    if not parts:
        return
    wrong = wrong_checks(found)
    told = [f"{one['kernel']} at {one['case']} in {one['dtype']} ({one['failed'] or _off(one)})" for one in wrong]
    verdict = f"WRONG: {'; '.join(told[:_WRONG_TOLD])}" if wrong else "yes"
    if len(told) > _WRONG_TOLD:
        verdict += f"; and {len(told) - _WRONG_TOLD} more"
    checks = sum(len(part["checks"]) for part in parts)
    cases = [sum(part[count] for part in parts) for count in ("done", "wanted")]
    yield (
        f"kernels right? {verdict} ({checks - len(wrong)} of {checks} checks, "
        f"{cases[0]} of {cases[1]} cases of {', '.join(names)}"
        ")"
    )


def _off(check: Found) -> str:
    return f"{check['error']:.1e}, tolerance {check['tolerance']:.1e}"


def _model(name: str, part: Found) -> Iterator[str]:
    label = f"{part['net']} x{part['batch']}"
    goal = 1.0 if part["batch"] == 1 else GOALS[part["net"]]
    failed = [f"{one} {entry['failed'][:80]}" for one, entry in part["contenders"].items() if entry["failed"]]
    trouble = [f"OUTPUTS OFF: {', '.join(part['wrong'])}"] if part["wrong"] else []
    trouble += [f"FAILED: {'; '.join(failed)}"] if failed else []
    if part["speed_up"] is None:
        yield f"{label}, goal {goal:.2f}? no figure. {' '.join(trouble)}"
        return
    low, median, high = part["speed_up"]
    ours, original = (_with_time(part, part["fastest"][kind]) for kind in ("ours", "original"))
    yield (
        f"{label}, goal {goal:.2f}? {'met' if median >= goal else 'missed'}: "
        f"{median:.3f}x ({low:.3f} – {high:.3f}), predicted {part['predicted']:.2f}; "
        f"{ours} against {original}, {_of_originals(part)}; {part['flops_ratio']:.3f} of the FLOPs"
        f"{'; ' + ' '.join(trouble) if trouble else ''}"
    )
    profile = part["profile"]
    if len(profile) == 2:
        before, after = profile["original"]["groups"], profile["ours"]["groups"]
        used = [group for group in after if before[group] or after[group]]
        told = [f"{group} {before[group] / 1e3:.2f} → {after[group] / 1e3:.2f}" for group in used]
        yield f"{label}, what eats it? ms {', '.join(told)}"


def _of_originals(part: Found) -> str:
    """Return text on the originals that ran. "the best" is claimed only where all of them did."""
    ran = sum(bool(entry["rounds"]) for name, entry in part["contenders"].items() if name.startswith("original"))
    if not part["not_run"]:
        return f"the best of {ran} originals"
    return f"the fastest of {ran}, {len(part['not_run'])} not run"


def _with_time(part: Found, contender: str) -> str:
    return f"{_median(part, contender) * 1e3:.3g} ms ({contender})"


def _median(part: Found, contender: str) -> float:
    return float(statistics.median(part["contenders"][contender]["rounds"]))


def _changes(names: Sequence[str], found: Mapping[str, Found]) -> Iterator[str]:
    """Yield the speed-up of each single change over the same model without it, a line per net, batch and kind.

    Both are from one process.
    """
    told: dict[str, list[str]] = {}
    for part in (found[name] for name in names):
        for kind in ("original", "ours"):
            own = {name: entry for name, entry in part["contenders"].items() if name.split(", ")[0] == kind}
            for changed in list(own)[1:]:
                label = f"{part['net']} x{part['batch']}, does it help? {kind}, over {next(iter(own))}:"
                told.setdefault(label, []).append(_change(part, next(iter(own)), changed))
    for label, changes in told.items():
        yield f"{label} {', '.join(changes)}"


def _change(part: Found, base: str, changed: str) -> str:
    short = ", ".join(word for word in changed.split(", ") if word not in base.split(", "))
    failed = part["contenders"][base]["failed"] or part["contenders"][changed]["failed"]
    if failed:
        return f"{short} failed ({failed[:80]})"
    off = ", OUTPUTS OFF" if changed in part["wrong"] else ""
    return f"{short} {_median(part, base) / _median(part, changed):.3f}x{off}"


def _kernels(name: str, part: Found) -> Iterator[str]:
    rows = part["rows"]
    copies = [
        row["moved"]["copy"] / row["seconds"]["copy"] for row in rows if row["kernel"] == "copy" and row["seconds"]
    ]
    by_size: dict[str, list[str]] = {}
    for row in (row for row in rows if row["kernel"] != "copy"):
        told = [_timed(row, contender, copies) for contender in row["seconds"]]
        told += [f"{contender} {why[:60]}" for contender, why in row["failed"].items()]
        label = "patch embedding" if row["kernel"] == "patch embedding" else str(tuple(row["size"]))
        of = f"{tuple(row['size'])} " if row["kernel"] == "patch embedding" else f"{row['kernel']}: "
        by_size.setdefault(label, []).append(f"{of}{', '.join(told)}")
    for label, told in by_size.items():
        yield f"{label}, us? {'; '.join(told)}"


def _timed(row: Found, contender: str, copies: Sequence[float]) -> str:
    taken = row["seconds"][contender]
    share = ""
    if copies and contender in row["moved"]:
        share = f" ({row['moved'][contender] / taken / copies[0]:.2f} of a copy)"
    return f"{contender} {taken * 1e6:.1f}{share}"


def _sweep(name: str, part: Found) -> Iterator[str]:
    told = [f"{what} {', '.join(map(str, counts)) or 'nowhere'}" for what, counts in part["steps"].items()]
    yield f"{part['net']} x{part['batch']}, where does time step? tokens from {'; '.join(told)}"


def _tiles(name: str, part: Found) -> Iterator[str]:
    for place, row in enumerate(part["rows"]):
        best = f", best {part['best'][place]}" if part.get("best") else ""
        ordered = sorted(row["seconds"], key=row["seconds"].__getitem__)[:6]
        told = [_timed(row, contender, ()) for contender in ordered] or list(row["failed"])[:3]
        yield f"{row['kernel']} {tuple(row['size'])}{best}? us, the fastest: {', '.join(told)}"


def _sanitize(name: str, part: Found) -> Iterator[str]:
    failing = part["failing"]
    where = "no case fails" if failing["right"] else f"fails at {failing.get('size', 'its start')}"
    lines = part["end"].strip().splitlines()
    printed = lines[-1][:200] if lines else "nothing printed"
    yield f"{name}? {where}; {part['tool']}: exit code {part['exit']}, {printed}"


def _warps(name: str, part: Found) -> Iterator[str]:
    told = [f"{warps}: {'right' if found.get('right') else 'WRONG'}" for warps, found in part["warps"].items()]
    yield f"{name}, does it change with them? {', '.join(told)}"


def _each(lines_of: Callable[[str, Found], Iterator[str]]) -> Callable[[Sequence[str], Mapping[str, Found]], list[str]]:
    return lambda names, found: [line for name in names for line in lines_of(name, found[name])]


_QUESTIONS: Mapping[str, Callable[[Sequence[str], Mapping[str, Found]], Iterable[str]]] = {
    "environment": _each(_environment),
    "checks": _checks,
    "sanitize": _each(_sanitize),
    "warps": _each(_warps),
    "model": _each(_model),
    "full": _each(_model),
    "plain": _each(_model),
    "ablate": _changes,
    "options": _changes,
    "kernels": _each(_kernels),
    "tiles": _each(_tiles),
    "sweep": _each(_sweep),
}
"""Functions that answer, by the first word of a stage's name, the most useful first. The last lines are dropped where
there are too many."""
