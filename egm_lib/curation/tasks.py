"""The five curation tasks as data: prompt, marks, reading of the answer, filters, sampling."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from egm_lib.curation import filters, templates
from egm_lib.curation.directions import directions, extensions
from egm_lib.curation.marks import (
    JPEG_QUALITY,
    LINE_WIDTH_PX,
    MAX_SIDE_PX,
    Mark,
    marked_jpeg,
    opened,
)
from egm_lib.files import digest, file_digest, writable
from egm_lib.parsing import last_answer, split_reasoning

CAUSES = ("COMPLEX-PROMPT", "AMBIGUOUS-IMAGE", "SMALL-OBJECT", "GT-ERROR", "OTHER")  # Table 1
_END_TOKENS = re.compile(r"(?:\s*(?:<\|\w{1,40}\|>|</s>|<eos>|<end_of_turn>))+\s*\Z")


@dataclass(frozen=True)
class CurationTask:
    """What is asked of a service, and what counts as an answer.

    needs: fields that a sample must have. fill: values for the template. marks: boxes to draw.
    read: the answer in a reply's text, None if there is none. filters: (name, drop) pairs in
    order; the first that drops gives the reason.
    temperature, max_tokens: defaults of the command line; a profile's service has its own.
    fixed_temperature: the temperature of this task whatever the service's is, None: the service's.
    reply_tokens: length of a typical reply, for estimates before there are any answers.
    """

    name: str
    template: str
    needs: tuple[str, ...]
    fill: Callable[[Mapping], dict]
    marks: Callable[[Mapping], list[Mark]]
    read: Callable[[str], str | None]
    filters: tuple[tuple[str, filters.Filter], ...]
    temperature: float
    max_tokens: int
    reply_tokens: int
    fixed_temperature: float | None = None

    def prompt(self, sample: Mapping) -> str:
        return self.template.format(**self.fill(sample))

    @cached_property
    def prompt_version(self) -> str:
        """Part of every request's key: changes with the wording of the template and the drawing."""
        return digest([self.template, LINE_WIDTH_PX, MAX_SIDE_PX, JPEG_QUALITY])[:12]


def request_key(
    task: CurationTask, sample: Mapping, image: Path, model: str, sampling: Mapping
) -> str:
    """Identifies a request: 128 bits over everything that the service sees and is told.

    The prompt enters as it is filled in, so that a change of wording, thresholds or boxes makes a
    new key. The image enters as its bytes and the marks drawn on it. Raises OSError if the image
    cannot be read.
    """
    stat = image.stat()
    seen = [_image_digest(str(image), stat.st_size, stat.st_mtime_ns), task.marks(sample)]
    asked = [
        task.name,
        task.prompt_version,
        task.prompt(sample),
        seen,
        sample["sample_id"],
        model,
        sampling,
    ]
    return digest(asked)[:32]


