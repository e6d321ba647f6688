"""Filters: what each must drop, and what it must let pass."""

import pytest

from egm_lib.curation import filters
from egm_lib.curation.filters import TeacherReply
from egm_lib.curation.outputs import dropped_by
from egm_lib.curation.tasks import TASKS

SAMPLE = {"expression": "second red cup from the left"}


def reply(text, **more):
    return TeacherReply(text, answer=text, **more)


@pytest.mark.parametrize(
    "text",
    [
        "The object inside the green box is a cup.",  # the box itself
        "It is the cup with the green outline.",  # its colour as a mark
        "The bounding box covers the second cup.",
        "The cup marked by a green rectangle is the second.",
        "The highlighted object is the second cup.",
        "the object marked with the green box.",
        "Look within the box for the cup.",
        "TARGET is the second cup.",  # its label
    ],
)
def test_mention_of_the_drawn_box(text):
    assert filters.mentions_drawn_box(reply(text), SAMPLE)


@pytest.mark.parametrize(
    "text, expression",
    [
        # Green things are no marks
        ("The man in the green shirt stands left of the sign.", "man in green"),
        ("The cardboard box is on the second shelf.", "cardboard box"),
        ("The cat sits in the box on the floor.", "cat in the box"),  # the scene has a box
        # The expression's own words
        ("The green box on the left is smaller than the other.", "green box on the left"),
        ("Its marked stripes set the zebra apart.", "zebra"),
        ("the picture frame above the bed hangs left of the window", "picture frame"),
    ],
)
def test_words_that_only_resemble_a_mention(text, expression):
    assert not filters.mentions_drawn_box(reply(text), {"expression": expression})


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("This matches the ground truth.", True),
        ("Its location is given, so it must be the second.", True),
        ("At the provided coordinates there is a cup.", True),
        ("The cup gives the position away.", False),
        ("Given that cups stand in a row, the second is meant.", False),  # "given" as a conjunction
    ],
)
def test_ground_truth_as_given(text, is_one):
    assert filters.names_ground_truth(reply(text), SAMPLE) == is_one


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("The cup at [120, 300, 180, 360].", True),
        ("It is at (0.12, 0.5).", True),
        ("about 40 px from the edge", True),
        ("its pixel values are dark", True),
        ("1 at 825 300, 2 at 750 850", True),  # the miniature world's places
        ("x = 120", True),
        ("The second of 3 cups, number 10 on the shelf.", False),
        ("The bus with 221 on it, parked in 2014.", False),
    ],
)
def test_coordinates(text, is_one):
    assert filters.coordinates(reply(text), SAMPLE) == is_one


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("I'm sorry, but I can't help with identifying people.", True),
        ("I cannot assist with that.", True),
        ("I’m unable to determine which cup is meant.", True),
        ("Sorry, no.", True),
        ("The sorry-looking cup on the left.", False),
        # Opens like a refusal; dropping it costs one trace
        ("We can't miss it: the only red cup.", True),
        ("The cup I can see on the left is red.", False),
    ],
)
def test_refusal(text, is_one):
    assert filters.refusal(reply(text), SAMPLE) == is_one


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("<ref>The cup</ref> is red.", True),  # the SFT would stop at it
        ("The cup at <box>left</box>.", True),
        ("The cup.</think> So it is red.", True),
        ("The cup.<|im_end|> It is red.", True),  # a control token within the words
        ("The cup.</s>It is red.", True),
        ("The caf\ufffd is red.", True),  # a character that the service lost
        ("The cup\x00 is red.", True),
        ("The café is <2 m away > the cup, at 3 | 4.", False),
        ("The left one: 1 at 825 300 , 2 at 750 850 .", False),
    ],
)
def test_what_must_not_be_trained_on_as_words(text, is_one):
    assert filters.garbled(reply(text), SAMPLE) == is_one
    for task in ("trace", "amodal-trace", "amodal-expression"):
        assert ("garbled", filters.garbled) in TASKS[task].filters


def test_refusal_by_the_service_itself():
    assert filters.refusal(reply("", refusal="no"), SAMPLE)
    assert filters.refusal(reply("half a", finish_reason="content_filter"), SAMPLE)


@pytest.mark.parametrize(
    "text, count",
    [
        ("One cup.", 1),
        ("One cup. Another one", 2),  # the last needs no full stop
        ("It is e.g. a cup of J. Smith, 2.5 cm high.", 1),
        ("Look! There? Yes.", 3),
        ("crosses from the right: 1 at 825 300, 2 at 750 850. the second is 2 at 750 850.", 2),
        ("", 0),
    ],
)
def test_sentences(text, count):
    assert filters.count_sentences(text) == count
    assert filters.more_sentences_than(count - 1)(reply(text), SAMPLE)
    assert not filters.more_sentences_than(count)(reply(text), SAMPLE)


@pytest.mark.parametrize(
    "text, is_one",
    [
        ("it reaches the image boundary", True),
        ("cut off by the edge of the picture", True),
        ("extends outside the frame", True),
        ("the edge of the table hides it", False),
        ("in the picture the tiger lies left", False),
    ],
)
def test_image_boundary(text, is_one):
    assert filters.image_boundary(reply(text), SAMPLE) == is_one


@pytest.mark.parametrize(
    "text, named",
    [
        ("extend downward from the visible part considerably", {"downward"}),
        (
            "The log on the left hides its legs. It extends slightly down and to the right.",
            {"downward", "to the right"},
        ),
        # Places, not directions of extension
        ("The tiger is left of the rock, right behind the log.", set()),
        ("It continues to the left behind the tree on the right.", {"to the left"}),
        ("it reaches upwards a bit", {"upward"}),
    ],
)
def test_named_directions(text, named):
    assert filters.named_directions(text) == named


def test_wrong_direction_is_any_untrue_one_or_none_at_all():
    down = [("downward", "considerably")]
    assert not filters.wrong_direction(reply("It extends downward."), down)
    assert filters.wrong_direction(reply("It extends upward."), down)
    assert filters.wrong_direction(reply("It extends downward and upward."), down)
    assert filters.wrong_direction(reply("It lies behind the log."), down)
    assert not filters.wrong_direction(reply("It is entirely visible."), [])


def test_the_first_filter_names_the_reason_and_filters_can_be_left_out():
    trace = reply("I'm sorry, the green box at [1, 2, 3, 4].", finish_reason="length")
    assert dropped_by(TASKS["trace"], trace, SAMPLE) == "refusal"
    assert dropped_by(TASKS["trace"], reply("At 825 300."), SAMPLE) == "coordinates"
    assert dropped_by(TASKS["trace"], reply("At 825 300."), SAMPLE, ["coordinates"]) is None
    assert dropped_by(TASKS["verify"], TeacherReply("NO", answer="NO"), SAMPLE) == "rejected"
