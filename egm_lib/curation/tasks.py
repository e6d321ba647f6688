"""The five curation tasks as data: prompt, marks drawn on the picture, reading of the answer,
filters, sampling.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from egm_lib.curation import filters, prompts
from egm_lib.data import open_image

CAUSES = ("COMPLEX-PROMPT", "AMBIGUOUS-IMAGE", "SMALL-OBJECT", "GT-ERROR", "OTHER")  # Table 1

LINE_WIDTH_PX = 5  # Fig. 8 [C]
# Larger pictures are sent smaller: services scale them down anyway, and charge for the bytes
MAX_SIDE_PX = 2048
JPEG_QUALITY = 90

# How far the whole object reaches beyond its visible part, as a share of the visible part's side.
# The thresholds are ours (the paper gives the words only) and those of the miniature world's
# language.
NEGLIGIBLE = 0.04
DEGREES = (
    (0.15, "slightly"),
    (0.3, "a bit"),
    (0.5, "moderately"),
    (0.8, "considerably"),
    (float("inf"), "significantly"),
)


class Mark(NamedTuple):
    """A box drawn on the picture; box: xyxy px, may leave the picture."""

    box: tuple[float, ...]
    colour: str
    label: str


@dataclass(frozen=True)
class Task:
    """What is asked of a service, and what counts as an answer.

    fill: values for the template; marks: boxes drawn; read: the answer in a reply's text, None
    where there is none.
    filters: (name, drop) pairs in order, the first that drops names the reason. needs: fields a
    sample must have.
    reply_tokens: a typical reply's length, for estimates before there are any answers.
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

    def prompt(self, sample: Mapping) -> str:
        return self.template.format(**self.fill(sample))

    @cached_property  # part of every request's key
    def prompt_version(self) -> str:
        """Changes with the template's wording and the drawing."""
        return _digest([self.template, LINE_WIDTH_PX, MAX_SIDE_PX, JPEG_QUALITY])[:12]


def request_key(task: Task, sample: Mapping, image: Path, model: str, sampling: Mapping) -> str:
    """What an answer in the ledger belongs to: 128 bits over everything that the service sees and
    is told.

    The prompt goes in as filled, so that a change of wording, thresholds or boxes makes a new key;
    the picture as its bytes and the marks drawn on it. Raises OSError where the picture cannot be
    read.
    """
    stat = image.stat()
    picture = [file_digest(str(image), stat.st_size, stat.st_mtime_ns), task.marks(sample)]
    asked = [
        task.name,
        task.prompt_version,
        task.prompt(sample),
        picture,
        sample["sample_id"],
        model,
        sampling,
    ]
    return _digest(asked)[:32]


@lru_cache(maxsize=65_536)  # RefCOCO's 24,407 pictures serve 575,208 samples
def file_digest(path: str, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file; size and time are there so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def messages(task: Task, sample: Mapping, image: Path) -> list[dict]:
    """Chat messages of one request: the marked picture as a data URL, then the prompt.

    Raises FileNotFoundError or egm_lib.data.pictures.PictureError, ValueError where the picture has
    another size than the sample says.
    """
    stat = image.stat()
    picture = _opened(str(image), stat.st_size, stat.st_mtime_ns)
    url = (
        "data:image/jpeg;base64,"
        + base64.b64encode(marked_jpeg(picture, task.marks(sample), sample)).decode()
    )
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": task.prompt(sample)},
    ]
    return [{"role": "user", "content": content}]


@lru_cache(maxsize=4)  # neighbouring samples share a picture, and decoding is most of the work
def _opened(path: str, size: int, mtime_ns: int) -> Image.Image:
    return open_image(path)


def marked_jpeg(picture: Image.Image, marks: list[Mark], sample: Mapping) -> bytes:
    """The picture with boxes drawn and labelled, as JPEG, its longer side at most MAX_SIDE_PX."""
    if picture.size != (sample["width"], sample["height"]):
        said, seen = (
            f"{sample['width']} x {sample['height']}",
            f"{picture.width} x {picture.height}",
        )
        raise ValueError(
            f"the record says {said} px, the picture has {seen}: boxes would be drawn in the wrong place"
        )
    scale = min(1.0, MAX_SIDE_PX / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(size) if scale < 1 else picture.copy()
    draw = ImageDraw.Draw(picture)
    for box, colour, label in marks:
        x1, y1, x2, y2 = (value * scale for value in box)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=LINE_WIDTH_PX)
        tag = _tag(label, colour)
        x, y = min(max(x1, 0), max(picture.width - tag.width, 0)), max(y1 - tag.height, 0)
        picture.paste(tag, (round(x), round(y)))
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=JPEG_QUALITY)
    return file.getvalue()


@lru_cache(maxsize=16)  # drawn once for all pictures: text costs more than the boxes
def _tag(label: str, colour: str) -> Image.Image:
    """A mark's label, white on its colour."""
    font = ImageFont.load_default(size=12)
    _, _, right, bottom = font.getbbox(label)
    tag = Image.new("RGB", (round(right) + 1, round(bottom) + 2), colour)
    ImageDraw.Draw(tag).text((0, 0), label, fill="white", font=font)
    return tag


