"""One sample and what each model answered: what the viewer, the qualitative figures and the gallery
show.
"""

import math
import numbers
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from egm_lib.boxes import Box, BoxFrame, check_box, iou, is_success
from egm_lib.errors import InputError
from egm_lib.files import read_jsonl
from egm_lib.parsing import parse_completion, split_reasoning
from egm_lib.viewer.palette import LOOKS


class ScoredAnswer(NamedTuple):
    """A model's prediction row, and how good it is; error says why a row cannot be shown."""

    model: str
    row: Mapping[str, Any]
    box: Box | None  # xyxy px
    iou: float
    success: bool
    status: str
    error: str | None


class Comparison(NamedTuple):
    """A sample with the answers of each model, by name."""

    sample: Mapping[str, Any]
    answers: dict[str, ScoredAnswer]

    def iou(self, model: str) -> float:
        """nan where this model did not answer this sample."""
        answer = self.answers.get(model)
        return math.nan if answer is None else answer.iou

    def solved(self, model: str) -> bool:
        answer = self.answers.get(model)
        return answer is not None and answer.success

    def failed(self, model: str) -> bool:
        """Answered, and not with the right box; a model that was not run has not failed."""
        answer = self.answers.get(model)
        return answer is not None and not answer.success


def rows_of(predictions) -> list[Mapping]:
    """Prediction rows from a path (a folder stands for every *.jsonl below it), several paths, a
    DataFrame or rows.
    """
    if isinstance(predictions, pd.DataFrame):
        rows = predictions.to_dict("records")
        return [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }
            for row in rows
        ]
    if isinstance(predictions, str | Path):
        predictions = [predictions]
    rows: list[Mapping] = []
    for item in predictions:
        if isinstance(item, Mapping):
            rows.append(item)
            continue
        path = Path(item)
        if not path.exists():
            raise FileNotFoundError(
                f"no predictions at {path}; `python -m egm_lib.inference.predict` makes them"
            )
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            rows += read_jsonl(file)
    return rows


def compare(rows: Iterable[Mapping]) -> list[Comparison]:
    """Rows of several models joined on the sample (and the seed, where there are several), in order
    of first rows.

    Raises ValueError where a model answers one sample twice, or a row has no sample_id.
    """
    rows = list(rows)
    several_seeds = len({str(row.get("seed")) for row in rows}) > 1
    found: dict[tuple, Comparison] = {}
    for number, row in enumerate(rows, 1):
        if not row.get("sample_id") or not isinstance(row["sample_id"], str | int):
            raise InputError(f"prediction row {number} has no sample_id")
        row = readable(row)
        model = str(row.get("model") or "model")
        key = (row["sample_id"], str(row.get("seed")) if several_seeds else None)
        answers = found.setdefault(key, Comparison(row, {})).answers
        if model in answers:
            raise InputError(
                f"{model} answers {row['sample_id']!r} twice; give one run's predictions once"
            )
        answers[model] = judge(row)
    return list(found.values())


_TEXT, _NUMBER = ((str,), "text"), ((numbers.Real,), "a number")
_KINDS = {
    **dict.fromkeys(
        ("dataset", "split", "task", "expression", "raw_answer", "reasoning", "status", "error"),
        _TEXT,
    ),
    **dict.fromkeys(
        ("width", "height", "reasoning_tokens", "answer_tokens", "latency_ms"), _NUMBER
    ),
    **dict.fromkeys(
        ("prompt_kind", "num_lookalikes", "seed"), ((str, numbers.Real), "text or a number")
    ),
    "image": ((str, Path, Image.Image), "a path or an image"),
    "boxes": ((list, tuple), "a list"),
}


def readable(row: Mapping) -> Mapping:
    """The row; where fields are of a wrong kind, without them, and with an error that says
    which.
    """
    wrong = {
        name: f"{name} must be {words}, not {str(row[name])[:40]!r}"
        for name, (kinds, words) in _KINDS.items()
        if row.get(name) is not None and not isinstance(row[name], kinds)
    }
    if not wrong:
        return row
    said = f"this row cannot be read: {'; '.join(wrong.values())}"
    return {**row, **dict.fromkeys(wrong), "status": "error", "error": said}


def judge(row: Mapping) -> ScoredAnswer:
    """A prediction row with its IoU and success (Eq. 1); a broken row becomes an answer that says
    what is wrong.
    """
    model, error, box = str(row.get("model") or "model"), row.get("error"), row.get("box")
    status = row.get("status") or "ok"
    try:
        gt = check_box(row["gt_box"], "gt_box")
        if "box" not in row and isinstance(row.get("raw_answer"), str):
            frame = BoxFrame[row.get("frame") or "NORM_1000"]
            parsed = parse_completion(
                row["raw_answer"], frame=frame, image_wh=(row["width"], row["height"])
            )
            box, status = parsed.box, parsed.status
        if error or status == "error":
            return ScoredAnswer(
                model, row, None, 0.0, False, "error", error or "the row says error, and not why"
            )
        if box is None:
            return ScoredAnswer(
                model, row, None, 0.0, False, "no_box" if status == "ok" else status, None
            )
        box = check_box(box, "box")
        return ScoredAnswer(model, row, box, iou(box, gt), is_success(box, gt), status, None)
    except (ValueError, TypeError, KeyError) as problem:
        said = f"field {problem} is missing" if isinstance(problem, KeyError) else str(problem)
        return ScoredAnswer(
            model, row, None, 0.0, False, "error", f"this row cannot be read: {said}"
        )


def models_in(comparisons: Iterable[Comparison]) -> list[str]:
    """Models that answered, in the order of the story (base, SFT, EGM, ..., large), then any other
    by name.
    """
    names = {name for comparison in comparisons for name in comparison.answers}
    return [name for name in LOOKS if name in names] + sorted(names - set(LOOKS))


def reasoning_and_answer(row: Mapping) -> tuple[str | None, str]:
    """A row's text taken apart: the reasoning (None where there is none) and the answer."""
    raw = row.get("raw_answer") or ""
    reasoning, start = split_reasoning(raw)
    if row.get("status") == "unclosed_reasoning" or start is None:
        return reasoning or raw.removeprefix("<think>").strip() or None, ""
    return row.get("reasoning") or reasoning, raw[start:].strip()


def plain_box(box) -> list[float] | None:
    """A box as a list; None where it is none that can be drawn."""
    try:
        return None if box is None else list(check_box(box))
    except ValueError:
        return None
