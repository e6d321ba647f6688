"""Samples in, answers out: checked input, the filtered output file, what was kept and dropped."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd

from egm_lib.curation.filters import TeacherReply
from egm_lib.curation.ledger import Ledger
from egm_lib.curation.options import CurationError
from egm_lib.curation.request_plan import MAX_LISTED, Plan, Report
from egm_lib.curation.tasks import CurationTask, after_thinking
from egm_lib.files import iter_jsonl, write_jsonl

STATUSES = ("ok", "filtered", "failed")

log = logging.getLogger(__name__)


class JsonlSamples:
    """The rows of a JSON-lines file, read anew at every iteration and never all in memory.

    A line that is no JSON object is left out with a warning. Raises CurationError if there is no
    file, or a file without a single such line.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CurationError(f"no file {self.path}")

    def __iter__(self) -> Iterator[dict]:
        row = None
        for row in iter_jsonl(self.path):
            yield row
        if row is None and self.path.stat().st_size:
            raise CurationError(f"{self.path} holds no JSON lines: one object per line is needed")


@dataclass(frozen=True)
class First:
    """The first `limit` samples, at every iteration anew."""

    samples: Iterable[Mapping]
    limit: int | None

    def __iter__(self) -> Iterator[Mapping]:
        return islice(self.samples, self.limit)


def count_checked(task: CurationTask, samples: Iterable[Mapping]) -> int:
    """Number of samples.

    Raises CurationError for the first that the task cannot use, before anything is paid.
    """
    number = 0
    for number, sample in enumerate(samples, 1):
        where = f"sample {number} ({sample.get('sample_id')!r})"
        for name in task.needs:
            if fault := _fault(task, sample, name):
                raise CurationError(f"{where}{fault}")
    return number


def _fault(task: CurationTask, sample: Mapping, name: str) -> str | None:
    """What is wrong with a field of a sample, as the end of a sentence; None for nothing."""
    value = sample.get(name)
    if name == "box" and name in sample:  # a prediction, which may hold no box or an empty one
        if value is None or _is_quad(value):
            return None
        return f": box = {value!r} is not a box of a prediction (null, or four finite pixels)"
    if value is None:
        hint = "; give prediction rows, whose `box` is the prediction" if name == "box" else ""
        return f" has no {name!r}, which {task.name} needs{hint}"
    if name.endswith("box"):
        if _is_quad(value) and value[0] < value[2] and value[1] < value[3]:
            return None
        return f": {name} = {value!r} is not a box (x1 < x2, y1 < y2, finite, in pixels)"
    if name in ("width", "height") and isinstance(value, int) and value < 1:
        return f": {name} = {value!r} is not a size in pixels"
    kind = int if name in ("width", "height") else str
    return (
        None if isinstance(value, kind) else f": {name} = {value!r} is not of type {kind.__name__}"
    )


def _is_quad(value: object) -> bool:
    try:
        return len(value) == 4 and all(map(math.isfinite, value))
    except (TypeError, OverflowError):
        return False


def write_output(
    plan: Plan, ledger: Ledger, out: Path, skip_filters: frozenset[str], report: Report
) -> None:
    """The output file from the ledger, whole or not at all; counts into the report."""
    write_jsonl(out, _counted_rows(plan, ledger, skip_filters, report))


def _counted_rows(
    plan: Plan, ledger: Ledger, skip_filters: frozenset[str], report: Report
) -> Iterator[dict]:
    for sample in plan.samples:
        row = _output_row(plan, ledger, sample, skip_filters)
        if row is None:
            report.waiting += 1
            continue
        if row["status"] == "ok":
            report.kept += 1
        elif row["status"] == "filtered":
            report.dropped[row["filter"]] += 1
        else:
            report.failed += 1
            if len(report.failures) < MAX_LISTED:
                report.failures.append((row["sample_id"], row["error"]))
        yield row