@lru_cache(maxsize=65_536)  # RefCOCO's 24,407 images serve 575,208 samples
def _image_digest(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and time are arguments so that a changed file is read again."""
    return file_digest(Path(path))


def messages(task: CurationTask, sample: Mapping, image: Path) -> list[dict]:
    """Chat messages of one request: the marked image as a data URL, then the prompt.

    Raises FileNotFoundError or egm_lib.data.images.ImageError where the image cannot be read, and
    ValueError where its size is not the sample's.
    """
    stat = image.stat()
    unmarked = opened(str(image), stat.st_size, stat.st_mtime_ns)
    url = (
        "data:image/jpeg;base64,"
        + base64.b64encode(marked_jpeg(unmarked, task.marks(sample), sample)).decode()
    )
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": writable(task.prompt(sample))},
    ]
    return [{"role": "user", "content": content}]


def _box_999(box: tuple[float, ...], sample: Mapping) -> str:
    sides = (sample["width"], sample["height"]) * 2
    return str([round(value / side * 999) for value, side in zip(box, sides, strict=True)])


def _box_px(box: tuple[float, ...] | None) -> str:
    return (
        "none: the answer held no box"
        if box is None
        else "[" + ", ".join(f"{value:g}" for value in box) + "]"
    )


def after_thinking(reply: str) -> str:
    """What follows the reasoning of a model that thinks within its reply; "" where nothing does.

    Of an answer in <answer> tags it is what they hold. A token that ends an answer is none of its
    words, though some servers send it.
    """
    _, start = split_reasoning(reply)
    return "" if start is None else _END_TOKENS.sub("", last_answer(reply[start:])).strip()


def _text(reply: str) -> str | None:
    return " ".join(after_thinking(reply).split()) or None


def _expression(reply: str) -> str | None:
    words = " ".join(after_thinking(reply).split())
    return words.strip("\"'`“” .").lower() or None


def _yes_or_no(reply: str) -> str | None:
    found = re.fullmatch(r"\W*(yes|no)\b\W*", after_thinking(reply), re.IGNORECASE)
    return found and found[1].upper()


def _cause(reply: str) -> str | None:
    """The one category that a reply names; None if it names none or several."""
    text = after_thinking(reply)
    named = {
        cause
        for cause in CAUSES
        if re.search(rf"\b{cause.replace('-', '[-_ ]')}\b", text, re.IGNORECASE)
    }
    if len(named) > 1 and not re.search(r"\bOTHER\b", text):  # "the other zebra" names none
        named.discard("OTHER")
    return named.pop() if len(named) == 1 else None


def _drawn(box: tuple[float, ...] | None) -> bool:
    """Whether a predicted box can be drawn: not without a box, nor with an empty one."""
    return box is not None and box[0] < box[2] and box[1] < box[3]


_SAMPLE = ("sample_id", "image", "width", "height", "expression", "gt_box")
_DEFECTS = (
    ("refusal", filters.refusal),
    ("truncated", filters.truncated),
    ("unfinished", filters.unfinished),
    ("empty", filters.empty),
)
# Of texts that are trained on
_UNFIT = (
    ("garbled", filters.garbled),
    ("mentions-drawn-box", filters.mentions_drawn_box),
    ("names-ground-truth", filters.names_ground_truth),
)

TASKS = {
    task.name: task
    for task in (
        CurationTask(
            "trace",
            templates.TRACE,
            _SAMPLE,
            fill=lambda s: {"expression": s["expression"], "gt_box": _box_999(s["gt_box"], s)},
            marks=lambda s: [Mark(s["gt_box"], "green", "Ground Truth")],
            read=_text,
            filters=(
                *_DEFECTS,
                *_UNFIT,
                ("coordinates", filters.coordinates),
                ("too-many-sentences", filters.more_sentences_than(2)),
            ),
            temperature=0.7,  # Fig. 8 [C]
            max_tokens=800,  # Fig. 8 [C]
            reply_tokens=60,
        ),
        CurationTask(
            "amodal-expression",
            templates.AMODAL_EXPRESSION,
            _SAMPLE,
            fill=lambda s: {"name": s["expression"]},
            marks=lambda s: [Mark(s["gt_box"], "green", "TARGET")],
            read=_expression,
            filters=(
                *_DEFECTS,
                *_UNFIT,
                ("coordinates", filters.coordinates),
                ("too-many-sentences", filters.more_sentences_than(1)),
            ),
            temperature=0.7,
            max_tokens=800,
            reply_tokens=15,
        ),
        CurationTask(
            "verify",
            templates.VERIFY,
            _SAMPLE,
            fill=lambda s: {"expression": s["expression"]},
            marks=lambda s: [Mark(s["gt_box"], "green", "TARGET")],
            read=_yes_or_no,
            filters=(
                *_DEFECTS,
                ("unreadable-verdict", filters.no_answer),
                ("rejected", filters.rejected),
            ),
            temperature=0.0,
            max_tokens=1024,  # room for models that think before their one word
            reply_tokens=2,
            fixed_temperature=0.0,  # a verdict is no text to sample; the teacher's 0.7 is for texts
        ),
        CurationTask(
            "amodal-trace",
            templates.AMODAL_TRACE,
            (*_SAMPLE, "modal_box"),
            fill=lambda s: {
                "expression": s["expression"],
                "gt_box": _box_999(s["gt_box"], s),
                "modal_box": _box_999(s["modal_box"], s),
                "directions": directions(s),
            },
            marks=lambda s: [
                Mark(s["gt_box"], "green", "Complete"),
                Mark(s["modal_box"], "blue", "Visible"),
            ],
            read=_text,
            filters=(
                *_DEFECTS,
                *_UNFIT,
                ("coordinates", filters.coordinates),
                ("image-boundary", filters.image_boundary),
                ("too-many-sentences", filters.more_sentences_than(5)),
                (
                    "wrong-direction",
                    lambda r, s: filters.wrong_direction(
                        r, extensions(s["modal_box"], s["gt_box"])
                    ),
                ),
            ),
            temperature=0.7,
            max_tokens=800,
            reply_tokens=110,
        ),
        CurationTask(
            "failure",
            templates.FAILURE,
            (*_SAMPLE, "box"),
            fill=lambda s: {
                **{name: s[name] for name in ("expression", "width", "height")},
                "gt_box_px": _box_px(s["gt_box"]),
                "pred_box_px": _box_px(s["box"]),
                "prediction_drawn": ', the model\'s in red, labelled "Prediction"'
                if _drawn(s["box"])
                else "",
            },
            marks=lambda s: [
                Mark(s["gt_box"], "green", "Ground Truth"),
                *([Mark(s["box"], "red", "Prediction")] if _drawn(s["box"]) else []),
            ],
            read=_cause,
            filters=(*_DEFECTS, ("unreadable-verdict", filters.no_answer)),
            temperature=0.0,
            max_tokens=1024,
            reply_tokens=6,
        ),
    )
}
