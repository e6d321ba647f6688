"""Boxes against independent truths: pycocotools, the formula, and the algebra of frame changes."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from egm_lib.boxes import BoxFrame, check_box, convert, iou, is_success, pairwise_iou

FRAMES = list(BoxFrame)
finite = st.floats(allow_nan=False, allow_infinity=False)
boxes = st.tuples(finite, finite, finite, finite)
moderate = st.floats(-1e6, 1e6)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """xyxy px; a tenth lies on a coarse grid, so that boxes touch, coincide or have no area."""
    corners = rng.uniform(0, 640, (count, 2, 2))
    corners[: count // 10] = corners[: count // 10] // 64 * 64
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def test_iou_agrees_with_pycocotools_on_100k_pairs():
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 1000), random_boxes(rng, 100)
    ours = pairwise_iou(a, b)
    theirs = coco_mask.iou(
        *(np.hstack([c[:, :2], c[:, 2:] - c[:, :2]]) for c in (a, b)), [0] * len(b)
    )
    # Pycocotools: 0 / 0 for two empty boxes
    np.testing.assert_allclose(ours, np.nan_to_num(theirs), atol=1e-6)
    assert (ours == 0).any() and (ours > 0.5).any()


def test_scalar_and_pairwise_iou_agree_with_the_formula():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 300), random_boxes(rng, 300)
    width = np.clip(np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0]), 0, None)
    height = np.clip(np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1]), 0, None)
    union = (
        np.prod(a[:, 2:] - a[:, :2], axis=1) + np.prod(b[:, 2:] - b[:, :2], axis=1) - width * height
    )
    expected = np.where(union > 0, width * height / np.where(union > 0, union, 1), 0)
    np.testing.assert_allclose([iou(x, y) for x, y in zip(a, b, strict=True)], expected, atol=1e-12)
    np.testing.assert_allclose(pairwise_iou(a, b).diagonal(), expected, atol=1e-12)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),  # touching edges share no area
        ((0, 0, 1, 1), (1, 1, 2, 2), 0.0),  # touching corners
        ((5, 5, 5, 9), (5, 5, 5, 9), 0.0),  # a line has no area, even against itself
        ((5, 5, 5, 5), (0, 0, 9, 9), 0.0),  # a point inside a box
        ((3, 3, 1, 1), (0, 0, 4, 4), 0.0),  # swapped corners enclose nothing
        ((3, 3, 1, 1), (3, 3, 1, 1), 0.0),
        ((-2, -2, 2, 2), (0, 0, 2, 2), 0.25),  # negative coordinates are valid
        # Areas beyond float range
        ((-1e308, -1e308, 1e308, 1e308), (-1e308, -1e308, 1e308, 1e308), 1.0),
    ],
)
def test_iou_by_hand(a, b, expected):
    assert iou(a, b) == pytest.approx(expected)
    assert pairwise_iou([a], [b])[0, 0] == pytest.approx(expected)


@settings(deadline=None)
@given(boxes, boxes)
def test_iou_is_symmetric_and_between_0_and_1_for_any_finite_boxes(a, b):
    assert 0.0 <= iou(a, b) <= 1.0
    assert iou(a, b) == iou(b, a)
    assert 0.0 <= pairwise_iou([a], [b])[0, 0] <= 1.0


def test_pairwise_iou_of_nothing():
    assert pairwise_iou([], [[0, 0, 1, 1]]).shape == (0, 1)


@pytest.mark.parametrize(
    "bad", [(1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, math.nan), (1, 2, math.inf, 4), "1234", None]
)
def test_bad_boxes_are_refused_by_name(bad):
    for call in (
        lambda: iou(bad, (0, 0, 1, 1)),
        lambda: iou((0, 0, 1, 1), bad),
        lambda: check_box(bad, "gt_box"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(ValueError, match="gt_box"):
        check_box(bad, "gt_box")


def test_pairwise_iou_names_what_is_wrong():
    with pytest.raises(ValueError, match="a_N4 must be finite, got .*nan"):
        pairwise_iou([[0, 0, 1, math.nan]], [[0, 0, 1, 1]])
    with pytest.raises(ValueError, match="b_M4 must have shape"):
        pairwise_iou([[0, 0, 1, 1]], [0, 0, 1, 1])


def test_swapped_corners_are_an_error_in_ground_truth():
    with pytest.raises(ValueError, match="swapped corners"):
        check_box((10, 0, 5, 5))
    assert check_box([1, 2, 1, 2]) == (1, 2, 1, 2)


@pytest.mark.parametrize(
    "box, source, target, wh, expected",
    [
        (
            (500, 250, 1000, 1000),
            BoxFrame.NORM_1000,
            BoxFrame.PIXEL,
            (640, 480),
            (320, 120, 640, 480),
        ),
        (
            (0.5, 0.25, 1, 1),
            BoxFrame.NORM_1,
            BoxFrame.NORM_1000,
            (640, 480),
            (500, 250, 1000, 1000),
        ),
        ((320, 120, 640, 480), BoxFrame.PIXEL, BoxFrame.NORM_1, (640, 480), (0.5, 0.25, 1, 1)),
        # Not clipped
        ((-64, 0, 704, 480), BoxFrame.PIXEL, BoxFrame.NORM_1000, (640, 480), (-100, 0, 1100, 1000)),
    ],
)
def test_convert_by_hand(box, source, target, wh, expected):
    assert convert(box, source, target, wh) == pytest.approx(expected)


@settings(deadline=None)
@given(
    st.tuples(moderate, moderate, moderate, moderate),
    st.sampled_from(FRAMES),
    st.sampled_from(FRAMES),
    st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)),
)
def test_convert_there_and_back_is_the_identity(box, source, target, wh):
    there = convert(box, source, target, wh)
    assert convert(there, target, source, wh) == pytest.approx(box, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "wh", [(0, 5), (5, -1), (math.nan, 5), (math.inf, 5), (5,), None, ("5", "5")]
)
def test_convert_refuses_an_impossible_image_size(wh):
    with pytest.raises(ValueError, match="image_wh"):
        convert((0, 0, 1, 1), BoxFrame.PIXEL, BoxFrame.PIXEL, wh)


def test_convert_refuses_an_unknown_frame():
    with pytest.raises(ValueError, match="unknown box frame 'px'"):
        convert((0, 0, 1, 1), "px", BoxFrame.PIXEL, (5, 5))


@pytest.mark.parametrize("frame", FRAMES)
def test_a_frame_is_read_by_value_and_by_name(frame):
    """Files hold the value; older prediction files hold the name."""
    assert all(BoxFrame.read(text) is frame for text in (frame, frame.value, frame.name))


@pytest.mark.parametrize("text", ["px", "", None, 1000, ["pixel"]])
def test_an_unknown_frame_is_named(text):
    with pytest.raises(ValueError, match="unknown box frame .*use one of pixel, norm_1000, norm_1"):
        BoxFrame.read(text)


def test_success_is_strictly_above_the_threshold():
    assert not is_success((0, 0, 1, 1), (0, 0, 1, 2))  # IoU exactly 0.5
    assert is_success((0, 0, 1, 1), (0, 0, 1, 1.99))
    assert is_success((0, 0, 1, 1), (0, 0, 1, 2), threshold=0.49)
    assert not is_success(None, (0, 0, 1, 1))
