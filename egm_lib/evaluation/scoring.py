"""Prediction files -> rows with IoU and success, by any rule of the parser."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd

from egm_lib.boxes import BoxFrame, check_box, iou
from egm_lib.files import iter_jsonl, writable
from egm_lib.parsing import accepts, parse_completion

log = logging.getLogger(__name__)

SCORING_COLUMNS = (
    "sample_id",
    "dataset",
    "split",
    "task",
    "image_id",
    "expression",
    "gt_box",
    "width",
    "height",
    "frame",
    "prompt_kind",
    "num_lookalikes",
    "model",
    "seed",
    "raw_answer",
    "status",
    "finish_reason",
    "reasoning_tokens",
    "answer_tokens",
)

# What a field of a prediction file holds; a value of another kind counts as absent
KINDS = {
    **dict.fromkeys(("dataset", "split", "task", "expression", "frame", "model"), str),
    **dict.fromkeys(("raw_answer", "status", "finish_reason"), str),
    **dict.fromkeys(("sample_id", "image_id", "prompt_kind", "num_lookalikes", "seed"), str | int),
    **dict.fromkeys(("width", "height"), int | float),
    "gt_box": list,
}
TOKEN_COLUMNS = ("reasoning_tokens", "answer_tokens")
TOO_LARGE = 2.0**53  # from here on, a float is not exact to one
BATCH_ROWS = 20_000  # rows held as Python objects at a time


def load_predictions(
    paths: Path | Iterable[Path], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Prediction rows as a frame; a folder stands for every *.jsonl below it, ordered by name.

    columns: keep only these. SCORING_COLUMNS is all that `score` and the tables need, and takes a
    third of the memory.
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
    rows = chain.from_iterable(map(iter_jsonl, files))
    parts = []
    while batch := list(islice(rows, BATCH_ROWS)):
        names = columns or list(dict.fromkeys(chain.from_iterable(batch)))
        parts.append(pd.DataFrame({writable(name): _values(batch, name) for name in names}))
    return (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(columns or ()))
    )


def _values(rows: Sequence[Mapping], name: str) -> list:
    """A field of all rows; None for a value that is not of the field's kind."""
    kind = KINDS.get(name, object)
    values = (value if isinstance(value := row.get(name), kind) else None for row in rows)
    return [writable(value) if isinstance(value, str) else value for value in values]


def numeric(column: pd.Series) -> pd.Series:
    """A column as numbers; nan for what is none, or too large to have been measured."""
    plain = column.map(
        lambda value: (
            isinstance(value, str | float) or (isinstance(value, int) and abs(value) < TOO_LARGE)
        )
    )
    numbers = pd.to_numeric(column.where(plain), errors="coerce").astype(float)
    return numbers.where(numbers.abs() < TOO_LARGE)


def score(predictions: pd.DataFrame, rule: str = "egm") -> pd.DataFrame:
    """Each answer read by `rule` and compared with its ground truth (Eq. 1).

    Adds iou (0 without a box), success, num_boxes, and status as this rule sees it; a row of status
    "error" stays one. A row whose ground truth, image size or frame cannot be read says nothing
    about a model, and is left out with a warning.
    """
    needed = ("raw_answer", "gt_box", "width", "height", "status")
    absent = [name for name in ("sample_id", *needed) if name not in predictions]
    predictions = predictions.assign(**dict.fromkeys(absent))
    columns = [predictions[name].tolist() for name in needed]
    frames = predictions["frame"].tolist() if "frame" in predictions else [None] * len(predictions)
    ious, counts, statuses, unreadable = [], [], [], {}
    for index, (raw_answer, gt_box, *image_wh, status, frame) in enumerate(
        zip(*columns, frames, strict=True)
    ):
        value, count = 0.0, 0
        try:
            gt_box = check_box(gt_box, "gt_box")
            if status == "error" or not isinstance(raw_answer, str):
                status = "error"
            else:
                box_frame = BoxFrame.read(frame) if isinstance(frame, str) else BoxFrame.NORM_1000
                parsed = parse_completion(raw_answer, frame=box_frame, image_wh=image_wh, rule=rule)
                value = 0.0 if parsed.box is None else iou(parsed.box, gt_box)
                count, status = len(parsed.boxes), parsed.status
        except ValueError as error:
            unreadable[index] = str(error)
        ious.append(value)
        counts.append(count)
        statuses.append(status)
    scored = predictions.assign(
        iou=np.array(ious, dtype=float),
        success=np.array([accepts(value, rule) for value in ious], dtype=bool),
        num_boxes=counts,
        status=statuses,
    )
    for name in set(TOKEN_COLUMNS) & set(scored):
        scored[name] = numeric(scored[name])
    if unreadable:
        index, message = next(iter(unreadable.items()))
        sample = predictions["sample_id"].iloc[index]
        log.warning(
            "%d prediction rows cannot be scored and are left out; the first is of sample %s: %s",
            len(unreadable),
            sample,
            message,
        )
        scored = scored.drop(index=scored.index[list(unreadable)]).reset_index(drop=True)
    return scored


def codes(values: Iterable) -> tuple[np.ndarray, int]:
    """A whole number for each value, equal for equal values, and how many there are."""
    codes, uniques = pd.factorize(pd.Series(list(values), dtype=object), use_na_sentinel=False)
    return codes, len(uniques)


def split_keys(scored: pd.DataFrame) -> pd.Series:
    """The evaluation split of each row, as in the file names: refcoco+_testA."""
    return scored["dataset"].astype(str) + "_" + scored["split"].astype(str)


def with_strata(scored: pd.DataFrame) -> pd.DataFrame:
    """Adds size (of the object, relative to the image) and length (words of the expression)."""
    boxes_N_4 = np.array(scored["gt_box"].tolist(), dtype=float).reshape(-1, 4)
    area_N = (boxes_N_4[:, 2] - boxes_N_4[:, 0]) * (boxes_N_4[:, 3] - boxes_N_4[:, 1])
    side_N = np.sqrt(
        np.maximum(area_N, 0) / (scored["width"].to_numpy(float) * scored["height"].to_numpy(float))
    )
    words_N = scored["expression"].str.split().str.len()
    return scored.assign(
        size=pd.cut(
            side_N,
            [-1, 0.15, 0.3, 9],
            labels=["small (side < 15 %)", "medium (15-30 %)", "large (> 30 %)"],
        ),
        length=pd.cut(
            words_N,
            [-1, 3, 7, 12, 9999],
            labels=["1-3 words", "4-7 words", "8-12 words", "13+ words"],
        ),
    )
