"""Samples in, answers out: checked input, the filtered output file, what was kept and dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pandas as pd

from egm_lib.curation.filters import TeacherReply
from egm_lib.curation.ledger import Ledger
from egm_lib.curation.request_plan import MAX_LISTED, Plan, Report
from egm_lib.curation.services import CurationError
from egm_lib.curation.tasks import CurationTask
from egm_lib.files import atomic_open


class JsonlSamples:
    """The rows of a JSONL file, read anew at every iteration and never held together."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CurationError(f"no file {self.path}")

    def __iter__(self) -> Iterator[dict]:
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CurationError(f"{self.path}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise CurationError(f"{self.path}, line {number}: not an object with fields")
                yield row


@dataclass(frozen=True)
class First:
    """The first `limit` samples, as often as one likes."""

    samples: Iterable[Mapping]
    limit: int | None

    def __iter__(self) -> Iterator[Mapping]:
        return islice(self.samples, self.limit)


def count_checked(task: CurationTask, samples: Iterable[Mapping]) -> int:
    """Number of samples; raises CurationError for the first that the task cannot use, before
    anything is paid.
    """
    number = 0
    for number, sample in enumerate(samples, 1):
        where = f"sample {number} ({sample.get('sample_id')!r})"
        for name in task.needs:
            value = sample.get(name)
            # A prediction without a box has null
            if value is None and not (name == "box" and "box" in sample):
                hint = (
                    "; give prediction rows, whose `box` is the prediction" if name == "box" else ""
                )
                raise CurationError(f"{where} has no {name!r}, which {task.name} needs{hint}")
            if name.endswith("box"):
                if value is not None and not _is_box(value):
                    raise CurationError(
                        f"{where}: {name} = {value!r} is no box (x1 < x2, y1 < y2, finite, in "
                        "pixels)"
                    )
            elif not isinstance(value, kind := int if name in ("width", "height") else str):
                raise CurationError(f"{where}: {name} = {value!r} is no {kind.__name__}")
    return number


def _is_box(value: object) -> bool:
    try:
        x1, y1, x2, y2 = value
        return x1 < x2 and y1 < y2 and all(map(math.isfinite, (x1, y1, x2, y2)))
    except (TypeError, ValueError):
        return False


def write_output(
    plan: Plan, ledger: Ledger, out: Path, skip_filters: frozenset[str], report: Report
) -> None:
    """The output file from the ledger, whole or not at all; counts into the report."""
    with atomic_open(Path(out)) as file:
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
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


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
    }
    row |= {
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
        return failure and row | {"error": failure["error"]}
    answer = plan.task.read(record["text"])
    reply = TeacherReply(record["text"], record["finish_reason"], record["refusal"], answer)
    dropped = dropped_by(plan.task, reply, sample, skip_filters)
    row |= {"answer": answer, "usage": record["usage"], "raw": record["text"]}
    return row | {"status": "filtered" if dropped else "ok", "filter": dropped}


def dropped_by(
    task: CurationTask, reply: TeacherReply, sample: Mapping, skip_filters: Iterable[str] = ()
) -> str | None:
    """Name of the first filter that drops a reply, None where it is kept."""
    return next(
        (name for name, drops in task.filters if name not in skip_filters and drops(reply, sample)),
        None,
    )


def kept(samples: Iterable[Mapping], out: Path, name: str) -> Iterator[dict]:
    """Samples whose answer was kept, the answer as field `name` ("reasoning", "expression"): the
    next stage's input.

    samples: those that `out` was made from, in the same order.
    """
    rows = iter(JsonlSamples(out))
    row = next(rows, None)
    for sample in samples:
        if row is None or row["sample_id"] != sample["sample_id"]:
            continue  # not asked yet
        if row["status"] == "ok":
            yield {**sample, name: row["answer"]}
        row = next(rows, None)
    if row is not None:
        raise CurationError(
            f"{out} was made from other samples: {row['sample_id']!r} is not among these in its "
            "place"
        )


def kept_and_dropped(*outs: Path) -> pd.DataFrame:
    """A row a reason ("kept", a filter's name, "failed"), a column a task and model: number of
    samples.
    """
    counts = {}
    for out in outs:
        for row in JsonlSamples(out):
            reason = "kept" if row["status"] == "ok" else row["filter"] or row["status"]
            column = counts.setdefault(f"{row['task']} ({row['model']})", {"kept": 0})
            column[reason] = column.get(reason, 0) + 1
    return pd.DataFrame(counts).fillna(0).astype(int)


def examples(out: Path, count: int = 2) -> pd.DataFrame:
    """The first `count` raw answers of every reason: columns reason, sample_id, raw."""
    found: dict[str, list[dict]] = {}
    for row in JsonlSamples(out):
        reason = "kept" if row["status"] == "ok" else row["filter"] or row["status"]
        shown = found.setdefault(reason, [])
        if len(shown) < count:
            shown.append(
                {"reason": reason, "sample_id": row["sample_id"], "raw": row["raw"] or row["error"]}
            )
    return pd.DataFrame(
        [row for rows in found.values() for row in rows], columns=["reason", "sample_id", "raw"]
    )


def filter_quality(out: Path, planted: Mapping[str, str | None]) -> pd.DataFrame:
    """Precision and recall of an output's filters against errors known to be planted.

    planted: sample_id -> name of the filter that should drop it, None for a sound answer. A row an
    error, and "any".
    precision: dropped by that filter and planted so, over all dropped by it; recall: over all
    planted so. None for 0/0.
    """
    pairs = [
        (planted[row["sample_id"]], row["filter"])
        for row in JsonlSamples(out)
        if row["status"] != "failed"
    ]
    names = sorted({name for pair in pairs for name in pair if name})
    rows = {name: _quality([(was == name, got == name) for was, got in pairs]) for name in names}
    rows["any"] = _quality([(was is not None, got is not None) for was, got in pairs])
    return pd.DataFrame.from_dict(
        rows, orient="index", columns=["planted", "dropped", "both", "precision", "recall"]
    )


def _quality(pairs: list[tuple[bool, bool]]) -> list:
    planted, dropped, both = (
        sum(values) for values in zip(*((w, g, w and g) for w, g in pairs), strict=True)
    )
    return [
        planted,
        dropped,
        both,
        both / dropped if dropped else None,
        both / planted if planted else None,
    ]
