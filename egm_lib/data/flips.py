"""Horizontal flips, as in the authors' training file: image and box mirrored, left and right
swapped in the words.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from datasets import Dataset

from egm_lib.data.images import mirrored_name
from egm_lib.data.records import GroundingSample, rows_to_dataset

_SWAP = {"left": "right", "right": "left"}

# Words that contain left or right and say where something is: leftmost, left-hand, upper-left,
# righty, ...
_PLACE_WORD = re.compile(
    r"(?:(?:far|upper|lower|top|bottom|front|back|rear|mid|middle|center|centre)-?)?"
    r"(?P<side>left|right)"
    r"(?:-?(?:most|hand|handed|hander|side|ish|ward|wards|er|est)|y|ie|ies|s)?(?:'s)?"
)
# Words that contain them and say nothing about the side.
_OTHER_WORD = re.compile(
    r"(?:up|out|down|forth|b|f|w|play|ship)rights?(?:ly|er|est|ness|en|ened|ening)?|"
    r"(?:bright|fright|wright)\w*|copyright\w*|leftovers?|cleft"
)
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")

# With these before it a side is a side, whatever follows: "on the far right in blue", "bottom left
# on the table".
_CERTAIN = re.compile(
    r"\b(?:(?:on|to|at|from|in|of|toward|towards|facing|looking|pointing)(?: "
    r"(?:the|her|his|its|their|your|my|our|far|"
    r"very|extreme|most|upper|lower|top|bottom|front|back))*|far|farthest|furthest|upper|lower|top|bottom|front|back)"
    r"[ -](?:left|right)\b|^(?:the )?left (?=in|on|at|by|front|back)\b"
)
# "left" that does not say where: gone away, or remaining. "right" that does not: exactly, correct.
_LEFT_VERB = re.compile(
    r"\b(?:who|that|which|he|she|they|it|has|have|had|having|just|already|been|being|get|got|getting|gets|leaves?)"
    r" left\b(?! (?:of|side|hand|most|corner|end|part|half|edge)\b)"
    r"|\bleft "
    r"(?:the|a|an|his|her|their|its|my|your|over|behind|alone|out|open|unattended|uneaten|empty|here|there|"
    r"for|to be|to|when|after|before|by|in|on|at)\b"
    r"|\b(?:nothing|something|one|two|three|four|pieces?|slices?) left\b(?! (?:of|side|hand)\b)"
    r"|\bwhat(?:'s| is| was) left\b"
    r"|\b(?:is|are|was|were) left(?=$| ?[.,;!?]| (?:and|with)\b)"
)
_RIGHT_ADVERB = re.compile(
    r"\bright "
    r"(?:next|behind|beside|besides|above|below|under|underneath|beneath|before|after|near|by|in|on|at|over|up|"
    r"down|against|around|between|across|through|where|here|there|now|away|outside|inside|off|out|along|past|about|"
    r"angle|angled|angles|triangle|way|answer|amount|side up)\b|\ball right\b"
)
# What mirroring makes untrue, or abbreviations that may mean left or right: nobody can swap these
# safely.
_UNSURE = re.compile(
    r"\b(?:clock|clockwise|counter-?clockwise|anti-?clockwise|o'?clock|mirrored|"
    r"l|r|lt|rt|lft|rgt|rght|lhs|rhs|lef|leff|rigt|rigth|rihgt|rite)\b"
)


class _Doubt(Exception):
    """The reason why an expression cannot be mirrored."""


def mirror_expression(expression: str) -> str | None:
    """The expression that means the same object in the mirrored image; None where that cannot be
    told from the words.

    left and right change places in every word that says where something is, letter case kept. None
    where "left" may be a verb ("the man who left", "slice left on the plate"), "right" may not be a
    side ("right behind"), or for abbreviations and directions of rotation.
    """
    try:
        return _mirrored(expression)
    except _Doubt:
        return None


def _mirrored(expression: str) -> str:
    """mirror_expression that raises _Doubt, with the reason."""
    mirrored = _swapped(expression)
    if _swapped(mirrored) != expression:
        raise _Doubt("does not mirror back")
    return mirrored


def _swapped(expression: str) -> str:
    lower = re.sub(r"\s+", " ", expression.lower().replace("’", "'"))
    lower = _CERTAIN.sub("somewhere", lower)
    for pattern, reason in (
        (_UNSURE, "abbreviation or rotation"),
        (_LEFT_VERB, "left as a verb"),
        (_RIGHT_ADVERB, "right that is no side"),
    ):
        if pattern.search(lower):
            raise _Doubt(reason)
    return _WORD.sub(_swap_word, expression)


def _swap_word(match: re.Match) -> str:
    word = match.group()
    lower = word.lower().replace("’", "'")
    if ("left" not in lower and "right" not in lower) or _OTHER_WORD.fullmatch(lower):
        return word
    place = _PLACE_WORD.fullmatch(lower)
    if place is None:
        raise _Doubt("unknown word with left or right")
    start, end = place.span("side")
    return word[:start] + _like(word[start:end], _SWAP[place["side"]]) + word[end:]


def _like(old: str, new: str) -> str:
    """`new` in the letter case of `old`."""
    return new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new


def flip(sample: Mapping) -> GroundingSample | None:
    """The sample mirrored: image (its twin in the sibling folder `..._flip`), boxes and words.
    None where the words cannot be (`mirror_expression`). Flipping twice gives the sample back.
    Makes no image: `write_mirrored` does.
    """
    expression = mirror_expression(sample["expression"])
    if expression is None:
        return None
    width, sample_id = sample["width"], sample["sample_id"]
    flipped = not sample["flipped"]
    return GroundingSample(
        **sample
        | dict(
            sample_id=f"{sample_id}-flip" if flipped else sample_id.removesuffix("-flip"),
            image=mirrored_name(sample["image"]),
            expression=expression,
            gt_box=_mirror_box(sample["gt_box"], width),
            modal_box=sample.get("modal_box") and _mirror_box(sample["modal_box"], width),
            flipped=flipped,
        )
    )


def _mirror_box(box: list[float], width: int) -> list[float]:
    x1, y1, x2, y2 = box
    return [width - x2, y1, width - x1, y2]


def flip_all(samples: Dataset, counts: Counter | None = None) -> Dataset:
    """The mirrored twins of the samples that have one. counts: if given, receives why the others
    have none.
    """
    return rows_to_dataset(
        _flipped(samples, Counter() if counts is None else counts), "flipped samples"
    )


def _flipped(samples: Dataset, counts: Counter) -> Iterator[GroundingSample]:
    for sample in samples:
        twin = flip(sample)
        if twin is not None:
            yield twin
            continue
        try:
            _mirrored(sample["expression"])
        except _Doubt as reason:
            counts[str(reason)] += 1
