"""Horizontal flips, as in the authors' training file.

Image and box are mirrored, and left and right change places in the words.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from datasets import Dataset

from egm_lib.data.images import mirrored_name
from egm_lib.data.records import GroundingSample, rows_to_dataset

_SWAP = {"left": "right", "right": "left"}

# Words that contain left or right and state a position: leftmost, left-hand, upper-left, righty
_PLACE_WORD = re.compile(
    r"(?:(?:far|upper|lower|top|bottom|front|back|rear|mid|middle|center|centre)-?)?"
    r"(?P<side>left|right)"
    r"(?:-?(?:most|hand|handed|hander|side|ish|ward|wards|er|est)|y|ie|ies|s)?(?:'s)?"
)
# Words that contain left or right and state no position
_OTHER_WORD = re.compile(
    r"(?:up|out|down|forth|b|f|w|play|ship)rights?(?:ly|er|est|ness|en|ened|ening)?|"
    r"(?:bright|fright|wright)\w*|copyright\w*|leftovers?|cleft"
)
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")

# After these words left and right are sides, whatever follows: "on the far right in blue", "bottom
# left on the table".
_CERTAIN = re.compile(
    r"\b(?:(?:on|to|at|from|in|of|toward|towards|facing|looking|pointing)(?: "
    r"(?:the|her|his|its|their|your|my|our|far|"
    r"very|extreme|most|upper|lower|top|bottom|front|back))*|far|farthest|furthest|upper|lower|top|bottom|front|back)"
    r"[ -](?:left|right)\b|^(?:the )?left (?=in|on|at|by|front|back)\b"
)
# "left" that is no side: gone away, or remaining. "right" that is no side: exactly, correct.
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
# What mirroring makes untrue, and abbreviations that may mean left or right: none can be swapped
# safely.
_UNSURE = re.compile(
    r"\b(?:clock|clockwise|counter-?clockwise|anti-?clockwise|o'?clock|mirrored|"
    r"(?:north|south)?-?(?:east|west)(?:ern|erly|ward|wards|most|ernmost)?|southpaw|"
    r"starboard|portside|port[ -]side|(?:to|on) port|\d{1,2}:\d\d|"
    r"l|r|lt|rt|lft|rgt|rght|lhs|rhs|lef|leff|rigt|rigth|rihgt|rite)\b"
)
# Sides in other languages that are English words too, or look like two of them
_FOREIGN_SIDES = {"links", "linker", "gauche", "jobbra"}
# English words that are one edit away from left or right and common in expressions. Others, such as
# "lift", are taken for misspelt sides.
_LIKE_A_SIDE = {"light", "bright", "night", "eight", "tight", "might", "sight", "fight"}
# What people wear, hold and do in images, as far as english_words.txt lacks it
_MORE_WORDS = (
    "aqua beanie biker capri catcher caucasian cupcake dreadlocks frisbee fuchsia "
    "grey hoodie ipad iphone laptop laptops lanyard macbook minivan oj pic pics shirtless skier "
    "smartphone snowboarder suv surfer sweatshirt teal teddy topless tshirt tshirts webcam wetsuit"
)
_NUMBER = re.compile(r"[0-9]+(?:st|nd|rd|th|s)?")
_PUNCTUATION = re.compile(r"[\s!-/:-@\[-`{-~‘’“”–—…]*")


class _Doubt(Exception):
    """Why an expression cannot be mirrored."""


def mirror_expression(expression: str) -> str | None:
    """The expression that means the same object in the mirrored image; None if that is unsure.

    left and right change places in every word that states a position; letter case is kept. Every
    other word must be known to be free of sides. So the result is None
    - if "left" may be a verb ("the man who left", "slice left on the plate"),
    - if "right" may be no side ("right behind"),
    - for abbreviations, compass points, sides of a ship and directions of rotation,
    - for a word that is neither in `english_words.txt` nor made of two that are: it may be of
      another language, or misspelt,
    - for a word that is one edit away from left or right ("lift").
    """
    try:
        return _mirrored(expression)
    except _Doubt:
        return None


def _mirrored(expression: str) -> str:
    """`mirror_expression` that raises _Doubt with the reason."""
    mirrored = _swapped(expression)
    if _swapped(mirrored) != expression:
        raise _Doubt("does not mirror back")
    return mirrored


def _swapped(expression: str) -> str:
    lower = re.sub(r"\s+", " ", expression.lower().replace("’", "'"))
    certain = _CERTAIN.sub("somewhere", lower)
    for pattern, reason in (
        (_UNSURE, "abbreviation, compass point or rotation"),
        (_LEFT_VERB, "left as a verb"),
        (_RIGHT_ADVERB, "right that is no side"),
    ):
        if pattern.search(certain):
            raise _Doubt(reason)
    if not _PUNCTUATION.fullmatch(_WORD.sub("", lower)):
        raise _Doubt("unknown sign")
    return _WORD.sub(_swap_word, expression)


def _swap_word(match: re.Match) -> str:
    word = match.group()
    lower = word.lower().replace("’", "'")
    if "left" not in lower and "right" not in lower:
        _check_free_of_sides(lower)
        return word
    if _OTHER_WORD.fullmatch(lower):
        return word
    position = _PLACE_WORD.fullmatch(lower)
    if position is None:
        raise _Doubt("unknown word with left or right")
    start, end = position.span("side")
    return word[:start] + _like(word[start:end], _SWAP[position["side"]]) + word[end:]


def _check_free_of_sides(word: str) -> None:
    """Raises _Doubt for a word, in lower case, that may be a side."""
    known = word in _english_words()
    for part in [word] if known else re.split(r"[-']", word.removesuffix("'s")):
        if part in _FOREIGN_SIDES:
            raise _Doubt("side in another language")
        if part in _misspelt_sides() and part not in _LIKE_A_SIDE:
            raise _Doubt("misspelt side")
        if not (part in _english_words() or _NUMBER.fullmatch(part) or _is_compound(part)):
            raise _Doubt("unknown word")


def _is_compound(word: str) -> bool:
    """Whether a word is made of two known ones of three letters or more, such as "backrest"."""
    halves = ((word[:at], word[at:]) for at in range(3, len(word) - 2))
    known = _words_of_compounds()
    return any(first in known and second in known for first, second in halves)


@cache
def _english_words() -> frozenset[str]:
    lines = Path(__file__).with_name("english_words.txt").read_text(encoding="utf-8").splitlines()
    words = frozenset(line for line in lines if not line.startswith("#"))
    return words | frozenset(_MORE_WORDS.split()) | frozenset(ascii_lowercase)


@cache
def _words_of_compounds() -> frozenset[str]:
    return _english_words() - _misspelt_sides() - _FOREIGN_SIDES


@cache
def _misspelt_sides() -> frozenset[str]:
    """What is one edit away from a side: a letter too few, too many or another, or two swapped."""
    found: set[str] = set()
    for side in _SWAP:
        for at in range(len(side) + 1):
            before, after = side[:at], side[at:]
            found |= {before + after[1:], before + after[1:2] + after[:1] + after[2:]}
            found |= {before + letter + after for letter in ascii_lowercase}
            found |= {before + letter + after[1:] for letter in ascii_lowercase}
    return frozenset(found - _SWAP.keys())


def _like(old: str, new: str) -> str:
    """`new` in the letter case of `old`."""
    return new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new


def flip(sample: Mapping) -> GroundingSample | None:
    """The mirrored sample; None if its words cannot be mirrored (`mirror_expression`).

    Image (its twin in the sibling folder `..._flip`), boxes and words are mirrored. Flipping twice
    gives the sample back. The image is not made here: `write_mirrored` does that.
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
    """The mirrored twins of the samples that have one.

    counts: if given, receives why the others have none.
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
