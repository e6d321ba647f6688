"""Does a run reproduce the committed results? A table "yours | committed | same?".

Every headline number of summary.json is compared: identical to the last digit, within the committed
95 % interval, or outside of it. A reason is named where the two runs differ in what made them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from egm_lib.reports.tables.cells import Number, is_summary

IDENTICAL, WITHIN, OUTSIDE, NOT_RUN = "identical", "within the interval", "outside", "not run"
GROUPS = (("acc_at_50", "vanilla"), ("amodal_acc_at_50", "amodal"), ("differences", "difference"))


def verdict(yours: Mapping, committed: Mapping | None) -> str:
    """The comparison as Markdown. yours, committed: contents of summary.json (shares in 0..1)."""
    if committed is None:
        return "No results of this profile are committed, so there is nothing to compare with."
    if not is_summary(committed):
        return "The committed summary.json has another shape, so there is nothing to compare with."
    lines = ["| | yours | committed | same? |", "|---|---|---|---|"]
    counts = dict.fromkeys((IDENTICAL, WITHIN, OUTSIDE, NOT_RUN), 0)
    for name, mine, theirs in _pairs(yours, committed):
        answer = _same(mine, theirs)
        counts[answer] += 1
        lines.append(f"| {name} | {_shown(mine)} | {_shown(theirs)} | {answer} |")
    total = ", ".join(f"{count} {answer}" for answer, count in counts.items() if count)
    lines += ["", f"Of {len(lines) - 2} numbers: {total}."]
    if reasons := _reasons(yours, committed):
        lines.append(f"The two runs differ in {', '.join(reasons)}.")
    return "\n".join(lines)


def _pairs(yours: Mapping, committed: Mapping) -> Iterator[tuple[str, dict | None, dict | None]]:
    for key, group in GROUPS:
        mine, theirs = yours.get(key) or {}, committed.get(key) or {}
        for name in {**theirs, **mine}:
            if mine.get(name) or theirs.get(name):
                yield f"{name}, {group}", mine.get(name), theirs.get(name)


def _same(mine: Mapping | None, theirs: Mapping | None) -> str:
    if not mine or not theirs:
        return NOT_RUN
    if mine["mean"] == theirs["mean"] and mine["ci95"] == theirs["ci95"]:
        return IDENTICAL
    low, high = theirs["ci95"] or (theirs["mean"],) * 2
    return WITHIN if low <= mine["mean"] <= high else OUTSIDE


def _shown(value: Mapping | None) -> str:
    if not value:
        return NOT_RUN
    ends = value["ci95"]
    return str(Number(100 * value["mean"], ends and tuple(100 * end for end in ends)))


def _reasons(yours: Mapping, committed: Mapping) -> list[str]:
    """What made the two runs different, as far as their summaries tell."""
    names = {"seeds": "seeds", "git": "code", "hardware": "hardware", "rule": "scoring rule"}
    return [word for key, word in names.items() if yours.get(key) != committed.get(key)]
