"""Some of the last GRPO groups of a run, stored for people to read.

`TraceViewer(groups=read_groups(path))` shows them.

A line of the JSONL file is one prompt: the fields of its sample, the step, and the completions of
its group with their rewards and advantages (Eq. 7 and 8). `group_keeper` writes the file; to read
it, no library of models is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from egm_lib.files import read_jsonl

log = logging.getLogger(__name__)

SAMPLE_FIELDS = (
    "sample_id",
    "image",
    "width",
    "height",
    "expression",
    "task",
    "gt_box",
    "modal_box",
)


def read_groups(path: Path) -> list[dict]:
    """The groups of a file, the earliest first; none where there is no file.

    A row that is no group is left out with a warning.
    """
    rows = read_jsonl(path) if path.is_file() else []
    groups = [row for row in rows if _is_group(row)]
    if len(groups) < len(rows):
        log.warning("%s: %d rows are not groups and are left out", path, len(rows) - len(groups))
    return groups


def _is_group(row: Mapping) -> bool:
    """Whether a row has completions (null: without text), each with a reward and an advantage."""
    kinds = {"completions": str | None, "rewards": int | float, "advantages": int | float}
    lists = [row.get(name) for name in kinds]
    return (
        isinstance(row.get("step"), int)
        and all(isinstance(values, list) for values in lists)
        and len({len(values) for values in lists}) == 1
        and all(
            isinstance(value, kind)
            for values, kind in zip(lists, kinds.values(), strict=True)
            for value in values
        )
    )
