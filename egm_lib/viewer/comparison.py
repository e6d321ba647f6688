"""One sample and what each model answered: what the viewer, the figures and the gallery show."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from egm_lib.boxes import Box, BoxFrame, check_box, iou, is_success
from egm_lib.errors import InputError
from egm_lib.files import read_jsonl, writable_row
from egm_lib.parsing import parse_completion, split_reasoning
from egm_lib.viewer.palette import LOOKS

FAULTS = {
    "no_box": "no box",
    "unclosed_reasoning": "cut off while reasoning",
    "malformed": "malformed box",
    "waiting": "waiting",
    "writing": "still writing",
    "stopped": "stopped",
}


class ScoredAnswer(NamedTuple):
    """A model's prediction row, and how good it is; error says why a row cannot be shown.

    Where the ground truth is not known, iou is nan and success None.
    """

    model: str
    row: Mapping[str, Any]
    box: Box | None  # xyxy px
    iou: float
    success: bool | None
    status: str
    error: str | None

    @property
    def verdict(self) -> str:
        """One line: hit or miss with the IoU, or what is wrong with the answer."""
        if self.error:
            return f"error: {self.error}"
        if self.box is None:
            return FAULTS.get(self.status, self.status)
        x1, y1, x2, y2 = self.box
        if x1 == x2 or y1 == y2:
            return "miss, the box is empty (no area)"
        if self.success is None:
            return f"box from {x1:.0f}, {y1:.0f} to {x2:.0f}, {y2:.0f} px"
        return f"{'hit' if self.success else 'miss'}, IoU {self.iou:.2f}"


class Comparison(NamedTuple):
    """A sample with the answers of each model, by name."""

    sample: Mapping[str, Any]
    answers: dict[str, ScoredAnswer]

    def iou(self, model: str) -> float:
        """The IoU of a model's answer; nan where the model did not answer this sample."""
        answer = self.answers.get(model)
        return math.nan if answer is None else answer.iou

    def solved(self, model: str) -> bool:
        """Whether the model answered with the right box."""
        answer = self.answers.get(model)
        return answer is not None and answer.success

    def failed(self, model: str) -> bool:
        """Answered, but not with the right box. A model that was not run has not failed."""
        answer = self.answers.get(model)
        return answer is not None and not answer.success


# How the answers of model a and model b to one sample can differ.
OUTCOMES: dict[str, Callable[[Comparison, str, str], bool]] = {
    "b solves what a misses": lambda sample, a, b: sample.failed(a) and sample.solved(b),
    "b misses what a solves": lambda sample, a, b: sample.solved(a) and sample.failed(b),
    "both miss": lambda sample, a, b: sample.failed(a) and sample.failed(b),
    "both solve": lambda sample, a, b: sample.solved(a) and sample.solved(b),
}


def rows_of(predictions) -> list[Mapping]:
    """Prediction rows from a DataFrame, from rows, or from one or several paths.

    A folder stands for every *.jsonl below it.
    """
    if isinstance(predictions, pd.DataFrame):
        return [
            {
                key: None if isinstance(value, float) and math.isnan(value) else value
                for key, value in row.items()
            }
            for row in predictions.to_dict("records")
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
    """Rows of several models joined on the sample, in the order in which samples first appear.

    Where there are several seeds, each has its own comparison. A row without a sample_id gets an
    entry of its own that says so. Raises ValueError where a model answers one sample twice.
    """
    rows = list(rows)
    several_seeds = len({str(row.get("seed")) for row in rows}) > 1
    found: dict[tuple, Comparison] = {}
    for number, row in enumerate(rows, 1):
        row = readable(identified(writable_row(row), number))
        model = str(row.get("model") or "model")
        key = (row["sample_id"], str(row.get("seed")) if several_seeds else None)
        answers = found.setdefault(key, Comparison(row, {})).answers
        if model in answers:
            raise InputError(
                f"{model} answers {row['sample_id']!r} twice; give one run's predictions once"
            )
        answers[model] = judge(row)
    return list(found.values())


def identified(row: Mapping, number: int) -> Mapping:
    """The row; where it has no usable sample_id, with one made of its number and an error."""
    sample_id = row.get("sample_id")
    if isinstance(sample_id, str | int) and sample_id != "":
        return row
    message = f"row {number} has no sample_id that is text or a whole number"
    return {**row, "sample_id": f"(row {number})", "status": "error", "error": message}


_TEXT, _NUMBER = ((str,), "text"), ((numbers.Real,), "a number")
_KINDS = {
    **dict.fromkeys(
        ("dataset", "split", "task", "expression", "raw_answer", "reasoning", "status", "error"),
        _TEXT,
    ),
    **dict.fromkeys(("note", "finish_reason"), _TEXT),
    **dict.fromkeys(("width", "height", "reasoning_tokens", "answer_tokens"), _NUMBER),
    **dict.fromkeys(("latency_ms", "first_token_ms"), _NUMBER),
    **dict.fromkeys(
        ("prompt_kind", "num_lookalikes", "seed"), ((str, numbers.Real), "text or a number")
    ),
    "image": ((str, Path, Image.Image), "a path or an image"),
    "boxes": ((list, tuple), "a list"),
}


def readable(row: Mapping) -> Mapping:
    """The row; fields of a wrong kind are removed from it and named in its error."""
    wrong = {
        name: f"{name} must be {words}, not {str(row[name])[:40]!r}"
        for name, (kinds, words) in _KINDS.items()
        if row.get(name) is not None
        and (
            not isinstance(row[name], kinds)
            or (isinstance(row[name], float) and not math.isfinite(row[name]))
        )
    }
    if not wrong:
        return row
    message = f"this row cannot be read: {'; '.join(wrong.values())}"
    return {**row, **dict.fromkeys(wrong), "status": "error", "error": message}


def frame_of(row: Mapping) -> BoxFrame:
    """The frame of a row's numbers; NORM_1000 where the row does not say."""
    return BoxFrame.read(row.get("frame") or BoxFrame.NORM_1000)


def judge(row: Mapping) -> ScoredAnswer:
    """A prediction row with its IoU and success (Eq. 1); a broken row gets an error instead."""
    model, error, box = str(row.get("model") or "model"), row.get("error"), row.get("box")
    status = row.get("status") or "ok"

    def without_box(status: str, error: str | None = None) -> ScoredAnswer:
        return ScoredAnswer(model, row, None, 0.0, False, status, error)

    try:
        gt = check_box(row["gt_box"], "gt_box")
        if "box" not in row and isinstance(row.get("raw_answer"), str):
            image_wh = (row["width"], row["height"])
            parsed = parse_completion(row["raw_answer"], frame=frame_of(row), image_wh=image_wh)
            box, status = parsed.box, parsed.status
        if error or status == "error":
            return without_box("error", error or "the row has status error and gives no reason")
        if box is None:
            return without_box("no_box" if status == "ok" else status)
        box = check_box(box, "box")
        return ScoredAnswer(model, row, box, iou(box, gt), is_success(box, gt), status, None)
    except (ValueError, TypeError, KeyError) as problem:
        return without_box("error", f"this row cannot be read: {reason(problem)}")


def reason(problem: Exception) -> str:
    """What an exception says; a KeyError names the field that is missing."""
    return f"field {problem} is missing" if isinstance(problem, KeyError) else str(problem)


def models_in(comparisons: Iterable[Comparison]) -> list[str]:
    """Models that answered: those of a run first (base, SFT, EGM, ..., large), others by name."""
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
    """A box as a list; None where it cannot be drawn."""
    try:
        return None if box is None else list(check_box(box))
    except ValueError:
        return None
