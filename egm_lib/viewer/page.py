"""A sample and its answers as plain values for a page."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from egm_lib.boxes import BoxFrame, iou, is_success
from egm_lib.data import open_image, resolve_image
from egm_lib.parsing import parse_completion
from egm_lib.reward import grounding_reward
from egm_lib.viewer.comparison import Comparison, ScoredAnswer, plain_box, reasoning_and_answer
from egm_lib.viewer.palette import look


def image_of(sample: Mapping, root: str | Path) -> Image.Image:
    """The sample's image as RGB; its `image` may be a PIL image, a path, or a path relative to
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


def page_data_url(image: Image.Image, max_side_px: int = 900) -> str:
    """An image for a page: downscaled, JPEG where it is large and PNG where it is small (drawings
    stay crisp).
    """
    scale = min(1.0, max_side_px / max(image.size))
    if scale < 1:
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        )
    kind = "png" if image.width * image.height <= 256 * 256 else "jpeg"
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 85} if kind == "jpeg" else {}))
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
    """What the page draws for one sample: JSON values only. An image or group that cannot be read:
    see `error`.
    """
    sample = comparison.sample
    view = {name: sample.get(name) for name in _FACTS}
    view |= {
        "width": sample.get("width"),
        "height": sample.get("height"),
        "image": None,
        "error": None,
        "gt_box": plain_box(sample.get("gt_box")),
        "modal_box": plain_box(sample.get("modal_box")),
        "causes": dict(causes or {}),
    }
    try:
        image = image_of(sample, root)
        view["image"] = page_data_url(image, max_side_px)
        view["width"], view["height"] = (
            view["width"] or image.width,
            view["height"] or image.height,
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        view["error"] = f"the image cannot be shown: {problem}"
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


def _answer_view(answer: ScoredAnswer | None, model: str, place: int) -> dict:
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


def _sum(*values) -> int | None:
    known = [value for value in values if value is not None]
    return int(sum(known)) if known else None
