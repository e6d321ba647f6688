"""A model's completion -> its reasoning and its boxes. One parser for reward, metric and viewer.

Never raises on any text, and takes time linear in its length: every quantifier in the patterns
below is possessive, so nothing is ever backtracked over, and an attempt that fails has read past a
bounded number of possible starts.
"""

import re
from itertools import islice
from math import isfinite
from typing import NamedTuple

from egm_lib.boxes import SUCCESS_IOU, Box, BoxFrame, frame_scale
from egm_lib.scoring_rules import PEER_RULES

RULES = ("egm", *PEER_RULES)
MAX_GROUPS = 2000  # nobody answers with more boxes: what follows is a loop, and is not read


class Parsed(NamedTuple):
    """A completion taken apart."""

    reasoning: str | None  # None where there is none
    boxes: list[Box]  # every box of the answer, xyxy px of the original image
    box: Box | None  # the one that counts
    status: str  # "ok" | "no_box" | "unclosed_reasoning" | "malformed"
    swapped: int = 0  # how many boxes came with swapped corners (they are sorted above)


def parse_completion(
    text: str, *, frame: BoxFrame, image_wh: tuple[int, int], rule: str = "egm"
) -> Parsed:
    """Reasoning and boxes of a completion; never raises on any str.

    frame: what the numbers mean; declared by the caller, never guessed. image_wh: original image,
    px.
    rule: "egm" reads the text after the reasoning (of its last <answer>, where there is one) and
    counts its first box; a peer's rule (`PEER_RULES`, docs/scoring-rules.md) finds and scales the
    box the way that evaluator does. A chat template that has already written "<think>" leaves it
    out of the completion: prepend it, or a completion cut off within its reasoning cannot be told
    from an answer.
    status: "ok"; "unclosed_reasoning": no answer was begun; "malformed": numbers in brackets, or
    the key or tag of a box, but none that can be read; else "no_box".
    Raises ValueError for an unknown rule or frame, or an image size that is not positive.
    """
    scale = frame_scale(frame, image_wh)
    reasoning, answer_start = split_reasoning(text)
    if rule != "egm":
        if rule not in PEER_RULES:
            raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
        box = PEER_RULES[rule].find(text, frame, image_wh)
        return Parsed(reasoning, [box] if box else [], box, "ok" if box else "no_box")
    if answer_start is None:
        return Parsed(reasoning, [], None, "unclosed_reasoning")
    answer = text[answer_start:]
    if "<answer>" in answer:
        answer = answer[answer.rindex("<answer>") + len("<answer>") :]
    if "</answer>" in answer:
        answer = answer[: answer.index("</answer>")]
    if not answer.isascii():
        answer = answer.translate(_FULL_WIDTH)
    boxes, swapped, attempts = _find_boxes(answer, scale)
    if boxes:
        return Parsed(reasoning, boxes, boxes[0], "ok", swapped)
    attempted = attempts or any(marker in answer for marker in _BOX_MARKERS)
    return Parsed(reasoning, boxes, None, "malformed" if attempted else "no_box")


