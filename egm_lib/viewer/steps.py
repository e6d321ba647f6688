"""The places that a reasoning trace names, in order: what is drawn on the image as numbered steps.

A trace names a place as a point ("first at 440 240", "(440, 240)"), as a box
("[838, 129, 993, 999]", "from 320 60 to 420 180"), or by the direction in which the last box has to
grow ("extend to the left a bit", Fig. 11). Time is linear in the length of the trace.
"""

import re
from collections.abc import Sequence
from itertools import islice
from math import dist, isfinite
from typing import NamedTuple

from egm_lib.boxes import Box, BoxFrame, convert
from egm_lib.curation.directions import DEGREES, NEGLIGIBLE

MAX_STEPS = 60  # a trace that names more places repeats itself
TOLERANCE = 0.02  # of the image's longer side: so far may a point lie beside its object
SAME_PLACE = 0.005  # of the image's longer side: two names for one place

NO_OBJECT = "no object here"
OUT_OF_ORDER = "out of order"
COUNTED_TWICE = "counted twice"


class Step(NamedTuple):
    """One place; trace[start:end] are the words that name it."""

    start: int
    end: int
    kind: str  # "point" | "box" | "extend"
    point: tuple[float, float]  # px: the point, the box's centre, or the middle of the moved side
    box: Box | None  # xyxy px: the box named, or the last box after it was extended
    fault: str = ""  # NO_OBJECT, OUT_OF_ORDER, COUNTED_TWICE, or nothing


