"""The reward of a completion (Eq. 8) for TRL and for VeRL; parser and IoU are those of the metric.

Arguments often come from tables, which fill empty cells with None or NaN: both mean "not given".
"""

import json
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import pandas as pd

from egm_lib.boxes import BoxFrame, check_box, convert, iou
from egm_lib.parsing import accepts, parse_completion

FRAME = BoxFrame.NORM_1000  # of the answers of both model families
WEIGHT = 0.5  # Eq. 8, Table 6: of success; the rest is of IoU


def grounding_reward(
    pred: Sequence[float] | None, gt: Sequence[float], weight: float = WEIGHT
) -> float:
    """Eq. 8: weight * success + (1 - weight) * IoU; 0.0 without a prediction.

    pred, gt: xyxy in the same frame.
    Raises ValueError for a box that is not four finite numbers, and a gt with swapped corners.
    """
    gt = check_box(gt, "gt")
    if pred is None:
        return 0.0
    overlap = iou(pred, gt)
    return weight * accepts(overlap) + (1.0 - weight) * overlap


def egm_reward(
    completions: Sequence[str | Sequence[Mapping] | None],
    gt_box: Sequence[Sequence[float]],
    image_wh: Sequence[tuple[int, int]],
    *,
    frame: BoxFrame | str | Sequence[BoxFrame | str | None] | None = None,
    weight: float | Sequence[float | None] | None = None,
    **kwargs,
) -> list[float]:
    """TRL's reward function: one reward per completion.

    completions: texts, or chats whose last message is the answer; None earns 0.0.
    gt_box: xyxy px of the original image; image_wh: px; both one per completion, as TRL passes the
    columns of a data set. Other columns (kwargs) are ignored.
    frame: what the numbers of the completions mean; not given: 0-1000, as both families write.
    weight: of success in Eq. 8; not given: 0.5. Both may be one for all or one per completion.
    Raises ValueError if lengths differ, a ground truth is not a box, or a size is not positive.
    """
    size = len(completions)
    columns = {
        "gt_box": gt_box,
        "image_wh": image_wh,
        "frame": _column(frame, size),
        "weight": _column(weight, size),
    }
    for name, column in columns.items():
        if len(column) != size:
            raise ValueError(f"completions and {name} differ in length: {size} and {len(column)}")
    rewards = []
    for completion, *row in zip(completions, *columns.values(), strict=True):
        gt, wh, frame_of_row, weight_of_row = row
        parsed = parse_completion(
            _text(completion),
            frame=FRAME if _absent(frame_of_row) else BoxFrame.read(frame_of_row),
            image_wh=wh,
        )
        row_weight = WEIGHT if _absent(weight_of_row) else weight_of_row
        rewards.append(grounding_reward(parsed.box, gt, row_weight))
    return rewards


def compute_score(
    data_source: str,
    solution_str: str | None,
    ground_truth: Sequence[float] | str,
    extra_info: Mapping | None = None,
) -> float:
    """VeRL's reward function.

    data_source: not read. ground_truth: xyxy, or the same as JSON text.
    extra_info: the image size in px, as "width" and "height" or as "image_wh". Optional:
    "ground_truth_frame" (default "pixel"; the authors' parquet files hold "norm_1000"), "frame" of
    the answer (default "norm_1000"), and "weight" (default 0.5).
    Raises ValueError if the size is missing or the ground truth is not a box.
    """
    info = {name: value for name, value in (extra_info or {}).items() if not _absent(value)}
    if "image_wh" in info:
        image_wh = tuple(info["image_wh"])
    elif "width" in info and "height" in info:
        image_wh = info["width"], info["height"]
    else:
        raise ValueError(
            f'extra_info must hold the image size as "width" and "height", or as "image_wh": '
            f"{extra_info!r}"
        )
    gt = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    gt_frame = BoxFrame.read(info.get("ground_truth_frame", BoxFrame.PIXEL))
    parsed = parse_completion(
        _text(solution_str),
        frame=BoxFrame.read(info.get("frame", FRAME)),
        image_wh=image_wh,
    )
    gt_px = convert(gt, gt_frame, BoxFrame.PIXEL, image_wh)
    return grounding_reward(parsed.box, gt_px, info.get("weight", WEIGHT))


def _absent(value: Any) -> bool:
    """Whether a table's cell is empty: None, or what numpy and pandas make of it."""
    return value is None or value is pd.NA or (isinstance(value, Real) and value != value)


def _column(value: Any, size: int) -> Sequence:
    """One value per completion, of a column or of a value for all."""
    one_for_all = isinstance(value, str | BoxFrame | Real) or _absent(value)
    return [value] * size if one_for_all else value


def _text(completion: str | Sequence[Mapping] | None) -> str:
    """The text of a completion; for a chat, all text of its last message; "" if there is none."""
    if completion is None or isinstance(completion, str):
        return completion or ""
    content = completion[-1].get("content") if completion else None
    if content is None or isinstance(content, str):
        return content or ""
    parts = (part if isinstance(part, str) else part.get("text") for part in content if part)
    return "".join(part or "" for part in parts)
