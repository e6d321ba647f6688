"""Why an answer is dropped: pure, named functions of a reply and its sample.

True means drop. They read what the ledger holds, so running them again costs nothing.
`tasks.TASKS` says which filters a task uses and in which order; a profile may skip some by name.
The mini profile skips "coordinates" and "too-many-sentences": its traces list places as bare
integers from 0 to 1000, in one short sentence a step, because its small vocabulary has no finer way
to say where things are (docs/deviations.md, 13).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from egm_lib.curation.replies import DECLINED
from egm_lib.prompts import quoted_tag


@dataclass(frozen=True)
class TeacherReply:
    """One reply of a service, without its reasoning.

    answer: what the task's reader found in the text.
    """

    text: str
    finish_reason: str | None = "stop"
    refusal: str | None = None
    answer: str | None = None


Filter = Callable[[TeacherReply, Mapping], bool]


def _pattern(*alternatives: str) -> re.Pattern:
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


_REFUSAL = re.compile(
    r"""\s*(?:(?:i['’]?m|i\ am)\ (?:very\ |so\ )?sorry | sorry\b | i\ apologi[sz]e
    | unfortunately,?\ i\b | as\ an\ ai\b
    | (?:i|we)\ (?:can['’]?t | can\ ?not | am\ (?:un|not\ )able\ to | won['’]?t | will\ not) \b
    | (?:i|we)['’](?:m|re)\ (?:un|not\ )able\ to)""",
    re.IGNORECASE | re.VERBOSE,
)

_TOKEN = re.compile(r"<\|[^|<>\s]{1,40}\|>|</?s>|<(?:bos|eos|pad|unk|start_of_turn|end_of_turn)>")
_LOST = re.compile(r"[\ufffd\x00-\x08\x0e-\x1f\x7f]")

_FRAME = r"(?:box(?:es)?|rectangles?|outlines?|frames?|borders?|contours?)"
_PASSIVE = r"(?:marked|highlighted|outlined|boxed|enclosed|circled|annotated|framed|labell?ed)"
_DRAWN = _pattern(
    rf"bounding[- ]?{_FRAME}",
    "bbox(?:es)?",
    rf"green[- ](?:\w+ )?(?:{_FRAME}|mark|marker|marking|highlight(?:ing|ed)?"
    "|outlined|boxed|framed|lines?)",
    "blue (?:box|rectangle|outline)",
    "(?:drawn|marked|labell?ed|target|annotated|annotation|highlighted|given|provided|indicated)"
    f" {_FRAME}",
    rf"{_PASSIVE} (?:in|with|by) (?:a |an |the )?(?:\w+ )?(?:green|{_FRAME})",
    "the (?:marked|highlighted|outlined|boxed|annotated)"
    " (?:object|region|area|one|person|man|woman|item|part)",
    "(?:object|region|area|one) (?:that is |which is |is )?"
    "(?:marked|highlighted|outlined|boxed|annotated)",
    rf"{_FRAME} labell?ed",
)
# Means the drawn box, unless the scene has a thing that is a box or a frame
_SOME_BOX = _pattern(
    r"(?:inside|within|by|in|from) (?:the|this|that) (?:box|rectangle)",
    "(?:the|this|that) (?:box|rectangle)"
    " (?:is|shows|marks|covers|indicates|surrounds|encloses|contains|around)",
    r"(?:box|rectangle|mark|outline) (?:drawn|around (?:the|it|him|her|them))",
)
_IS_BOX = _pattern(_FRAME)

_GIVEN = r"(?:given|provided|known|stated|supplied)"
_ANSWER = r"(?:location|position|answer|region|coordinates|annotation)"
_GROUND_TRUTH = _pattern(
    "ground[- ]?truth",
    "gt box",
    rf"{_GIVEN} {_ANSWER}",
    rf"(?:{_ANSWER}|target|object) (?:(?:that )?(?:is|was|are|were)|ha(?:s|ve) been)"
    rf" (?:already )?{_GIVEN}",
    "as (?:given|provided|indicated|annotated)",
    "the target (?:object|box|region|mark)",
    f"already {_GIVEN}",
    r"(?:we|i) (?:are|am|were|was) (?:told|given)",
)

_NUMBER = r"-?\d+(?:\.\d+)?"
_COORDINATES = re.compile(
    rf"""[\[(<]\s*{_NUMBER}(?:\s*[,;]\s*{_NUMBER})+\s*[\])>]    # [1, 2] or (1, 2, 3, 4)
    | \b\d{{1,4}}(?:\s*,\s*\d{{1,4}}){{3}}\b                    # four bare numbers
    | \b\d{{2,4}}\s+\d{{2,4}}\b                                 # at 825 300
    | \b(?:pixels?|coordinates?|[xy]-axis|[xy][12]?[- ](?:coordinate|value)s?)\b | \b\d+\s?px\b
    | \b[xy][12]?\s*(?:=|≈|~)\s*{_NUMBER}""",
    re.IGNORECASE | re.VERBOSE,
)

_IMAGE_WORD = r"(?:image|picture|photo|photograph|frame|scene|canvas)"
_LIMIT = r"(?:boundary|boundaries|borders?|edges?|limits?)"
_BOUNDARY = _pattern(
    rf"{_IMAGE_WORD}(?:['’]s)?(?: \w+)? {_LIMIT}",
    rf"{_LIMIT} of the {_IMAGE_WORD}",
    rf"(?:beyond|outside|out of|past|leav(?:es|ing)) (?:of )?(?:the )?{_IMAGE_WORD}",
)

_SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bNo)[.!?…]+[\"'”’)]*(?=\s+\S|$)"
)

_EXTENDS = re.compile(
    r"\b(?:extend|continu|reach|stretch|go|run)(?:s|es|ing|ed|e)?\b", re.IGNORECASE
)
_WORD = re.compile(r"[\w-]+|[.;:]")
_DIRECTION_WORDS = {
    **dict.fromkeys(("upward", "upwards", "up", "top"), "upward"),
    **dict.fromkeys(("downward", "downwards", "down", "bottom"), "downward"),
    **dict.fromkeys(("left", "leftward", "leftwards"), "to the left"),
    **dict.fromkeys(("right", "rightward", "rightwards"), "to the right"),
}
# What may stand between the verb and the direction
_BETWEEN = frozenset(
    [
        "further",
        "also",
        "out",
        "slightly",
        "a",
        "bit",
        "moderately",
        "considerably",
        "significantly",
        "and",
        "both",
        "to",
        "toward",
        "towards",
        "the",
        "by",
        "about",
        "from",
        "its",
        "visible",
        "part",
        "object",
        "whole",
        "it",
        "this",
        "of",
    ]
)


def refusal(reply: TeacherReply, sample: Mapping) -> bool:
    """The service declined: in its own field, by its filter, or in a text that apologises."""
    return (
        bool(reply.refusal)
        or (reply.finish_reason or "").lower() in DECLINED
        or bool(_REFUSAL.match(reply.text))
    )


def truncated(reply: TeacherReply, sample: Mapping) -> bool:
    """The answer ended at the token limit."""
    return reply.finish_reason == "length"


def unfinished(reply: TeacherReply, sample: Mapping) -> bool:
    """The answer ended for any reason but its own end, which is "stop", and the token limit."""
    return reply.finish_reason not in ("stop", "length")


def garbled(reply: TeacherReply, sample: Mapping) -> bool:
    """Holds what must not be trained on as words: a tag of reasoning or answers, a token of a chat
    template, or a sign of lost characters.
    """
    text = reply.answer or ""
    return bool(quoted_tag(text) or _TOKEN.search(text) or _LOST.search(text))


def empty(reply: TeacherReply, sample: Mapping) -> bool:
    """Nothing but white space and punctuation."""
    return not re.search(r"\w", reply.text)


def mentions_drawn_box(reply: TeacherReply, sample: Mapping) -> bool:
    """Speaks of the drawn box, its label or its colour as a mark.

    A thing of the scene that is itself a box is no mention.
    """
    expression = sample["expression"].lower()
    if (
        any(match[0].lower() not in expression for match in _DRAWN.finditer(reply.text))
        or "TARGET" in reply.text
    ):
        return True
    return bool(_SOME_BOX.search(reply.text)) and not _IS_BOX.search(expression)


def names_ground_truth(reply: TeacherReply, sample: Mapping) -> bool:
    """Treats the answer as given instead of finding it."""
    return bool(_GROUND_TRUTH.search(reply.text))


def coordinates(reply: TeacherReply, sample: Mapping) -> bool:
    """Coordinates or pixel values."""
    return bool(_COORDINATES.search(reply.text))


def image_boundary(reply: TeacherReply, sample: Mapping) -> bool:
    """Speaks of the image's own border (Fig. 11 forbids it: a whole object may lie beyond)."""
    return bool(_BOUNDARY.search(reply.text))


def count_sentences(text: str) -> int:
    """Sentences by their ends; a last one without a full stop counts."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(re.search(r"\w", rest))


def more_sentences_than(limit: int) -> Filter:
    """Filter that drops answers of more than `limit` sentences."""
    return lambda reply, sample: count_sentences(reply.text) > limit


def no_answer(reply: TeacherReply, sample: Mapping) -> bool:
    """The text does not hold what was asked for: YES or NO, or exactly one category."""
    return reply.answer is None


def rejected(reply: TeacherReply, sample: Mapping) -> bool:
    """Verification says that the expression does not identify the object."""
    return reply.answer == "NO"


def wrong_direction(reply: TeacherReply, extensions: list[tuple[str, str]]) -> bool:
    """An amodal trace that names a wrong direction, or none although there is one.

    extensions: (direction, degree) pairs of `directions.extensions`.
    """
    wanted, named = {direction for direction, _ in extensions}, named_directions(reply.text)
    return bool(named - wanted) or bool(wanted and not named)


def named_directions(text: str) -> set[str]:
    """Directions in which a trace says that the object extends.

    "upward", "leftward" and the like count anywhere. "left", "right", "top" and the like also say
    where things are, so they count only after a verb of extending, with nothing but filling words
    between.
    """
    named = {
        _DIRECTION_WORDS[word]
        for word in re.findall(r"\b(?:up|down|left|right)wards?\b", text.lower())
    }
    for verb in _EXTENDS.finditer(text):
        for word in _WORD.findall(text[verb.end() :].lower()):
            if word in _DIRECTION_WORDS:
                named.add(_DIRECTION_WORDS[word])
            elif word not in _BETWEEN:
                break
    return named
