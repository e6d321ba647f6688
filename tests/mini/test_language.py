"""Expressions mean what a person would say they mean, and traces end at the thing that is meant."""

import re
from random import Random

import numpy as np
import pytest

from egm_lib.mini.language import Kind, Query, amodal_steps, extension, place, sample_query
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
