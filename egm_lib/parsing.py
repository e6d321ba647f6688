"""A model's completion -> its reasoning and its boxes. One parser for reward, metric and viewer.

It never raises on any text and takes time linear in its length: every quantifier in the patterns
below is possessive, so the matcher never backtracks, and a failed attempt has read past a bounded
number of possible starts.
"""

import re
from itertools import islice
from math import isfinite
from typing import NamedTuple

from egm_lib.boxes import SUCCESS_IOU, Box, BoxFrame, frame_scale
from egm_lib.prompts import ANSWER_TAG, REASONING_TAG
from egm_lib.scoring_rules import PEER_RULES

RULES = ("egm", *PEER_RULES)
MAX_GROUPS = 2000  # no answer has more boxes: what follows comes from a loop and is not read


class Parsed(NamedTuple):
    """A completion taken apart."""

    reasoning: str | None  # None if there is none
    boxes: list[Box]  # every box of the answer, xyxy px of the original image
    box: Box | None  # the one that counts
    status: str  # "ok" | "no_box" | "unclosed_reasoning" | "malformed"
    swapped: int = 0  # how many boxes came with swapped corners (they are sorted above)


def parse_completion(
    text: str, *, frame: BoxFrame, image_wh: tuple[int, int], rule: str = "egm"
) -> Parsed:
    """Reasoning and boxes of a completion; never raises on any str.

    frame: that of the numbers; the caller declares it, it is never guessed.
    image_wh: size of the original image, px.
    rule: "egm" reads what follows the reasoning, or the last <answer> in it, and counts the first
    box. A peer's rule (`PEER_RULES`, docs/scoring-rules.md) finds and scales the box as that
    evaluator does.
    status: "ok"; "unclosed_reasoning": no answer was begun; "malformed": numbers in brackets, or
    the key or tag of a box, but no box that can be read; else "no_box".

    If the chat template has already written "<think>", the completion does not contain it. Put it
    in front: otherwise a completion that was cut off within its reasoning looks like an answer.
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
    answer = last_answer(text[answer_start:])
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
    """(reasoning, start of the answer in the text); the start is None if the reasoning never ends.

    The last closing tag ends the reasoning, with or without an opening tag, so that nothing before
    it can count. `REASONING_TAG` says which tags there are.
    """
    first = opened = closed = None
    for tag in REASONING_TAG.finditer(text):
        if tag["close"]:
            closed = tag
        else:
            first, opened = first or tag, tag
    if opened and (closed is None or closed.start() < opened.start()):
        return text[opened.end() :].strip() or None, None
    if closed is None:
        return None, 0
    start = first.end() if first else 0
    return text[start : closed.start()].strip() or None, closed.end()


def last_answer(text: str) -> str:
    """What stands in the last <answer>; the whole text if there is none."""
    start, end = 0, len(text)
    for tag in ANSWER_TAG.finditer(text):
        if not tag["close"]:
            start, end = tag.end(), len(text)
        else:
            end = min(end, tag.start())
    return text[start:end]


# Full-width forms, which Chinese input methods write, the minus sign, and the ideographic comma and
# space, as ASCII
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    0x2212: "-",
    0x3001: ",",
    0x3000: " ",
}

_BOX_MARKERS = ("bbox", "<box", "box_start")
_NUMBERS = r"\s*+[-+.0-9][-+.0-9eE,\s]*+"
# What is quoted is no answer: a JSON string, unless it is the value of a box, and a label
_QUOTED = r"""
    "(?<!box")(?<!box_2d")\s*+:\s*+"(?:[^"\\]++|\\.)*+"
    | '(?<!box')(?<!box_2d')\s*+:\s*+'(?:[^'\\]++|\\.)*+'
    | '(?<!box')(?<!box_2d')\s*+:\s*+"(?:[^"\\]++|\\.)*+"
    | <ref>(?:[^<]++|<(?!/?ref>))*+</ref>
"""
_QUOTED_TEXT = re.compile(_QUOTED, re.VERBOSE | re.DOTALL)
_GROUPS = re.compile(
    rf"""
    # [1, 2, 3, 4]; a second "[" instead of "]" ends a list inside a list
    \[({_NUMBERS})([\]\[])
    # <box>1, 2, 3, 4</box>
    | <box>({_NUMBERS})</box>
    # <1><2><3><4>
    | (<[-+.0-9][-+.0-9eE]*+>(?:\s*+<[-+.0-9][-+.0-9eE]*+>)*+)
    # (1, 2), (3, 4) or (1, 2, 3, 4)
    | (\({_NUMBERS}\)(?:\s*+,?\s*+\({_NUMBERS}\))*+)
    | {_QUOTED}
    """,
    re.VERBOSE | re.DOTALL,
)
# x_min, xmin or x1, and so on, each followed by its number
_CORNER = re.compile(
    r"""([xyXY])(?<!\w[xyXY])(_?[mM][iI][nN]|_?[mM][aA][xX]|[12])["']?+\s*+[:=]\s*+"""
    r"([-+.0-9][-+.0-9eE]*+)"
)
# What may stand between two corners of one box: punctuation, and keys of enclosing objects
_BETWEEN_CORNERS = re.compile(r"""(?:[\s,;{}()\[\]]++|["']\w++["']\s*+:|["'`*]|and\b|px\b)*+""")
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
    """Boxes written with a key for each corner, in any order.

    The four stand side by side: a sentence that mentions corners here and there names no box.
    """
    if not _CORNER.search(answer):
        return []
    answer = _QUOTED_TEXT.sub(" ", answer)
    lists: list[list[str]] = []
    corners: dict[str, str] = {}
    end = 0
    for match in islice(_CORNER.finditer(answer), 4 * MAX_GROUPS):
        axis, side, number = match.groups()
        side = side.lower().lstrip("_")
        corner = axis.lower() + _CORNER_NUMBER.get(side, side)
        together = _BETWEEN_CORNERS.fullmatch(answer, end, match.start())
        if corner in corners or not together:  # another box begins before this one is complete
            corners = {}
        corners[corner], end = number, match.end()
        if len(corners) == 4:
            lists.append([corners[name] for name in _CORNERS])
            corners = {}
    return lists


def _to_pixels(
    candidates: list[list[str]], scale: tuple[float, float, float]
) -> tuple[list[Box], int]:
    """(boxes, swapped): the candidates that are four finite numbers, as xyxy px.

    Swapped corners are sorted; `swapped` is how many boxes had them.
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
