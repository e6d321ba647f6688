"""One sample and what each model answered: what the viewer, the qualitative figures and the gallery
show.
"""

import base64
import io
import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from PIL import Image

from egm_lib.boxes import Box, BoxFrame, check_box, iou, is_success
from egm_lib.data import open_image, resolve_image
from egm_lib.evaluation import read_rows
from egm_lib.palette import LOOKS, look
from egm_lib.parsing import parse_completion, split_reasoning
from egm_lib.reward import grounding_reward


class Answer(NamedTuple):
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
    answers: dict[str, Answer]

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
                f"no predictions at {path}; `python -m egm_lib.generate` makes them"
            )
        for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
            rows += read_rows(file)
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
            raise ValueError(f"prediction row {number} has no sample_id")
        row = readable(row)
        model = str(row.get("model") or "model")
        key = (row["sample_id"], str(row.get("seed")) if several_seeds else None)
        answers = found.setdefault(key, Comparison(row, {})).answers
        if model in answers:
            raise ValueError(
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
    "image": ((str, Path, Image.Image), "a path or a picture"),
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


def judge(row: Mapping) -> Answer:
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
            return Answer(
                model, row, None, 0.0, False, "error", error or "the row says error, and not why"
            )
        if box is None:
            return Answer(
                model, row, None, 0.0, False, "no_box" if status == "ok" else status, None
            )
        box = check_box(box, "box")
        return Answer(model, row, box, iou(box, gt), is_success(box, gt), status, None)
    except (ValueError, TypeError, KeyError) as problem:
        said = f"field {problem} is missing" if isinstance(problem, KeyError) else str(problem)
        return Answer(model, row, None, 0.0, False, "error", f"this row cannot be read: {said}")


def models_in(comparisons: Iterable[Comparison]) -> list[str]:
    """Models that answered, in the order of the story (base, SFT, EGM, ..., large), then any other
    by name.
    """
    names = {name for comparison in comparisons for name in comparison.answers}
    return [name for name in LOOKS if name in names] + sorted(names - set(LOOKS))


def picture_of(sample: Mapping, root: str | Path) -> Image.Image:
    """The sample's picture as RGB; its `image` may be a PIL picture, a path, or a path relative to
    root.
    """
    image = sample.get("image")
    if not image:
        raise ValueError("the row names no image")
    return (
        image.convert("RGB")
        if isinstance(image, Image.Image)
        else open_image(resolve_image(sample, root))
    )


def data_url(picture: Image.Image, max_side_px: int = 900) -> str:
    """A picture for a page: downscaled, JPEG where it is large and PNG where it is small (drawings
    stay crisp).
    """
    scale = min(1.0, max_side_px / max(picture.size))
    if scale < 1:
        picture = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        )
    kind = "png" if picture.width * picture.height <= 256 * 256 else "jpeg"
    file = io.BytesIO()
    picture.save(file, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


_PART = r"(?:\ (?:side|edge|corner|half))?(?:\ of)?"
_PLACES = rf"""
    (?:to|on|at|in|from)\ the\ (?:far\ |very\ )?(?:left|right|top|bottom|back|front|cent(?:er|re)|middle){_PART}
    | (?:far\ |upper\ |lower\ |top\ |bottom\ )?(?:left|right)(?:most)?{_PART}
    | (?:upper|lower|top|bottom|topmost|bottommost|uppermost|lowermost){_PART}
    | in\ front\ of | behind | above | below | beneath | under | underneath | between | beside | next\ to
    | near(?:est|by|er)?(?:\ to)? | close(?:st|r)?\ to | far(?:thest|ther|\ from)? | furthest | cent(?:er|re|ral)?
    | middle | corner | edge | foreground | background | upwards? | downwards? | leftwards? | rightwards?
    | at\ \d+\ \d+
"""
_ALIKE = r"""
    first | second | third | fourth | fifth | sixth | last | only | others? | another | similar | alike | identical
    | both | all | each | two | three | four | five | six | seven | several | multiple | among | candidates?
    | rather\ than | instead(?:\ of)? | unlike | except | not | \d+\ (?:of|are|is)\b
"""
_TINTS = re.compile(
    rf"\b(?:(?P<place>{_PLACES})|(?P<alike>{_ALIKE}))\b", re.IGNORECASE | re.VERBOSE
)


@lru_cache(maxsize=4096)
def tint(text: str) -> list[tuple[str, str]]:
    """The text cut into (piece, kind); the pieces joined are the text.

    kind: "place" for phrases that name places, "alike" for counts and look-alikes, else "".
    """
    pieces, end = [], 0
    for match in _TINTS.finditer(text):
        if match.start() > end:
            pieces.append((text[end : match.start()], ""))
        pieces.append((match[0], match.lastgroup or ""))
        end = match.end()
    if end < len(text):
        pieces.append((text[end:], ""))
    return pieces


def reasoning_and_answer(row: Mapping) -> tuple[str | None, str]:
    """A row's text taken apart: the reasoning (None where there is none) and the answer."""
    raw = row.get("raw_answer") or ""
    reasoning, start = split_reasoning(raw)
    if row.get("status") == "unclosed_reasoning" or start is None:
        return reasoning or raw.removeprefix("<think>").strip() or None, ""
    return row.get("reasoning") or reasoning, raw[start:].strip()


_FACTS = (
    "sample_id",
    "dataset",
    "split",
    "task",
    "expression",
    "prompt_kind",
    "num_lookalikes",
    "seed",
)


def view_of(
    comparison: Comparison,
    models: Sequence[str],
    *,
    root: str | Path,
    group: Mapping | None = None,
    causes: Mapping[str, str] | None = None,
    max_side_px: int = 900,
) -> dict:
    """What the page draws for one sample: JSON values only. A picture or group that cannot be read:
    see `error`.
    """
    sample = comparison.sample
    view = {name: sample.get(name) for name in _FACTS}
    view |= {
        "width": sample.get("width"),
        "height": sample.get("height"),
        "picture": None,
        "error": None,
        "gt_box": plain_box(sample.get("gt_box")),
        "modal_box": plain_box(sample.get("modal_box")),
        "causes": dict(causes or {}),
    }
    try:
        picture = picture_of(sample, root)
        view["picture"] = data_url(picture, max_side_px)
        view["width"], view["height"] = (
            view["width"] or picture.width,
            view["height"] or picture.height,
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        view["error"] = f"the picture cannot be shown: {problem}"
    view["models"] = [
        _answer_view(comparison.answers.get(model), model, place)
        for place, model in enumerate(models)
    ]
    view["group"] = None
    if group is not None:
        try:
            view["group"] = _group_view(group, view)
        except (ValueError, KeyError, TypeError) as problem:
            said = f"field {problem} is missing" if isinstance(problem, KeyError) else problem
            view["error"] = f"the group cannot be shown: {said}"
    return view


def _answer_view(answer: Answer | None, model: str, place: int) -> dict:
    style = look(model, place)
    view = {"model": model, "label": style.label, "colour": style.colour, "dash": list(style.dash)}
    view["run"] = answer is not None
    if answer is None:
        return view
    row = answer.row
    reasoning, text = reasoning_and_answer(row)
    gt = plain_box(row.get("gt_box"))
    return view | {
        "box": answer.box and list(answer.box),
        "num_boxes": len(row.get("boxes") or ()),
        "iou": answer.iou,
        "success": answer.success,
        "status": answer.status,
        "error": answer.error,
        "reward": None if gt is None or answer.error else grounding_reward(answer.box, gt),
        "reasoning": tint(reasoning) if reasoning else [],
        "answer": text,
        "tokens": _sum(row.get("reasoning_tokens"), row.get("answer_tokens")),
        "latency_ms": row.get("latency_ms"),
        "truncated": row.get("finish_reason") == "length",
    }


def _group_view(group: Mapping, view: Mapping) -> dict:
    """The completions of one prompt: box, reward and advantage of each (Eq. 7 and 8 where the group
    does not say).
    """
    completions = list(group["completions"])
    frame = BoxFrame[group.get("frame") or "NORM_1000"]
    image_wh, gt = (view["width"], view["height"]), view["gt_box"]
    parsed = [parse_completion(text, frame=frame, image_wh=image_wh) for text in completions]
    rewards = group.get("rewards") or [grounding_reward(each.box, gt) for each in parsed]
    advantages = group.get("advantages") or _advantages(rewards)
    return {
        "step": group.get("step"),
        "completions": [
            {
                "box": each.box and list(each.box),
                "iou": 0.0 if each.box is None else iou(each.box, gt),
                "success": is_success(each.box, gt),
                "status": each.status,
                "reward": float(reward),
                "advantage": float(advantage),
                "reasoning": tint(each.reasoning or ""),
                "answer": text,
            }
            for text, each, reward, advantage in zip(
                completions, parsed, rewards, advantages, strict=True
            )
        ],
    }


def _advantages(rewards: Sequence[float]) -> list[float]:
    import torch  # only here: a viewer of predictions opens without it

    from egm_lib.loss import group_advantages

    return group_advantages(torch.tensor(rewards, dtype=torch.float32), len(rewards)).tolist()


def plain_box(box) -> list[float] | None:
    """A box as a list; None where it is none that can be drawn."""
    try:
        return None if box is None else list(check_box(box))
    except ValueError:
        return None


def _sum(*values) -> int | None:
    known = [value for value in values if value is not None]
    return int(sum(known)) if known else None
