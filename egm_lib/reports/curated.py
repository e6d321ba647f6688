"""What reports show of a run's curated data: how much was kept, and a few traces.

A live run has the data itself, `curation/*.jsonl` and `traces/*.jsonl`. It is too large for an
archive, which holds `curated.json` (`summary`) instead. All functions here give the same answers
for both. If a file of the live run exists, it is used.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_origin, get_type_hints

from egm_lib.errors import InputError
from egm_lib.evaluation.statistics import sample_fixed
from egm_lib.files import iter_jsonl, read_json
from egm_lib.viewer.comparison import plain_box

SUMMARY = "curated.json"
RESTORE = "restore the run again from its archive"
EXAMPLES = 2  # traces of each task that Fig. 3 shows


@dataclass(frozen=True)
class Outcomes:
    """What became of the samples of a curation stage. dropped: by the filter's name."""

    kept: int
    failed: int
    dropped: dict[str, int]

    @property
    def answered(self) -> int:
        return self.kept + sum(self.dropped.values())


@dataclass(frozen=True)
class TraceCounts:
    """Size of the SFT data of a task. words: of all its traces."""

    samples: int
    images: int
    words: int


def outcomes(root: Path, stage: str) -> Outcomes | None:
    """Outcomes of a stage, such as "trace" or "verify-train"; None if it was not run."""
    path = root / "curation" / f"{stage}.jsonl"
    if not path.is_file():
        stored = _stored(root, "outcomes")
        return _as(Outcomes, stored[stage], root) if stage in stored else None
    counts, dropped = Counter(), Counter()
    for row in iter_jsonl(path):
        status = str(row.get("status"))
        counts[status] += 1
        if status == "filtered":
            dropped[str(row.get("filter") or "unnamed filter")] += 1
    return Outcomes(counts["ok"], counts["failed"], dict(dropped))


def trace_counts(root: Path, task: str) -> TraceCounts | None:
    """Counts of the samples with traces of a task; None if there are none."""
    path = root / "traces" / f"{task}.jsonl"
    if not path.is_file():
        stored = _stored(root, "traces")
        return _as(TraceCounts, stored[task], root) if task in stored else None
    samples, words, images = 0, 0, set()
    for row in iter_jsonl(path):
        samples, words = samples + 1, words + len(str(row.get("reasoning") or "").split())
        images.add(str(row.get("image_id")))
    return TraceCounts(samples, len(images), words) if samples else None


def example_traces(root: Path, task: str) -> list[dict]:
    """EXAMPLES complete samples with traces of a task, drawn at random but always the same."""
    path = root / "traces" / f"{task}.jsonl"
    if not path.is_file():
        rows = _stored(root, "examples").get(task, [])
        if not isinstance(rows, list):
            raise InputError(f"{root / SUMMARY}: {rows!r} are no examples; {RESTORE}")
        return [row for row in rows if _is_example(row)]
    return sample_fixed([row for row in iter_jsonl(path) if _is_example(row)], EXAMPLES)


def summary(root: Path) -> dict:
    """All of the above as one JSON object; empty if nothing was curated."""
    stages = {
        path.stem for path in (root / "curation").glob("*.jsonl") if ".ledger" not in path.name
    }
    stages |= _stored(root, "outcomes").keys()
    tasks = {path.stem for path in (root / "traces").glob("*.jsonl")}
    tasks |= _stored(root, "traces").keys() | _stored(root, "examples").keys()
    counted = {
        "outcomes": {stage: asdict(outcomes(root, stage)) for stage in sorted(stages)},
        "traces": {
            task: asdict(counts) for task in sorted(tasks) if (counts := trace_counts(root, task))
        },
        "examples": {task: example_traces(root, task) for task in sorted(tasks)},
    }
    return counted if stages or tasks else {}


def _stored(root: Path, part: str) -> dict:
    """A part of the summary that a restored run has; empty for a live run."""
    parts = dict.fromkeys(("outcomes", "traces", "examples"), dict)
    stored = read_json(root / SUMMARY, RESTORE, shape=dict, fields=parts)
    return {} if stored is None else stored[part]


def _as(kind: type, stored: object, root: Path) -> Outcomes | TraceCounts:
    """Raises InputError where the values do not fit the fields."""
    hints = get_type_hints(kind)
    if (
        not isinstance(stored, dict)
        or stored.keys() != hints.keys()
        or not all(
            isinstance(stored[name], get_origin(hint) or hint) for name, hint in hints.items()
        )
        or not all(isinstance(count, int) for count in stored.get("dropped", {}).values())
    ):
        raise InputError(
            f"{root / SUMMARY}: {stored!r} does not describe {kind.__name__}; {RESTORE}"
        )
    return kind(**stored)


def _is_example(row: object) -> bool:
    """Whether a row has all that is drawn of a sample with its trace."""
    return (
        isinstance(row, dict)
        and all(
            row.get(name) and isinstance(row[name], str)
            for name in ("reasoning", "image", "expression")
        )
        and plain_box(row.get("gt_box")) is not None
    )
