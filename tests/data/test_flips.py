"""Flips: a mirrored sample means the same object, or there is none."""

import re
from collections import Counter

import pytest

from egm_lib.data import flip
from egm_lib.data.flips import flip_all, mirror_expression
from egm_lib.data.records import rows_to_dataset


def sample(expression, **changes):
    return (
        dict(
            sample_id="s0",
            dataset="refcoco",
            split="train",
            task="vanilla",
            image="images/train2014/a.jpg",
            width=640,
            height=480,
            expression=expression,
            gt_box=[1.5, 2.0, 300.25, 400.0],
            modal_box=None,
            image_id="7",
            ann_id=None,
            ref_id=None,
            flipped=False,
            prompt_kind=None,
            num_lookalikes=None,
        )
        | changes
    )


SWAPPED = [
    ("left man", "right man"),
    ("second from left", "second from right"),
    ("2nd from left", "2nd from right"),
    ("Leftmost, the one on the RIGHT", "Rightmost, the one on the LEFT"),
    ("left-hand side", "right-hand side"),
    ("upper left corner", "upper right corner"),
    ("top-left", "top-right"),
    ("bottomright cow", "bottomleft cow"),
    ("far rightest", "far leftest"),
    ("woman on right in blue", "woman on left in blue"),  # "in" after a certain side
    ("man on the left by the tree", "man on the right by the tree"),
    ("man who is left of the dog", "man who is right of the dog"),
    ("kid facing right", "kid facing left"),  # a direction is mirrored too
    ("his left arm", "his right arm"),  # and so is a body
    ("right-handed batter", "left-handed batter"),
    ("red apple", "red apple"),
    ("bright upright piano", "bright upright piano"),  # contain "right"
    ("leftover pizza", "leftover pizza"),
]
DOUBTFUL = [
    "the man who left the room",  # verb
    "the slice that is left",  # remaining
    "last piece left",
    "pizza slice left on plate",
    "what is left of the cake",
    "girl right behind the man",  # exactly
    "cup right next to the plate",
    "chair right in front",
    "person at 3 o'clock",
    "man on rt",
    "l side",
    "leftright thing",  # no word we know
]


@pytest.mark.parametrize(("expression", "mirrored"), SWAPPED)
def test_sides_change_places_and_back(expression, mirrored):
    assert mirror_expression(expression) == mirrored
    assert mirror_expression(mirrored) == expression


@pytest.mark.parametrize("expression", DOUBTFUL)
def test_what_cannot_be_told_is_not_mirrored(expression):
    assert mirror_expression(expression) is None and flip(sample(expression)) is None


def test_a_mirrored_expression_would_not_be_misread():
    # "left next to" is a place, but "right next to" would not be read as one
    assert mirror_expression("man left next to tree") is None


def test_flip_mirrors_image_boxes_and_words():
    before = sample(
        "left dog",
        task="amodal",
        gt_box=[-20.0, 2.0, 300.25, 400.0],
        modal_box=[0.0, 2.0, 100.0, 50.0],
    )
    after = flip(before)
    assert after["gt_box"] == [339.75, 2, 660, 400] and after["modal_box"] == [540, 2, 640, 50]
    assert (after["expression"], after["flipped"]) == ("right dog", True)
    assert after["image"] != before["image"] and after["sample_id"] != before["sample_id"]
    assert after["image_id"] == before["image_id"]  # the same image, for leakage
    assert before["flipped"] is False
    assert flip(after) == before


def test_flip_all_counts_what_has_no_twin():
    words = ["left dog", "dog that left", "dog right behind", "cat"]
    samples = rows_to_dataset([sample(words[i], sample_id=f"s{i}") for i in range(4)], "test")
    counts = Counter()
    twins = flip_all(samples, counts)
    assert twins["expression"][:] == ["right dog", "cat"]
    assert counts == {"left as a verb": 1, "right that is no side": 1}


def test_no_side_survives_a_flip_unswapped():
    for expression, mirrored in SWAPPED:
        sides = re.findall(r"(?<![bp])(?:left(?!over)|right)", expression.lower())
        assert [{"left": "right", "right": "left"}[side] for side in sides] == re.findall(
            r"(?<![bp])(?:left(?!over)|right)", mirrored.lower()
        )
