"""Expressions mean what a person would say they mean, and traces end at the thing that is meant."""

import re
from random import Random

import numpy as np
import pytest

from egm_lib.mini.language import (
    WAYS,
    Kind,
    Query,
    amodal_steps,
    extension,
    place,
    retell,
    sample_query,
    way_of,
)
from egm_lib.mini.scenes import Scene, Thing, sample_scene, with_visibility
from egm_lib.mini.tokens import build_tokenizer


def square(colour: str, x: float, y: float, side: float = 16, shape: str = "square") -> Thing:
    return Thing(colour, shape, (x, y, x + side, y + side))


# Four red squares in a row, a blue circle below, between the second and the third, sizes growing to
# the right.
ROW = with_visibility(
    Scene(
        (
            square("red", 4, 10, 12),
            square("red", 34, 10, 16),
            square("red", 66, 10, 21),
            square("red", 98, 10, 27),
            square("blue", 39, 40, 20, "circle"),
            square("green", 98, 80, 20, "star"),
        ),
        1,
    )
)
RED, BLUE, GREEN = (
    Kind("red", "square"),
    Query(Kind("blue", "circle")),
    Query(Kind("green", "star")),
)


@pytest.mark.parametrize(
    "query, index",
    [
        (Query(RED, "rank", "left", 1), 0),
        (Query(RED, "rank", "right", 2), 2),
        (Query(RED, "rank", "largest", 1), 3),
        (Query(RED, "rank", "smallest", 2), 1),
        (Query(RED, "near", anchors=(BLUE,)), 1),
        (Query(RED, "far", anchors=(BLUE,)), 3),
        (Query(RED, "side", "left", anchors=(Query(RED, "rank", "left", 2),)), 0),
        (Query(RED, "side_rank", "right", 2, (BLUE,)), 3),  # counted outwards from the anchor
        (
            Query(
                RED,
                "between",
                anchors=(Query(RED, "rank", "left", 2), Query(RED, "rank", "right", 1)),
            ),
            2,
        ),
        (Query(Kind(None, "circle"), "plain"), 4),
        (Query(RED, "plain"), None),  # four of them
        (Query(RED, "rank", "top", 1), None),  # all at nearly one height
        (Query(RED, "rank", "left", 5), None),  # there is no fifth
        (Query(RED, "side", "right", anchors=(BLUE,)), None),  # several
    ],
)
def test_queries_find_what_they_say(query, index):
    assert query.find(ROW) == index


def test_hops_count_serial_selections():
    anchor = Query(RED, "rank", "left", 2)
    assert (BLUE.hops, anchor.hops, Query(RED, "near", anchors=(anchor,)).hops) == (0, 1, 2)
    assert Query(RED, "near", anchors=(anchor,)).prompt_kind == "chain-2"


def test_steps_of_an_ordinal_are_written_out():
    steps = Query(RED, "rank", "right", 2).steps(ROW)
    assert steps == "red squares from the right: first at 880 180, second at 600 160."


def test_steps_refuse_what_is_not_unique():
    with pytest.raises(ValueError, match="no unique thing"):
        Query(RED).steps(ROW)


def test_random_queries_are_unique_sayable_and_their_traces_end_at_the_target():
    tokenizer, rng, kinds = build_tokenizer(), Random(0), set()
    for seed in range(120):
        scene = sample_scene(np.random.default_rng(seed))
        for hops in range(4):
            drawn = sample_query(rng, scene, hops)
            if drawn is None:
                continue
            query, index = drawn
            kinds.add(query.prompt_kind)
            assert query.find(scene) == index
            words, steps = query.words(rng), query.steps(scene)
            target = place(scene.things[index]).removeprefix("at ")
            assert re.findall(r"at (\d+ \d+)", steps)[-1] == target
            for text in (words, steps):
                ids = tokenizer(f"Locate {text}").input_ids
                assert tokenizer.unk_token_id not in ids, text
                assert tokenizer.decode(ids) == f"Locate {text}"
    assert {
        "plain",
        "superlative",
        "ordinal",
        "relational",
        "nearest",
        "between",
        "chain-2",
        "chain-3",
    } <= kinds