def accepts(iou: float, rule: str = "egm") -> bool:
    """Whether a rule counts this IoU as a success: > 0.5, or >= 0.5 for most peers."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    return iou > SUCCESS_IOU or (
        iou == SUCCESS_IOU and rule != "egm" and PEER_RULES[rule].inclusive
    )


def split_reasoning(text: str) -> tuple[str | None, int | None]:
    """The reasoning, and where the answer starts; (reasoning, None) where the reasoning was never
    closed.

    The last </think> ends the reasoning (with or without an opening <think>), so nothing before it
    can count.
    """
    close, opened = text.rfind("</think>"), text.rfind("<think>")
    if opened > close:
        return text[opened + len("<think>") :].strip() or None, None
    if close < 0:
        return None, 0
    start = text.find("<think>", 0, close)
    return text[start + len("<think>") if start >= 0 else 0 : close].strip() or None, close + len(
        "</think>"
    )


# Full-width forms (what Chinese input methods write), the minus sign and the ideographic comma and
# space, as ASCII.
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x2212: "-",
    0x3001: ",",
    0x3000: " ",
}

_BOX_MARKERS = ("bbox", "<box", "box_start")
_NUMBERS = r"\s*+[-+.0-9][-+.0-9eE,\s]*+"
_GROUPS = re.compile(
    rf"""
    \[({_NUMBERS})([\]\[])  # [1, 2, 3, 4]; ended by "[": a list inside a list
    | <box>({_NUMBERS})</box>                                    # <box>1, 2, 3, 4</box>
    | (<[-+.0-9][-+.0-9eE]*+>(?:\s*+<[-+.0-9][-+.0-9eE]*+>)*+)   # <1><2><3><4>
    | (\({_NUMBERS}\)(?:\s*+,?\s*+\({_NUMBERS}\))*+)             # (1, 2), (3, 4) or (1, 2, 3, 4)
    | "(?<!box")(?<!box_2d")\s*+:\s*+"(?:[^"\\]++|\\.)*+"  # a JSON string is no answer ...
    | '(?<!box')(?<!box_2d')\s*+:\s*+'(?:[^'\\]++|\\.)*+'
    | '(?<!box')(?<!box_2d')\s*+:\s*+"(?:[^"\\]++|\\.)*+"
    | <ref>(?:[^<]++|<(?!/?ref>))*+</ref>                          # ... nor is a label
    """,
    re.VERBOSE | re.DOTALL,
)
# x_min, xmin or x1, and so on, each followed by its number
_CORNER = re.compile(
    r"""([xyXY])(?<!\w[xyXY])(_?[mM][iI][nN]|_?[mM][aA][xX]|[12])["']?+\s*+[:=]\s*+([-+.0-9][-+.0-9eE]*+)"""
)
_CORNERS = ("x1", "y1", "x2", "y2")
_CORNER_NUMBER = {"min": "1", "max": "2"}


def _find_boxes(answer: str, scale: tuple[float, float, float]) -> tuple[list[Box], int, int]:
    """Boxes in px, how many had swapped corners, and how many groups of numbers were tried."""
    matches = islice(_GROUPS.finditer(answer), MAX_GROUPS)
    candidates = [numbers for match in matches for numbers in _number_lists(*match.groups())][
        :MAX_GROUPS
    ]
    boxes, swapped = _to_pixels(candidates, scale)
    if not boxes:
        corners = _corner_lists(answer)
        candidates += corners
        boxes, swapped = _to_pixels(corners, scale)
    return boxes, swapped, len(candidates)


def _number_lists(square: str, end: str, tagged: str, angled: str, round_: str) -> list[list[str]]:
    """The numbers of one match of `_GROUPS`, as one list for each box it may hold."""
    if square:
        return [_split_numbers(square)] if end == "]" else [[]]
    if tagged:
        return [_split_numbers(tagged)]
    if angled:
        return [angled[1:].replace(">", "").split("<")]
    if round_:
        lists = [
            _split_numbers(part) for part in round_[1:-1].replace(")", "").split("(", MAX_GROUPS)
        ]
        points = all(len(numbers) == 2 for numbers in lists)
        return [lists[0] + lists[1]] if points and len(lists) == 2 else lists
    return []


def _split_numbers(text: str) -> list[str]:
    return text.strip().rstrip(",").split(",") if "," in text else text.split()


def _corner_lists(answer: str) -> list[list[str]]:
    """Boxes written with a key for each corner, in any order."""
    lists: list[list[str]] = []
    corners: dict[str, str] = {}
    for match in islice(_CORNER.finditer(answer), 4 * MAX_GROUPS):
        axis, end, number = match.groups()
        end = end.lower().lstrip("_")
        corner = axis.lower() + _CORNER_NUMBER.get(end, end)
        if corner in corners:  # another box has begun before this one was complete
            corners = {}
        corners[corner] = number
        if len(corners) == 4:
            lists.append([corners[name] for name in _CORNERS])
            corners = {}
    return lists


def _to_pixels(
    candidates: list[list[str]], scale: tuple[float, float, float]
) -> tuple[list[Box], int]:
    """The candidates that are four finite numbers, as xyxy px with sorted corners, and how many had
    to be sorted.
    """
    width, height, unit = scale
    boxes: list[Box] = []
    swapped = 0
    for numbers in candidates:
        if len(numbers) != 4:
            continue
        try:
            x1, y1, x2, y2 = map(float, numbers)
        except ValueError:  # such as "1-2" or "1e"
            continue
        x1, y1, x2, y2 = (
            x1 * width / unit,
            y1 * height / unit,
            x2 * width / unit,
            y2 * height / unit,
        )
        if not isfinite(x1 + y1 + x2 + y2):
            continue
        if x1 > x2 or y1 > y2:
            swapped += 1
            x1, y1, x2, y2 = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
        boxes.append((x1, y1, x2, y2))
    return boxes, swapped
