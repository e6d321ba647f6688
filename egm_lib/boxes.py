"""Boxes: frames, conversion, IoU and success (Eq. 1).

A box is (x1, y1, x2, y2) in continuous coordinates: width is x2 - x1, without the "+1 pixel" of
some evaluators.
"""

from collections.abc import Sequence
from enum import Enum
from math import inf, isfinite

import numpy as np
from numpy.typing import ArrayLike

Box = tuple[float, float, float, float]
SUCCESS_IOU = 0.5  # Eq. 1


class BoxFrame(Enum):
    """What the numbers of a box mean."""

    PIXEL = "pixel"  # pixels of the original image
    NORM_1000 = "norm_1000"  # 0..1000 of the image's width and height (Qwen3-VL, InternVL-3)
    NORM_1 = "norm_1"  # 0..1 of the image's width and height

    @classmethod
    def read(cls, text: "str | BoxFrame") -> "BoxFrame":
        """The frame that a file states by its value, or by its name as older files do.

        Raises ValueError, which lists the known frames, for anything else.
        """
        for frame in cls:
            if text in (frame, frame.value, frame.name):
                return frame
        known = ", ".join(frame.value for frame in cls)
        raise ValueError(f"unknown box frame {text!r}: use one of {known}")


def check_box(box: Sequence[float], name: str = "box") -> Box:
    """The box as four finite floats with x1 <= x2 and y1 <= y2, as ground truth must be.

    Raises ValueError, which shows the box, for a wrong length, nan, inf, or swapped corners.
    """
    x1, y1, x2, y2 = checked = _four_numbers(box, name)
    if x1 > x2 or y1 > y2:
        raise ValueError(f"{name} has swapped corners (want x1 <= x2 and y1 <= y2): {box!r}")
    return checked


def frame_scale(frame: BoxFrame, image_wh: tuple[int, int]) -> tuple[float, float, float]:
    """(width, height, unit) such that x_px = x * width / unit and y_px = y * height / unit.

    Raises ValueError for an unknown frame, or a size that is not two positive finite numbers.
    """
    try:
        width, height = image_wh
        valid = 0 < width < inf and 0 < height < inf
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(f"image_wh must be two positive numbers (width, height), got {image_wh!r}")
    if frame is BoxFrame.NORM_1000:
        return width, height, 1000.0
    if frame is BoxFrame.PIXEL:
        return 1.0, 1.0, 1.0
    if frame is BoxFrame.NORM_1:
        return width, height, 1.0
    raise ValueError(
        f"unknown box frame {frame!r}: use one of {', '.join(str(known) for known in BoxFrame)}"
    )


def convert(
    box: Sequence[float], source: BoxFrame, target: BoxFrame, image_wh: tuple[int, int]
) -> Box:
    """The same box in another frame; neither rounded nor clipped.

    image_wh: width and height of the original image, px.
    Raises ValueError for a box that is not four finite numbers, an unknown frame, or an image size
    that is not positive.
    """
    x1, y1, x2, y2 = numbers = _four_numbers(box, "box")
    from_width, from_height, from_unit = frame_scale(source, image_wh)
    to_width, to_height, to_unit = frame_scale(target, image_wh)
    if source is target:
        return numbers
    return _four_numbers(
        (
            x1 * from_width / from_unit * to_unit / to_width,
            y1 * from_height / from_unit * to_unit / to_height,
            x2 * from_width / from_unit * to_unit / to_width,
            y2 * from_height / from_unit * to_unit / to_height,
        ),
        f"box {box!r} converted to {target}",
    )


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes in the same frame; 0.0 if a box has no area.

    Raises ValueError for a wrong length, nan or inf.
    """
    ax1, ay1, ax2, ay2 = box_a = _four_numbers(a, "a")
    bx1, by1, bx2, by2 = box_b = _four_numbers(b, "b")
    width = (ax2 if ax2 < bx2 else bx2) - (ax1 if ax1 > bx1 else bx1)
    height = (ay2 if ay2 < by2 else by2) - (ay1 if ay1 > by1 else by1)
    if width <= 0 or height <= 0 or ax1 >= ax2 or ay1 >= ay2 or bx1 >= bx2 or by1 >= by2:
        return 0.0
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    if not isfinite(union):  # areas beyond 1e308: shrink both boxes
        scale = max(map(abs, box_a + box_b))
        return iou([value / scale for value in box_a], [value / scale for value in box_b])
    return min(intersection / union, 1.0) if union > 0 else 0.0


def pairwise_iou(a_N4: ArrayLike, b_M4: ArrayLike) -> np.ndarray:
    """IoU of every box of a with every box of b, N x M; same frame, same conventions as `iou`."""
    a_N4, b_M4 = _box_array(a_N4, "a_N4"), _box_array(b_M4, "b_M4")
    largest = max(np.abs(a_N4).max(initial=0.0), np.abs(b_M4).max(initial=0.0))
    if largest > 1e150:  # areas would overflow
        a_N4, b_M4 = a_N4 / largest, b_M4 / largest
    size_NM2 = np.minimum(a_N4[:, None, 2:], b_M4[None, :, 2:]) - np.maximum(
        a_N4[:, None, :2], b_M4[None, :, :2]
    )
    intersection_NM = size_NM2.clip(min=0).prod(axis=2)
    area_N = (a_N4[:, 2:] - a_N4[:, :2]).clip(min=0).prod(axis=1)
    area_M = (b_M4[:, 2:] - b_M4[:, :2]).clip(min=0).prod(axis=1)
    union_NM = area_N[:, None] + area_M[None, :] - intersection_NM
    valid_NM = (area_N[:, None] > 0) & (area_M[None, :] > 0) & (union_NM > 0)
    return np.divide(intersection_NM, union_NM, out=np.zeros_like(union_NM), where=valid_NM).clip(
        max=1.0
    )


def is_success(
    pred: Sequence[float] | None, gt: Sequence[float], threshold: float = SUCCESS_IOU
) -> bool:
    """Eq. 1: IoU strictly above the threshold; without a prediction there is no success."""
    return pred is not None and iou(pred, gt) > threshold


def _four_numbers(box: Sequence[float], name: str) -> Box:
    try:
        if isinstance(box, (str, bytes)):  # "1234" would pass for four numbers
            raise TypeError
        x1, y1, x2, y2 = map(float, box)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be four numbers (x1, y1, x2, y2), got {box!r}") from None
    # The sum is finite only if every number is, so one test settles the common case; the sum of
    # large finite numbers may overflow, so the rare case needs the second test.
    if not isfinite(x1 + y1 + x2 + y2) and not all(map(isfinite, (x1, y1, x2, y2))):
        raise ValueError(f"{name} must be finite, got {box!r}")
    return x1, y1, x2, y2


def _box_array(boxes: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(boxes, dtype=np.float64)
    if array.size == 0:
        return array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"{name} must have shape (number of boxes, 4), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"{name} must be finite, got {array[~np.isfinite(array).all(axis=1)][0].tolist()}"
        )
    return array
