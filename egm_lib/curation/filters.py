"""Why an answer is dropped: pure, named functions of a reply (and its sample), so that they can be re-run for nothing.

True means drop. Which filters a task uses, and in which order, stands in `tasks.TASKS`; a profile may leave some out by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reply:
    """One reply of a service as the ledger keeps it; answer: what the task's reader found in its text."""

    text: str
    finish_reason: str | None = "stop"
    refusal: str | None = None
    answer: str | None = None


Filter = Callable[[Reply, Mapping], bool]

_REFUSAL = re.compile(
    r"\s*(i['’]?m\s+(very\s+|so\s+)?sorry|sorry\b|i\s+apologi[sz]e|unfortunately,?\s+i\b"
    r"|(i|we)\s+(can['’]?t|cannot|can not|am unable to|['’]?m unable to|won['’]?t|will not|am not able to|['’]?m not able to)\s+"
    r"(help|assist|comply|identify|provide|answer|do|fulfil|describe|determine|see|view|process|complete|continue)"
    r"|as an ai\b)",
    re.IGNORECASE,
)

_COLOURS = r"(?:green|blue|red)"
_FRAME = r"(?:box|boxes|rectangle|outline|outlines|frame|border|borders|contour|bbox)"
_DRAWN_BOX = re.compile(
    rf"\b(?:bounding[- ]?{_FRAME}|bbox(?:es)?|"
    rf"{_COLOURS}[- ](?:\w+ )?{_FRAME}|{_COLOURS}[- ](?:mark|marking|marker|highlight|highlighting|highlighted|outlined|boxed|framed|lines?)|"
    rf"(?:drawn|marked|marking|labell?ed|target|annotated|annotation|highlighted|highlighting|given|provided|indicated) {_FRAME}|"
    rf"(?:inside|within|enclosed (?:by|in)|surrounded by|contained in|covered by|in) (?:the|this|that) (?:box|rectangle|bbox)|"
    rf"(?:marked|highlighted|outlined|boxed|enclosed|circled|annotated|framed)(?: (?:\w+ )?(?:in|with|by)) (?:a |an |the )?(?:\w+ )?(?:{_COLOURS}|{_FRAME})\b|"
    rf"(?:the|this|that) (?:box|rectangle) (?:is|shows|marks|covers|indicates|surrounds|encloses|contains|labell?ed|drawn|around)|"
    rf"(?:box|rectangle|mark|outline) (?:drawn|labell?ed|around (?:the|it|him|her|them))|"
    r"(?:the|is|are|object|region|area|one|already|been) (?:marked|highlighted|outlined|annotated|boxed)\b(?! by (?:its|the|his|her)))",
    re.IGNORECASE,
)

_GROUND_TRUTH = re.compile(
    r"\b(?:ground[- ]?truth|gt box|(?:given|provided|known|stated|supplied|correct) (?:location|position|answer|region|coordinates|target|annotation)|"
    r"(?:location|position|answer|region|coordinates|target|object) (?:is|was|are|were|has been|have been|that (?:is|was)) (?:already )?(?:given|provided|known|supplied)|"
    r"as (?:given|provided|indicated|annotated|marked)|the target (?:object|box|region|mark)|already (?:given|known)|"
    r"(?:we|i) (?:are|am|were|was) (?:told|given))\b",
    re.IGNORECASE,
)

_NUMBER = r"-?\d+(?:\.\d+)?"
_COORDINATES = re.compile(
    rf"[\[(<]\s*{_NUMBER}(?:\s*[,;]\s*{_NUMBER})+\s*[\])>]|"  # [1, 2], (1, 2, 3, 4)
    rf"\b\d{{1,4}}(?:\s*,\s*\d{{1,4}}){{3}}\b|"  # four bare numbers
    rf"\b\d{{2,4}}\s+\d{{2,4}}\b(?!\s*(?:people|persons|men|women|years?))|"  # at 825 300
    r"\b(?:pixels?|coordinates?|x-axis|y-axis|[xy][12]?[- ]?(?:coordinate|value))\b|"
    rf"\b\d+\s?px\b|\b[xyXY][12]?\s*(?:=|≈|~|of about|around)\s*{_NUMBER}",
    re.IGNORECASE,
)