def extensions(
    modal_box: tuple[float, ...], amodal_box: tuple[float, ...]
) -> list[tuple[str, str]]:
    """(direction, degree word) for every side on which the whole object reaches beyond its visible
    part.

    Boxes xyxy px. The degree is the extra length over the visible part's width or height, cut at
    DEGREES; up to NEGLIGIBLE a side counts as complete.
    """
    width, height = modal_box[2] - modal_box[0], modal_box[3] - modal_box[1]
    shares = (
        ("upward", (modal_box[1] - amodal_box[1]) / height),
        ("downward", (amodal_box[3] - modal_box[3]) / height),
        ("to the left", (modal_box[0] - amodal_box[0]) / width),
        ("to the right", (amodal_box[2] - modal_box[2]) / width),
    )
    return [
        (direction, next(word for limit, word in DEGREES if share <= limit))
        for direction, share in shares
        if share > NEGLIGIBLE
    ]


def directions(sample: Mapping) -> str:
    """`{directions}` of the amodal trace prompt, e.g. "downward considerably, to the left a
    bit".
    """
    found = [
        f"{direction} {degree}"
        for direction, degree in extensions(sample["modal_box"], sample["gt_box"])
    ]
    return ", ".join(found) or "in no direction, it is entirely visible"


def _box_999(box: tuple[float, ...], sample: Mapping) -> str:
    sides = (sample["width"], sample["height"]) * 2
    return str([round(value / side * 999) for value, side in zip(box, sides, strict=True)])


def _box_px(box: tuple[float, ...] | None) -> str:
    return (
        "none: the answer held no box"
        if box is None
        else "[" + ", ".join(f"{value:g}" for value in box) + "]"
    )


def _text(reply: str) -> str | None:
    return " ".join(reply.split()) or None


def _expression(reply: str) -> str | None:
    return " ".join(reply.split()).strip("\"'`“” ").removesuffix(".").lower() or None


def _yes_or_no(reply: str) -> str | None:
    found = re.fullmatch(r"\W*(yes|no)\b\W*", reply.strip(), re.IGNORECASE)
    return found and found[1].upper()


def _cause(reply: str) -> str | None:
    """The one category that a reply names; None where it names none or several."""
    named = {
        cause for cause in CAUSES if re.search(rf"\b{cause.replace('-', '[-_ ]')}\b", reply.upper())
    }
    return named.pop() if len(named) == 1 else None


_SAMPLE = ("sample_id", "image", "width", "height", "expression", "gt_box")
_DEFECTS = (
    ("refusal", filters.refusal),
    ("truncated", filters.truncated),
    ("empty", filters.empty),
)
_MARKS_SEEN = (
    ("mentions-drawn-box", filters.mentions_drawn_box),
    ("names-ground-truth", filters.names_ground_truth),
)

TASKS = {
    task.name: task
    for task in (
        Task(
            "trace",
            prompts.TRACE,
            _SAMPLE,
            fill=lambda s: {"expression": s["expression"], "gt_box": _box_999(s["gt_box"], s)},
            marks=lambda s: [Mark(s["gt_box"], "green", "Ground Truth")],
            read=_text,
            filters=(
                *_DEFECTS,
                *_MARKS_SEEN,
                ("coordinates", filters.coordinates),
                ("too-many-sentences", filters.more_sentences_than(2)),
            ),
            temperature=0.7,
            max_tokens=800,
            reply_tokens=60,  # [C]
        ),
        Task(
            "amodal-expression",
            prompts.AMODAL_EXPRESSION,
            _SAMPLE,
            fill=lambda s: {"name": s["expression"]},
            marks=lambda s: [Mark(s["gt_box"], "green", "TARGET")],
            read=_expression,
            filters=(
                *_DEFECTS,
                *_MARKS_SEEN,
                ("coordinates", filters.coordinates),
                ("too-many-sentences", filters.more_sentences_than(1)),
            ),
            temperature=0.7,
            max_tokens=800,
            reply_tokens=15,
        ),
        Task(
            "verify",
            prompts.VERIFY,
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
            max_tokens=1024,
            reply_tokens=2,  # room for models that think before their one word
        ),
        Task(
            "amodal-trace",
            prompts.AMODAL_TRACE,
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
                *_MARKS_SEEN,
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
        Task(
            "failure",
            prompts.FAILURE,
            (*_SAMPLE, "box"),
            fill=lambda s: {
                **{name: s[name] for name in ("expression", "width", "height")},
                "gt_box_px": _box_px(s["gt_box"]),
                "pred_box_px": _box_px(s["box"]),
                "prediction_drawn": ', the model\'s in red, labelled "Prediction"'
                if s["box"]
                else "",
            },
            marks=lambda s: [
                Mark(s["gt_box"], "green", "Ground Truth"),
                *([Mark(s["box"], "red", "Prediction")] if s["box"] else []),
            ],
            read=_cause,
            filters=(*_DEFECTS, ("unreadable-verdict", filters.no_answer)),
            temperature=0.0,
            max_tokens=1024,
            reply_tokens=6,
        ),
    )
}