_N = r"[-+]?[0-9]++(?:\.[0-9]++)?+"
_SEP = r"(?:\s*+,\s*+|\s++)"
_PAIR = rf"[(\[]?+\s*+{_N}{_SEP}{_N}(?:\s*+[)\]])?+"
_PLACES = re.compile(
    rf"""
    (?P<box>
        [(\[]\s*+{_N}(?:\s*+,\s*+{_N}){{3}}\s*+[)\]]          # [838, 129, 993, 999]
      | \bfrom\s++{_PAIR}\s++to\s++{_PAIR}                      # from 320 60 to 420 180
      | \([\s0-9.+-]++,[\s0-9.+-]++\)\s*+,\s*+\([\s0-9.+-]++,[\s0-9.+-]++\)  # (320, 60), (420, 180)
    )
  | (?P<point>
        \b(?:at|around|near)\s++(?:about\s++)?+{_PAIR}(?!{_SEP}[0-9])  # at 440 240
      | [(\[]\s*+{_N}\s*+,\s*+{_N}\s*+[)\]]                    # (440, 240)
    )
  | (?P<extend> \bexten[ds]\w*+[^.;:\n]{{0,160}}+ )              # extend to the left a bit
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NUMBER = re.compile(_N)
_DEGREE_WORDS = "|".join(word for _, word in DEGREES)
_DIRECTIONS = re.compile(
    rf"\b(?:(?P<side>up|down|left|right)(?:ward)?s?|(?P<degree>{_DEGREE_WORDS}))\b", re.IGNORECASE
)


def places(
    trace: str,
    *,
    frame: BoxFrame,
    image_wh: tuple[float, float],
    visible: Box | None = None,
    objects: Sequence[Box] | None = None,
) -> list[Step]:
    """The places that a trace names, in its order; never raises on any str.

    frame: what the trace's numbers mean. image_wh: original image, px. visible: visible part, px,
    which the trace extends where it names no box itself. objects: xyxy px of every object of the
    image, where they are known; a place that lies on none of them is marked.
    Numbers that lie outside the image name no place. At most MAX_STEPS are returned.
    """
    return list(islice(_places(trace, frame, image_wh, visible, objects), MAX_STEPS))


def _places(trace, frame, image_wh, visible, objects):
    last_box, before = visible, None
    counting = _Counting(image_wh)
    for match in _PLACES.finditer(trace):
        if match["extend"]:
            if last_box is None:
                continue
            for start, end, side, degree in _extensions(match[0]):
                last_box = _extended(last_box, side, degree)
                tip, at = _edge(last_box, side), match.start()
                yield Step(at + start, at + end, "extend", tip, last_box)
            continue
        box = _in_pixels([float(text) for text in _NUMBER.findall(match[0])], frame, image_wh)
        if box is None:
            continue
        words = trace[before or 0 : match.start()]
        fault = counting.fault(words, _centre(box))
        if not fault and objects is not None and not _is_no_thing(words):
            fault = "" if _on_an_object(_centre(box), objects, image_wh) else NO_OBJECT
        before = match.end()
        if match["box"]:
            last_box = box
        named = box if match["box"] else None
        yield Step(
            match.start(), match.end(), "box" if named else "point", _centre(box), named, fault
        )


def _in_pixels(numbers: list[float], frame: BoxFrame, image_wh: tuple[float, float]) -> Box | None:
    """Two or four numbers as a box in px; None where it does not lie on the image."""
    if len(numbers) == 2:
        numbers = numbers * 2
    if len(numbers) != 4 or not all(map(isfinite, numbers)):
        return None
    try:
        x1, y1, x2, y2 = convert(numbers, frame, BoxFrame.PIXEL, image_wh)
    except ValueError:  # numbers beyond what a float holds
        return None
    box = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    x, y = _centre(box)
    return box if 0 <= x <= image_wh[0] and 0 <= y <= image_wh[1] else None


def _centre(box: Box) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _edge(box: Box, side: str) -> tuple[float, float]:
    x, y = _centre(box)
    return {"left": (box[0], y), "right": (box[2], y), "up": (x, box[1]), "down": (x, box[3])}[side]


def numbered(trace: str, steps: Sequence[Step]) -> str:
    """The trace with a circled number behind the words of each step: "first at 440 240①"."""
    parts, end = [], 0
    for number, step in enumerate(steps, start=1):
        sign = chr(0x2460 + number - 1) if number <= 20 else f"({number})"  # ① to ⑳
        parts.append(f"{trace[end : step.end]}{sign}")
        end = step.end
    return "".join(parts) + trace[end:]


def _extensions(clause: str) -> list[tuple[int, int, str, str]]:
    """(start, end, side, degree word) for every direction in which a clause extends.

    The degree stands behind its direction ("left a bit"), or before it where none stands behind.
    """
    found, degree, open_side = [], None, None
    for match in _DIRECTIONS.finditer(clause):
        if match["side"]:
            side = match["side"].lower()
            found.append([match.start(), match.end(), side, degree])
            open_side, degree = (found[-1], None) if degree is None else (None, None)
        elif open_side is not None:
            open_side[1], open_side[3], open_side = match.end(), match["degree"].lower(), None
        else:
            degree = match["degree"].lower()
    return [tuple(each) for each in found if each[3] is not None]


def _extended(box: Box, side: str, degree: str) -> Box:
    """The box with one side moved outwards by the middle of what a degree word means."""
    low = NEGLIGIBLE
    for limit, word in DEGREES:
        if word == degree:
            break
        low = limit
    share = (low + limit) / 2 if isfinite(limit) else 1.0  # as much again
    x1, y1, x2, y2 = box
    by_x, by_y = share * (x2 - x1), share * (y2 - y1)
    return {
        "left": (x1 - by_x, y1, x2, y2),
        "right": (x1, y1, x2 + by_x, y2),
        "up": (x1, y1 - by_y, x2, y2),
        "down": (x1, y1, x2, y2 + by_y),
    }[side]


_ORDINALS = {
    word: number
    for number, word in enumerate(
        ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"), start=1
    )
}
_ORDINAL = re.compile(rf"\b({'|'.join(_ORDINALS)})\b", re.IGNORECASE)
_HEADING = re.compile(
    r"\b(?:from\s+(?:the\s+)?(left|right|top|bottom|largest|smallest)"
    r"|(?:to\s+the\s+)?(left|right)\s+of|(above|below))\b",
    re.IGNORECASE,
)
# The axis that a list runs along, and its sign; a list beside an anchor is counted outwards.
_FROM = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}
_BESIDE = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
_NO_THING = re.compile(r"\b(?:middle|midpoint|cent(?:re|er))\b[^.,;]*$", re.IGNORECASE)


class _Counting:
    """Whether the places of a counted list come in the order that the trace says."""

    def __init__(self, image_wh: tuple[float, float]):
        self.side_px = max(image_wh)
        self.direction: tuple[int, int] | None = None
        self.counted: list[tuple[float, float]] = []

    def fault(self, words: str, point: tuple[float, float]) -> str:
        """words: what the trace says between the last place and this one."""
        if headings := list(_HEADING.finditer(words)):
            start, beside, above = headings[-1].groups()
            named = (start or beside or above).lower()
            self.direction = (_FROM if start else _BESIDE).get(named)
        ordinals = _ORDINAL.findall(words)
        number = _ORDINALS[ordinals[-1].lower()] if ordinals else 0
        if number == 1:
            self.counted = [point]
            return ""
        if number == 0 or number != len(self.counted) + 1:
            self.counted = []  # no list, or one that does not count one by one
            return ""
        known, self.counted = self.counted, [*self.counted, point]
        if any(dist(point, other) < SAME_PLACE * self.side_px for other in known):
            return COUNTED_TWICE
        if self.direction is None:
            return ""
        axis, sign = self.direction
        return OUT_OF_ORDER if sign * (point[axis] - known[-1][axis]) < 0 else ""


def _is_no_thing(words: str) -> bool:
    """Whether the words speak of a mere point between objects: "the middle is"."""
    return _NO_THING.search(words[-60:]) is not None


def _on_an_object(
    point: tuple[float, float], objects: Sequence[Box], image_wh: tuple[float, float]
) -> bool:
    x, y = point
    slack = TOLERANCE * max(image_wh)
    return any(
        x1 - slack <= x <= x2 + slack and y1 - slack <= y <= y2 + slack
        for x1, y1, x2, y2 in objects
    )
