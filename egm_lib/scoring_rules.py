"""How other evaluators find, scale and accept a box, so that answers can be scored as they do.

Each rule was written from a reading of that evaluator's code and keeps its quirks, but it runs in
linear time. Most rules have a scale of their own. That is part of how they score, and a common
reason why two scores of the same answers differ. If an evaluator makes up a zero box, the rule here
gives None, which scores the same.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite

from egm_lib.boxes import Box, BoxFrame, frame_scale

_INTEGER = r"(\d++)"
_DECIMAL = r"(-?\d++(?:\.\d++)?+)"
_FLOAT = r"([-+]?(?:\d++(?:\.\d++)?+|\.\d++)(?:[eE][-+]?\d++)?+)"
_PLAIN_FLOAT = re.compile(r"[-+]?(?:\d++(?:\.\d++)?+|\.\d++)")
_ANY_FLOAT = re.compile(_FLOAT)


def _four_list(number: str, separator: str = r"\s*+,\s*+", prefix: str = "") -> re.Pattern[str]:
    return re.compile(rf"{prefix}\[\s*+{separator.join([number] * 4)}\s*+\]")


_EGM_KEYED = _four_list(_FLOAT, prefix=r'"bbox_2d"\s*+:\s*+')
_EGM_LIST = _four_list(_FLOAT)
_LMMS_LIST = _four_list(_DECIMAL, separator=r",\s*+")
_VLMEVALKIT_LIST = _four_list(_FLOAT, separator=r"(?:\s*+,\s*+|\s++)")
_VLM_R1_LIST = re.compile(rf"\[{_INTEGER},\s*+{_INTEGER},\s*+{_INTEGER},\s*+{_INTEGER}\]")
_INTERNVL_LIST = re.compile(r"\[++([^,\n]*+),([^,\n]*+),([^,\n]*+),([^\]\n]*+)\]")
_BRACKETS = re.compile(r"\[([^\[\]]++)\]")
_OPEN_ANSWER = re.compile("<answer>", re.IGNORECASE)
_CLOSE_ANSWER = re.compile("</answer>", re.IGNORECASE)


@dataclass(frozen=True)
class PeerRule:
    """How one evaluator scores.

    find(text, frame, image_wh): the box in px, or None. inclusive: whether IoU = 0.5 is a success.
    """

    find: Callable[[str, BoxFrame, tuple[int, int]], Box | None]
    inclusive: bool


def _egm_released_eval(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """First "bbox_2d", else first list of four, else the last four numbers.

    0-1000, clipped, rounded to whole px.
    """
    match = _EGM_KEYED.search(text) or _EGM_LIST.search(text)
    numbers = list(match.groups()) if match else _ANY_FLOAT.findall(text)[-4:]
    if (box := _floats(numbers)) is None:
        return None
    x1, y1, x2, y2 = (min(max(value, 0.0), 1000.0) for value in box)
    return _whole_pixels((x1, y1, x2, y2), image_wh)


def _egm_released_reward(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """Last bracket of the first <answer>, else of the text, else the last four numbers.

    0-1000, sorted, rounded to whole px.
    """
    opened = _OPEN_ANSWER.search(text)
    closed = _CLOSE_ANSWER.search(text, opened.end()) if opened else None
    box = _egm_last_bracket(text[opened.end() : closed.start()]) if opened and closed else None
    if box is None and (box := _egm_last_bracket(text)) is None:
        return None
    x1, y1, x2, y2 = box
    return _whole_pixels((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), image_wh)


def _egm_last_bracket(text: str) -> Box | None:
    brackets = _BRACKETS.findall(text)
    numbers = (
        _PLAIN_FLOAT.findall(brackets[-1])[:4] if brackets else _PLAIN_FLOAT.findall(text)[-4:]
    )
    return _floats(numbers)


def _internvl(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """First [a, b, c, d] of a line; 0-1000 if the four add up to 4 or more, else 0-1."""
    for line in text.split("\n"):
        start = line.find("[")
        if start >= 0 and (match := _INTERNVL_LIST.match(line, start)):
            if (box := _floats(match.groups())) is None:
                return None
            return _scaled(box, 1000.0 if sum(box) >= 4 else 1.0, image_wh)
    return None


def _qwen_vl(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """First (x1,y1),(x2,y2) of a line, with nothing between the two; 0-999."""
    for line in text.split("\n"):
        start = line.find("(")
        middle = line.find("),(", start + 1) if start >= 0 else -1
        end = line.find(")", middle + 3) if middle >= 0 else -1
        if end >= 0:
            corners = line[start + 1 : middle].split(","), line[middle + 3 : end].split(",")
            if [len(corner) for corner in corners] != [2, 2] or (
                box := _floats(corners[0] + corners[1])
            ) is None:
                return None
            return _scaled(box, 999.0, image_wh)
    return None


def _lmms_eval(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """First [a, b, c, d] of decimals, taken as 0-1."""
    match = _LMMS_LIST.search(text)
    box = _floats(match.groups()) if match else None
    return box and _scaled(box, 1.0, image_wh)


def _vlmevalkit(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """First list of four, else the first four numbers.

    The scale is guessed from the largest number; the box is clipped, then sorted.
    """
    match = _VLMEVALKIT_LIST.search(text)
    box = _floats(match.groups() if match else [match[0] for match in _first(_ANY_FLOAT, text, 4)])
    if box is None:
        return None
    largest = max(map(abs, box))
    if (
        largest <= 1000
        and (box := _scaled(box, 1.0 if largest <= 1.5 else 1000.0, image_wh)) is None
    ):
        return None
    width, height = image_wh
    x1, x2 = sorted(min(max(x, 0.0), float(width)) for x in box[::2])
    y1, y2 = sorted(min(max(y, 0.0), float(height)) for y in box[1::2])
    return x1, y1, x2, y2


def _vlm_r1(text: str, frame: BoxFrame, image_wh: tuple[int, int]) -> Box | None:
    """Last list of integers in braces in the first <answer>; in the declared frame.

    VLM-R1 counts overlaps of up to one pixel as none. That cannot decide a success and is left out.
    """
    start = text.find("<answer>")
    end = text.find("</answer>", start) if start >= 0 else -1
    if end < 0:
        return None
    start, end = text.find("{", start, end), text.rfind("}", start, end)
    lists = _VLM_R1_LIST.findall(text, start, end) if 0 <= start < end else []
    box = _floats(lists[-1]) if lists else None
    width, height, unit = frame_scale(frame, image_wh)
    return box and _scaled(box, unit, (width, height))


PEER_RULES: dict[str, PeerRule] = {
    "egm-released-eval": PeerRule(_egm_released_eval, inclusive=False),
    "egm-released-reward": PeerRule(_egm_released_reward, inclusive=True),
    "internvl": PeerRule(_internvl, inclusive=True),
    "qwen-vl": PeerRule(_qwen_vl, inclusive=True),
    "lmms-eval": PeerRule(_lmms_eval, inclusive=True),
    "vlmevalkit": PeerRule(_vlmevalkit, inclusive=True),
    "vlm-r1": PeerRule(_vlm_r1, inclusive=False),
}


def _floats(numbers: Iterable[str | float]) -> Box | None:
    """Four finite floats, or None."""
    try:
        x1, y1, x2, y2 = map(float, numbers)
    except ValueError:
        return None
    return (x1, y1, x2, y2) if all(map(isfinite, (x1, y1, x2, y2))) else None


def _first(pattern: re.Pattern[str], text: str, count: int) -> list[re.Match[str]]:
    return [match for match, _ in zip(pattern.finditer(text), range(count), strict=False)]


def _scaled(box: Box, unit: float, image_wh: tuple[float, float]) -> Box | None:
    """From 0..unit to px; None if that overflows."""
    width, height = image_wh
    return _floats(
        (
            box[0] / unit * width,
            box[1] / unit * height,
            box[2] / unit * width,
            box[3] / unit * height,
        )
    )


def _whole_pixels(box: Box, image_wh: tuple[int, int]) -> Box:
    """The released `scale_bbox`: 0-1000 to whole px in the image, at least one wide and high."""
    (x1, x2), (y1, y2) = (
        [round(min(max(value * size / 1000, 0), size - 1)) for value in values]
        for values, size in zip((box[::2], box[1::2]), image_wh, strict=True)
    )
    if x1 == x2:
        x2 = min(x1 + 1, image_wh[0] - 1)
    if y1 == y2:
        y2 = min(y1 + 1, image_wh[1] - 1)
    return float(x1), float(y1), float(x2), float(y2)
