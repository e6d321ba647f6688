"""A sample and its answers as plain values for a page."""

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from egm_lib.boxes import Box, iou, is_success
from egm_lib.data import open_image, resolve_image
from egm_lib.files import writable
from egm_lib.parsing import parse_completion
from egm_lib.reward import grounding_reward
from egm_lib.viewer.comparison import (
    Comparison,
    ScoredAnswer,
    frame_of,
    plain_box,
    reason,
    reasoning_and_answer,
)
from egm_lib.viewer.palette import style_of
from egm_lib.viewer.steps import Step, places

SMALL_IMAGE_PX = 256  # up to this side an image is a drawing: its pixels stay crisp when enlarged
CRISP_SIDE_PX = 768  # a small image is enlarged to about this side before it is drawn


def page_script(name: str) -> str:
    """The script of a page ("viewer" or "playground"), with what both draw before it."""
    here = Path(__file__).parent
    files = (here / "drawing.js", here / f"{name}.js")
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def image_of(sample: Mapping, root: str | Path) -> Image.Image:
    """The sample's image as RGB; `image` is a PIL image, a path, or a path relative to root."""
    image = sample.get("image")
    if not image:
        raise ValueError("the row names no image")
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    return open_image(resolve_image(sample, root))


def enlarged(image: Image.Image) -> Image.Image:
    """A small image enlarged by a whole factor, so that each of its pixels stays a sharp square."""
    if max(image.size) > SMALL_IMAGE_PX:
        return image
    factor = max(1, CRISP_SIDE_PX // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def page_data_url(image: Image.Image, max_side_px: int = 900) -> str:
    """An image for a page: downscaled; JPEG where it is large, PNG where it is a small drawing."""
    scale = min(1.0, max_side_px / max(image.size))
    if scale < 1:
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )
    kind = "png" if image.width * image.height <= SMALL_IMAGE_PX**2 else "jpeg"
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


_PART = r"(?:\ (?:side|edge|corner|half))?(?:\ of)?"
_PLACES = rf"""
    (?:to|on|at|in|from)\ the\ (?:far\ |very\ )?
        (?:left|right|top|bottom|back|front|cent(?:er|re)|middle){_PART}
    | (?:far\ |upper\ |lower\ |top\ |bottom\ )?(?:left|right)(?:most)?{_PART}
    | (?:upper|lower|top|bottom|topmost|bottommost|uppermost|lowermost){_PART}
    | in\ front\ of | behind | above | below | beneath | under | underneath | between | beside
    | next\ to | near(?:est|by|er)?(?:\ to)? | close(?:st|r)?\ to | far(?:thest|ther|\ from)?
    | furthest | cent(?:er|re|ral)? | middle | corner | edge | foreground | background
    | upwards? | downwards? | leftwards? | rightwards? | at\ \d+\ \d+
"""
_ALIKE = r"""
    first | second | third | fourth | fifth | sixth | last | only | others? | another | similar
    | alike | identical | both | all | each | two | three | four | five | six | seven | several
    | multiple | among | candidates? | rather\ than | instead(?:\ of)? | unlike | except | not
    | \d+\ (?:of|are|is)\b
"""
_TINTS = re.compile(
    # Ends before anything but a letter of a word or a digit: a circled number may follow.
    rf"\b(?:(?P<place>{_PLACES})|(?P<alike>{_ALIKE}))(?![a-z0-9_])",
    re.IGNORECASE | re.VERBOSE,
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


def trace_pieces(trace: str, steps: Sequence[Step]) -> list[tuple[str, str]]:
    """`tint`, with the words of step n as a piece of kind "step n"."""
    pieces, end = [], 0
    for number, step in enumerate(steps, start=1):
        pieces += tint(trace[end : step.start])
        pieces.append((trace[step.start : step.end], f"step {number}"))
        end = step.end
    return pieces + tint(trace[end:])


def steps_of(row: Mapping, objects: Sequence[Box] | None = None) -> list[Step]:
    """The places that a row's reasoning names, px; none where the row does not allow to say.

    The row is a prediction or a curated trace. objects: as in `places`.
    """
    trace, _ = reasoning_and_answer(row)
    visible = plain_box(row.get("modal_box"))
    try:
        return places(
            trace or "",
            frame=frame_of(row),
            image_wh=(row["width"], row["height"]),
            visible=visible and tuple(visible),
            objects=objects,
        )
    except (ValueError, KeyError, TypeError):  # no size, or no such frame: the row says so itself
        return []


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
    objects: Sequence[Box] | None = None,
    max_side_px: int = 900,
) -> dict:
    """What the page draws for one sample: JSON values only.

    An image or group that cannot be read is described in `error`.
    """
    sample = comparison.sample
    view = {name: sample.get(name) for name in _FACTS}
    view.update(
        width=sample.get("width"),
        height=sample.get("height"),
        image=None,
        error=None,
        gt_box=plain_box(sample.get("gt_box")),
        modal_box=plain_box(sample.get("modal_box")),
        causes=dict(causes or {}),
    )
    try:
        image = image_of(sample, root)
        view["image"] = page_data_url(image, max_side_px)
        view["width"] = view["width"] or image.width
        view["height"] = view["height"] or image.height
    except (OSError, ValueError, KeyError, TypeError) as problem:
        view["error"] = f"the image cannot be shown: {problem}"
    view["models"] = [
        answer_view(comparison.answers.get(model), model, index, objects)
        for index, model in enumerate(models)
    ]
    view["group"] = None
    if group is not None:
        try:
            view["group"] = _group_view(group, view)
        except (ValueError, KeyError, TypeError) as problem:
            view["error"] = f"the group cannot be shown: {reason(problem)}"
    return view


