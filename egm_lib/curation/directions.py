"""In which directions, and how far, an amodal box leaves its modal box (Fig. 11)."""

from __future__ import annotations

from collections.abc import Mapping

# How far the whole object reaches beyond its visible part, as a share of the visible part's side.
# The thresholds are ours, as the paper gives the words only. The miniature's language shares them.
NEGLIGIBLE = 0.04
DEGREES = (
    (0.15, "slightly"),
    (0.3, "a bit"),
    (0.5, "moderately"),
    (0.8, "considerably"),
    (float("inf"), "significantly"),
)


def extensions(
    modal_box: tuple[float, ...], amodal_box: tuple[float, ...]
) -> list[tuple[str, str]]:
    """(direction, degree) for every side on which the object reaches beyond its visible part.

    Boxes are xyxy px. The degree is the word of DEGREES for the extra length as a share of the
    visible part's width or height. A side with a share up to NEGLIGIBLE counts as complete.
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
    """`{directions}` of the amodal trace prompt: "downward considerably, to the left a bit"."""
    found = [
        f"{direction} {degree}"
        for direction, degree in extensions(sample["modal_box"], sample["gt_box"])
    ]
    return ", ".join(found) or "in no direction, it is entirely visible"
