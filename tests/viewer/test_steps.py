"""The places that traces name: hand-made traces, the paper's own example, and text that is odd."""

import time

import pytest

from egm_lib.boxes import BoxFrame
from egm_lib.viewer.drawing import draw_steps
from egm_lib.viewer.palette import FAULT, LOOKS, new_figure
from egm_lib.viewer.steps import (
    COUNTED_TWICE,
    MAX_STEPS,
    NO_OBJECT,
    OUT_OF_ORDER,
    Step,
    places,
)


def named(trace: str, **options) -> list:
    """The steps of a trace on an image of 1000 x 1000 px, where NORM_1000 and px agree."""
    return places(trace, frame=BoxFrame.NORM_1000, image_wh=(1000, 1000), **options)


@pytest.mark.parametrize(
    "trace, points",
    [
        ("first at 440 240, second at 825 300.", [(440, 240), (825, 300)]),  # a list of the mini
        ("the ring is at (440, 240)", [(440, 240)]),  # brackets and a comma
        ("look [440, 240] and (10,20)", [(440, 240), (10, 20)]),  # bare points
        ("around about 440, 240", [(440, 240)]),  # a hedge
        ("at 440 240 size 260", [(440, 240)]),  # the size is no place
        ("there are 3 of 12 people at 7", []),  # counts
        ("at 4400 240", []),  # outside the image
        ("a photo (2013, 2014)", []),  # years: outside the image
        ("in 2 3 steps", []),  # numbers without a word that says where
        ("at 1 2 3", []),  # three numbers are no place
    ],
)
def test_points(trace, points):
    assert [step.point for step in named(trace)] == points
    assert all(step.kind == "point" and step.box is None for step in named(trace))


@pytest.mark.parametrize(
    "trace, box",
    [
        ("it is [838, 129, 993, 999]", (838, 129, 993, 999)),
        ("it is seen from 320 60 to 420 180.", (320, 60, 420, 180)),
        ("corners (320, 60), (420, 180)", (320, 60, 420, 180)),
        ("swapped: [993, 999, 838, 129]", (838, 129, 993, 999)),
        ("[-100, 10, 300, 1040]", (-100, 10, 300, 1040)),  # an amodal box may leave the image
    ],
)
def test_boxes(trace, box):
    [step] = named(trace)
    assert step.kind == "box" and step.box == box
    assert step.point == ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)


def test_the_words_of_a_step_are_the_ones_that_name_it():
    trace = "white things from the top: first at 48 26, then [1, 2, 30, 40]."
    assert [trace[s.start : s.end] for s in named(trace)] == ["at 48 26", "[1, 2, 30, 40]"]


def test_the_frame_says_what_numbers_mean():
    in_px = places("at 440 240", frame=BoxFrame.NORM_1000, image_wh=(200, 100))
    assert in_px[0].point == (88, 24)
    assert places("at 44 24", frame=BoxFrame.PIXEL, image_wh=(200, 100))[0].point == (44, 24)
    assert places("at 0.5 0.25", frame=BoxFrame.NORM_1, image_wh=(200, 100))[0].point == (100, 25)


PAPER = (  # Appendix C of the paper: a trace of Qwen3-VL-235B-Thinking
    "Let's check the image. Looking at the image, let's count from the right: - First (rightmost): "
    "[838, 129, 993, 999] - Second: [742, 299, 922, 999] - Third from right: [635, 711, 771, 999]. "
    "Yes, that's the 'third from the right'. Let's confirm. The third from the right in the front "
    "row (players) is the girl with the white top, green skirt, and she's standing next to the "
    "girl with the white cap. So the bounding box for that girl is [635, 711, 771, 999]."
)


def test_the_papers_example_of_a_long_trace():
    steps = named(PAPER)
    assert [step.box for step in steps] == [
        (838, 129, 993, 999),
        (742, 299, 922, 999),
        (635, 711, 771, 999),
        (635, 711, 771, 999),
    ]
    assert [step.fault for step in steps] == [""] * 4  # counted from the right, as it says