def answer_view(
    answer: ScoredAnswer | None, model: str, index: int, objects: Sequence[Box] | None
) -> dict:
    """What the page draws of one answer: JSON values only. index: of the model in its list."""
    style = style_of(model, index)
    view = {"model": model, "label": style.label, "colour": style.colour, "dash": list(style.dash)}
    view["run"] = answer is not None
    if answer is None:
        return view
    row = answer.row
    reasoning, text = reasoning_and_answer(row)
    steps = steps_of(row, objects) if reasoning else []
    gt = plain_box(row.get("gt_box"))
    return view | {
        "box": answer.box and list(answer.box),
        "num_boxes": len(row.get("boxes") or ()),
        "iou": None if math.isnan(answer.iou) else answer.iou,
        "success": answer.success,
        "status": answer.status,
        "verdict": answer.verdict,
        "error": answer.error,
        "reward": None if gt is None or answer.error else grounding_reward(answer.box, gt),
        "reasoning": trace_pieces(reasoning, steps) if reasoning else [],
        "steps": [
            {
                "kind": step.kind,
                "point": list(step.point),
                "box": step.box and list(step.box),
                "fault": step.fault,
            }
            for step in steps
        ],
        "answer": text,
        "tokens": _sum(row.get("reasoning_tokens"), row.get("answer_tokens")),
        "latency_ms": row.get("latency_ms"),
        "first_token_ms": row.get("first_token_ms"),
        "note": row.get("note"),
        "truncated": row.get("finish_reason") == "length",
    }


def _group_view(group: Mapping, view: Mapping) -> dict:
    """The completions of one prompt: box, reward and advantage of each.

    Rewards and advantages that the group does not hold are computed (Eq. 7 and 8).
    """
    # A completion that is no text has no box; the others are shown.
    completions = [writable(text) if isinstance(text, str) else "" for text in group["completions"]]
    frame, image_wh, gt = frame_of(group), (view["width"], view["height"]), view["gt_box"]
    parsed = [parse_completion(text, frame=frame, image_wh=image_wh) for text in completions]
    rewards = group.get("rewards") or [grounding_reward(answer.box, gt) for answer in parsed]
    advantages = group.get("advantages") or _advantages(rewards)
    if not all(map(math.isfinite, [*rewards, *advantages])):
        raise ValueError("its rewards and advantages must be finite numbers")
    step = group.get("step")
    return {
        "step": step if isinstance(step, int) else None,
        "completions": [
            {
                "box": answer.box and list(answer.box),
                "iou": 0.0 if answer.box is None else iou(answer.box, gt),
                "success": is_success(answer.box, gt),
                "status": answer.status,
                "reward": float(reward),
                "advantage": float(advantage),
                "reasoning": tint(answer.reasoning or ""),
                "answer": text,
            }
            for text, answer, reward, advantage in zip(
                completions, parsed, rewards, advantages, strict=True
            )
        ],
    }


def _advantages(rewards: Sequence[float]) -> list[float]:
    import torch  # only here: a viewer of predictions opens without it

    from egm_lib.loss import group_advantages

    return group_advantages(torch.tensor(rewards, dtype=torch.float32), len(rewards)).tolist()


def _sum(*values) -> int | None:
    known = [value for value in values if value is not None]
    return int(sum(known)) if known else None