def _output_row(
    plan: Plan, ledger: Ledger, sample: Mapping, skip_filters: frozenset[str]
) -> dict | None:
    """None for a sample that was not asked about yet."""
    row = {
        "sample_id": sample["sample_id"],
        "answer": None,
        "status": "failed",
        "filter": None,
        "error": None,
        "usage": None,
        "raw": None,
        "task": plan.task.name,
        "model": plan.teacher.model,
        "key": None,
    }
    try:
        row["key"] = key = plan.request(sample).key
    except (OSError, ValueError) as error:
        return row | {"error": str(error)}
    if (record := ledger.answer(key)) is None:
        failure = ledger.failure(key)
        return failure and row | {"error": failure.get("error")}
    raw = record.get("text", "")
    answer = plan.task.read(raw)
    reply = TeacherReply(
        after_thinking(raw), record.get("finish_reason"), record.get("refusal"), answer
    )
    dropped = dropped_by(plan.task, reply, sample, skip_filters)
    row |= {"answer": answer, "usage": record["usage"], "raw": raw}
    return row | {"status": "filtered" if dropped else "ok", "filter": dropped}


def read_output(out: Path) -> Iterator[dict]:
    """Rows of an output file; one without the fields of a row is left out with a warning."""
    for row in JsonlSamples(out):
        if isinstance(row.get("sample_id"), str) and row.get("status") in STATUSES:
            yield row
        else:
            log.warning("%s: a row without sample_id or status is left out", out)


def dropped_by(
    task: CurationTask, reply: TeacherReply, sample: Mapping, skip_filters: Iterable[str] = ()
) -> str | None:
    """Name of the first filter that drops a reply, None if it is kept."""
    return next(
        (name for name, drops in task.filters if name not in skip_filters and drops(reply, sample)),
        None,
    )


def kept(samples: Iterable[Mapping], out: Path, name: str) -> Iterator[dict]:
    """Samples whose answer was kept, with the answer as field `name`: the next stage's input.

    name: such as "reasoning" or "expression". samples: those that `out` was made from, in the same
    order. Raises CurationError for other samples.
    """
    rows = read_output(out)
    row = next(rows, None)
    for sample in samples:
        if row is None or row["sample_id"] != sample["sample_id"]:
            continue  # not asked yet
        if row["status"] == "ok":
            yield {**sample, name: row["answer"]}
        row = next(rows, None)
    if row is not None:
        raise CurationError(
            f"{out} was made from other samples: {row['sample_id']!r} is not among these, or in "
            "another order"
        )


def kept_and_dropped(*outs: Path) -> pd.DataFrame:
    """Numbers of samples: one row per reason, one column per task and model.

    A reason is "kept", the name of a filter, or "failed".
    """
    counts: dict[str, dict[str, int]] = {}
    for out in outs:
        for row in read_output(out):
            reason = _reason(row)
            column = counts.setdefault(f"{row.get('task')} ({row.get('model')})", {"kept": 0})
            column[reason] = column.get(reason, 0) + 1
    return pd.DataFrame(counts).fillna(0).astype(int)


def examples(out: Path, count: int = 2) -> pd.DataFrame:
    """The first `count` raw answers of every reason: columns reason, sample_id, raw."""
    found: dict[str, list[dict]] = {}
    for row in read_output(out):
        reason = _reason(row)
        shown = found.setdefault(reason, [])
        if len(shown) < count:
            shown.append(
                {
                    "reason": reason,
                    "sample_id": row["sample_id"],
                    "raw": row.get("raw") or row.get("error"),
                }
            )
    return pd.DataFrame(
        [row for rows in found.values() for row in rows], columns=["reason", "sample_id", "raw"]
    )


def _reason(row: Mapping) -> str:
    return "kept" if row["status"] == "ok" else row.get("filter") or row["status"]


def filter_quality(out: Path, planted: Mapping[str, str | None]) -> pd.DataFrame:
    """Precision and recall of an output's filters against errors known to be planted.

    planted: sample_id -> name of the filter that should drop it, None for a sound answer.
    Returns one row per kind of error, and one for "any". precision: share of what the filter
    dropped that was planted for it. recall: share of what was planted for it that it dropped. None
    for 0/0.
    """
    pairs = [
        (planted[row["sample_id"]], row.get("filter"))
        for row in read_output(out)
        if row["status"] != "failed"
    ]
    names = sorted({name for pair in pairs for name in pair if name})
    rows = {name: _quality([(was == name, got == name) for was, got in pairs]) for name in names}
    rows["any"] = _quality([(was is not None, got is not None) for was, got in pairs])
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["planted", "dropped", "both", "precision", "recall"]
    )


def _quality(pairs: list[tuple[bool, bool]]) -> list:
    planted, dropped = sum(was for was, _ in pairs), sum(got for _, got in pairs)
    both = sum(was and got for was, got in pairs)
    return [
        planted,
        dropped,
        both,
        both / dropped if dropped else None,
        both / planted if planted else None,
    ]