def test_without_location_words_none_occur():
    rng, words = Random(1), []
    for seed in range(60):
        scene = sample_scene(np.random.default_rng(seed))
        drawn = sample_query(rng, scene, 1 + seed % 2, location=False)
        if drawn:
            words.append(drawn[0].words(rng))
    assert len(words) > 30
    assert not [
        w for w in words if re.search(r"\b(left|right|top|bottom|above|below|\w+tmost)\b", w)
    ]


def test_extension_names_direction_and_degree():
    scene = with_visibility(Scene((square("red", 20, 20, 30), square("blue", 40, 10, 50)), 1))
    # 20 px seen of 30: half as much again
    assert extension(scene.things[0]) == [("right", "moderately")]
    trace = amodal_steps(Query(Kind("red", "square")), scene, 0)
    assert trace.endswith("the blue square hides it. extend right moderately.")


# --- ways to reason -------------------------------------------------------------------------------

COUNTED = "red squares from the right: first at 880 180, second at 600 160."
COVERED = (
    "the blue circle is at 380 400. it is seen from 300 320 to 460 480. the green star hides it. "
    "extend right a bit, down slightly."
)


@pytest.mark.parametrize("worked, expression, way, told", [
    (COUNTED, "second red square from the right", "worked", COUNTED),
    # the last place is the answer's: the first is that of another red square
    (COUNTED, "second red square from the right", "concluding",
     "second red square from the right is at 600 160."),
    (COUNTED, "second red square from the right", "restating",
     "it is second red square from the right."),
    # what is hidden is said in every way; the corners after "from" and "to" are no places
    (COVERED, "blue circle", "concluding",
     "blue circle is at 380 400. extend right a bit, down slightly."),
    (COVERED, "blue circle", "restating", "it is blue circle. extend right a bit, down slightly."),
    ("the ring is at 20 40. it is seen from 0 0 to 60 80. nothing hides it.", "ring", "restating",
     "it is ring. nothing hides it."),
])  # fmt: skip
def test_a_trace_can_be_written_in_another_way(worked, expression, way, told):
    assert retell(worked, expression, way) == told


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="unknown way 'guessing'"):
        retell(COUNTED, "second red square from the right", "guessing")


@pytest.mark.parametrize("reasoning, expression, way", [
    (None, "ring", None),                                                 # a direct answer
    ("\n", "ring", None),                                                 # an empty thought
    ("it is third ring from the left.", "second ring from the left", "restating"),  # misquoted
    ("rings from the left: first at 20 40.", "leftmost ring", "worked"),  # one place, but a list
    ("the star is at 20 40. the ring nearest to it is at 60 40.", "ring nearest to the star",
     "worked"),
    ("the ring is at 20 40.", "ring", "worked"),                          # needs no steps
    ("the ring is at 20 40.", "ring nearest to the star", "concluding"),  # the steps are left out
    ("ring nearest to the star is at 20 40.", "ring nearest to the star", "concluding"),
    ("the star has this ring closest is at 20 40.", "the star has this ring closest",
     "concluding"),
    ("it is ring. extend left a bit.", "ring", "restating"),              # amodal
])  # fmt: skip
def test_the_way_of_a_text_is_recognised_by_its_form(reasoning, expression, way):
    assert way_of(reasoning, expression) == way


def test_every_trace_is_recognised_in_every_way_and_stays_sayable():
    tokenizer, rng, seen = build_tokenizer(), Random(2), 0
    for seed in range(80):
        scene = sample_scene(np.random.default_rng(seed), occlusion=0.5)
        for hops in range(4):
            drawn = sample_query(rng, scene, hops)
            if drawn is None:
                continue
            query, index = drawn
            expression = query.words(rng)
            for worked in (query.steps(scene), amodal_steps(query, scene, index)):
                for way in WAYS:
                    told = retell(worked, expression, way)
                    assert way_of(told, expression) == way, told
                    assert tokenizer.unk_token_id not in tokenizer(told).input_ids, told
                    seen += 1
    assert seen > 600