_BOUNDARY = re.compile(
    r"\b(?:(?:image|picture|photo|photograph|frame|scene|canvas)(?:['’]s)?(?: \w+)? (?:boundary|boundaries|border|borders|edge|edges|limits?)|"
    r"(?:boundary|boundaries|border|borders|edge|edges|limits?) of the (?:image|picture|photo|photograph|frame|canvas)|"
    r"(?:beyond|outside|out of|past|leaves|leaving) (?:of )?(?:the )?(?:image|picture|photo|photograph|frame|canvas))\b",
    re.IGNORECASE,
)

_SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bNo)[.!?…]+[\"'”’)]*(?=\s+\S|$)")

_EXTENDS = re.compile(r"\b(?:extend|continu|reach|stretch|go|run)(?:s|es|ing|ed|e)?\b", re.IGNORECASE)
_WORD = re.compile(r"[\w-]+|[.;:]")
_DIRECTION_WORDS = {
    **dict.fromkeys(("upward", "upwards", "up", "top"), "upward"),
    **dict.fromkeys(("downward", "downwards", "down", "bottom"), "downward"),
    **dict.fromkeys(("left", "leftward", "leftwards"), "to the left"),
    **dict.fromkeys(("right", "rightward", "rightwards"), "to the right"),
}
_BETWEEN = frozenset(
    ["further", "also", "out", "slightly", "a", "bit", "moderately", "considerably", "significantly", "and", "both", "to", "toward", "towards", "the", "by", "about", "from", "its", "visible", "part", "object", "box", "whole", "it", "this", "of"]
)  # what may stand between verb and direction


def refusal(reply: Reply, sample: Mapping) -> bool:
    """The service declined: its own field, its content filter, or an answer that opens with an apology."""
    return bool(reply.refusal) or reply.finish_reason == "content_filter" or bool(_REFUSAL.match(reply.text))


def truncated(reply: Reply, sample: Mapping) -> bool:
    """The answer ended at the token limit."""
    return reply.finish_reason == "length"


def empty(reply: Reply, sample: Mapping) -> bool:
    """Nothing but white space and punctuation."""
    return not re.search(r"\w", reply.text)


def mentions_drawn_box(reply: Reply, sample: Mapping) -> bool:
    """Speaks of the drawn box, its label or its colour as a mark; a thing that is itself a box is no mention."""
    return bool(_DRAWN_BOX.search(reply.text)) or ("TARGET" in reply.text and "TARGET" not in sample["expression"])


def names_ground_truth(reply: Reply, sample: Mapping) -> bool:
    """Treats the answer as given instead of finding it."""
    return bool(_GROUND_TRUTH.search(reply.text))


def coordinates(reply: Reply, sample: Mapping) -> bool:
    """Coordinates or pixel values."""
    return bool(_COORDINATES.search(reply.text))


def image_boundary(reply: Reply, sample: Mapping) -> bool:
    """Speaks of the picture's own border (Fig. 11 forbids it: a whole object may lie beyond)."""
    return bool(_BOUNDARY.search(reply.text))


def count_sentences(text: str) -> int:
    """Sentences by their ends; a last one without a full stop counts."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    rest = text[ends[-1] :] if ends else text
    return len(ends) + bool(re.search(r"\w", rest))


def more_sentences_than(limit: int) -> Filter:
    """Filter that drops answers of more than `limit` sentences."""
    return lambda reply, sample: count_sentences(reply.text) > limit


def no_answer(reply: Reply, sample: Mapping) -> bool:
    """The text does not hold what was asked for: YES or NO, or exactly one category."""
    return reply.answer is None


def rejected(reply: Reply, sample: Mapping) -> bool:
    """Verification says that the expression does not identify the object."""
    return reply.answer == "NO"


def wrong_direction(reply: Reply, extensions: list[tuple[str, str]]) -> bool:
    """An amodal trace that names a direction in which the object does not extend, or none of those in which it does.

    extensions: (direction, degree) pairs of `tasks.extensions`.
    """
    wanted, named = {direction for direction, _ in extensions}, named_directions(reply.text)
    return bool(named - wanted) or bool(wanted and not named)


def named_directions(text: str) -> set[str]:
    """Directions in which a trace says that the object extends.

    "upward", "leftward" and the like count anywhere; "left", "right", "top" and the like only behind a verb of extending
    with nothing but filling words between, since they also say where things are.
    """
    named = {_DIRECTION_WORDS[word] for word in re.findall(r"\b(?:up|down|left|right)wards?\b", text.lower())}
    for verb in _EXTENDS.finditer(text):
        for word in _WORD.findall(text[verb.end() :].lower()):
            if word in _DIRECTION_WORDS:
                named.add(_DIRECTION_WORDS[word])
            elif word not in _BETWEEN:
                break
    return named