def test_an_extension_grows_the_last_box():
    trace = "it is seen from 400 400 to 500 600. the log hides it. extend down considerably."
    seen, grown = named(trace)
    assert grown.kind == "extend" and trace[grown.start : grown.end] == "down considerably"
    # "considerably" is 50 to 80 % of the visible height (egm_lib.curation.directions)
    assert grown.box == (400, 400, 500, pytest.approx(600 + 0.65 * 200))
    assert grown.box[:3] == seen.box[:3]


@pytest.mark.parametrize(
    "clause, sides",
    [
        ("extend to the left a bit", ["left"]),
        ("extend downward from the visible part considerably", ["down"]),  # Fig. 3
        ("extend slightly upward and to the right moderately", ["up", "right"]),
        ("extending it left a bit, down significantly", ["left", "down"]),
        ("extends behind the tree", []),  # no direction
        ("extend to the left", []),  # no word for how far
    ],
)
def test_directions_of_an_extension(clause, sides):
    visible = (400, 400, 500, 600)
    steps = named(clause, visible=visible)
    edge = {"left": 0, "up": 1, "right": 2, "down": 3}
    last, moved = visible, []
    for step in steps:
        moved += [side for side, place in edge.items() if step.box[place] != last[place]]
        last = step.box
    assert moved == sides
    assert named(clause) == []  # nothing to extend: no box named, no visible part known


@pytest.mark.parametrize(
    "trace, faults",
    [
        ("from the left: first at 100 0, second at 300 0, third at 200 0", ["", "", OUT_OF_ORDER]),
        ("from the right: first at 300 0, second at 100 0", ["", ""]),
        ("from the bottom: first at 0 900, second at 5 950", ["", OUT_OF_ORDER]),
        # Beside an anchor one counts outwards.
        ("crosses left of it: first at 580 0, second at 300 0", ["", ""]),
        ("crosses above it: first at 0 300, second at 0 400", ["", OUT_OF_ORDER]),
        ("from the top: first at 1 100, second at 1 100", ["", COUNTED_TWICE]),
        (
            "from the largest: first at 900 0, second at 100 0",
            ["", ""],
        ),  # an order that we cannot see
        ("the ring is at 900 0. the cross is at 100 0", ["", ""]),  # no list
        # Two lists: the second one begins anew.
        (
            "from the left: first at 900 0. from the right: first at 500 0, second at 400 0",
            [""] * 3,
        ),
    ],
)
def test_a_list_that_does_not_run_as_it_says_is_marked(trace, faults):
    assert [step.fault for step in named(trace)] == faults


def test_a_place_without_an_object_is_marked_where_objects_are_known():
    trace = "the ring is at 105 100. the star is at 500 500. the middle is at 300 300."
    objects = [(90, 90, 110, 110)]
    assert [step.fault for step in named(trace, objects=objects)] == ["", NO_OBJECT, ""]
    assert [step.fault for step in named(trace)] == ["", "", ""]  # unknown: nothing is claimed


@pytest.mark.parametrize(
    "text",
    ["", "at", "[", "[1, 2, 3", "at 1e999 4", "from 1 2 to", "[" + "9" * 400 + ", 1, 2, 3]"],
)
def test_odd_text_names_no_place_and_does_not_raise(text):
    assert named(text) == []


@pytest.mark.parametrize(
    "text", ["at 1 2 " * 50_000, "extend " * 50_000, "(" * 300_000, "1 " * 200_000]
)
def test_a_loop_is_cut_and_costs_linear_time(text):
    began = time.process_time()
    assert len(named(text)) <= MAX_STEPS
    assert time.process_time() - began < 2


def test_steps_near_one_another_share_a_label():
    ax = new_figure(2, 2).subplots()
    points = [(100.0, 60.0), (20.0, 30.0), (103.0, 64.0), (100.0, 60.0)]
    steps = [Step(0, 1, "point", point, None) for point in points]
    draw_steps(ax, [*steps[:3], steps[3]._replace(fault=COUNTED_TWICE)], LOOKS["small-egm"], 5.0)
    labels = {text.get_text(): text for text in ax.texts}
    assert labels.keys() == {"1,3,4!", "2"}
    assert labels["1,3,4!"].get_color() == FAULT
