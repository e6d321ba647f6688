"""The miniature's images and boxes: what is stored is what can be seen."""

import numpy as np
import pytest

from egm_lib.mini.scenes import SIZE_PX, Scene, Thing, render, sample_scene, with_visibility


def scene_of(*things: Thing) -> Scene:
    return with_visibility(Scene(things, ground_seed=3))


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "cross", "ring"])
def test_an_unhidden_thing_fills_its_box(shape):
    box = (30.0, 40.0, 60.0, 64.0)
    image = np.asarray(render(scene_of(Thing("red", shape, box)))).astype(int)
    empty = np.asarray(render(Scene((), 3))).astype(int)
    rows, columns = np.nonzero(np.abs(image - empty).max(-1) > 12)
    seen = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert np.abs(np.array(seen) - box).max() <= 1, "the drawn pixels end where the box does"


def test_visible_box_of_a_half_covered_square_is_its_other_half():
    scene = scene_of(
        Thing("red", "square", (20, 20, 50, 50)), Thing("blue", "square", (35, 10, 70, 60))
    )
    assert scene.things[0].visible_box_px == (20, 20, 35, 50)
    assert scene.things[0].visible_share == pytest.approx(0.5, abs=0.02)
    assert scene.things[1].visible_box_px == scene.things[1].full_box_px


def test_a_buried_thing_has_no_visible_box():
    scene = scene_of(
        Thing("red", "circle", (30, 30, 40, 40)), Thing("blue", "square", (20, 20, 60, 60))
    )
    assert scene.things[0].visible_box_px is None
    assert scene.members.get(("red", "circle")) is None


def test_random_scenes_stay_in_the_image_and_repeat_by_seed():
    for seed in range(60):
        scene = sample_scene(np.random.default_rng(seed), occlusion=0.5)
        assert 5 <= len(scene.things) <= 24
        for thing in scene.things:
            x1, y1, x2, y2 = thing.full_box_px
            assert 0 <= x1 < x2 <= SIZE_PX and 0 <= y1 < y2 <= SIZE_PX
            if thing.visible_box_px is not None:
                v = thing.visible_box_px
                assert x1 <= v[0] < v[2] <= x2 and y1 <= v[1] < v[3] <= y2
    again = [sample_scene(np.random.default_rng(7)) for _ in range(2)]
    assert again[0] == again[1]
    assert np.array_equal(np.asarray(render(again[0])), np.asarray(render(again[1])))
