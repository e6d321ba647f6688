"""The reward of a completion (Eq. 8), in TRL's and in VeRL's signature; parser and IoU are those of
the metric.
"""

import json
from collections.abc import Mapping, Sequence

from egm_lib.boxes import BoxFrame, check_box, convert, iou
from egm_lib.parsing import accepts, parse_completion


def grounding_reward(
    pred: Sequence[float] | None, gt: Sequence[float], weight: float = 0.5
) -> float:
    """Eq. 8: weight * success + (1 - weight) * IoU; 0.0 without a prediction.

    pred, gt: xyxy in the same frame. Raises ValueError for boxes that are not four finite numbers,
    and a gt with swapped corners.
    """
    gt = check_box(gt, "gt")
    if pred is None:
        return 0.0
    overlap = iou(pred, gt)
    return weight * accepts(overlap) + (1.0 - weight) * overlap


def egm_reward(
    completions: Sequence[str | Sequence[Mapping]],
    gt_box: Sequence[Sequence[float]],
    image_wh: Sequence[tuple[int, int]],
    *,
    frame: BoxFrame = BoxFrame.NORM_1000,
    weight: float = 0.5,
    **kwargs,
) -> list[float]:
    """TRL's reward function: one reward per completion.

    completions: texts, or chats whose last message is the answer. gt_box: xyxy px of the original
    image;
    image_wh: px; both one per completion, as TRL passes data set columns. Other columns (kwargs)
    are not read.
    frame: what the numbers in the completions mean; both model families write 0-1000.
    """
    if not len(completions) == len(gt_box) == len(image_wh):
        raise ValueError(
            f"completions, gt_box and image_wh differ in length: {len(completions)}, "
            f"{len(gt_box)}, {len(image_wh)}"
        )
    return [
        grounding_reward(
            parse_completion(_text(completion), frame=frame, image_wh=tuple(wh)).box, gt, weight
        )
        for completion, gt, wh in zip(completions, gt_box, image_wh, strict=True)
    ]


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Sequence[float] | str,
    extra_info: Mapping | None = None,
) -> float:
    """VeRL's reward function.

    data_source: not read. ground_truth: xyxy, or the same as JSON text. extra_info: the image's
    size in px, as "width" and "height" or as "image_wh"; and, where they are not the defaults,
    "ground_truth_frame" ("pixel"; the parquet files released with the paper hold "norm_1000"),
    "frame" of the answer ("norm_1000") and "weight" (0.5).
    Raises ValueError where the size is missing or the ground truth is no box.
    """
    info = extra_info or {}
    if "image_wh" in info:
        image_wh = tuple(info["image_wh"])
    elif "width" in info and "height" in info:
        image_wh = info["width"], info["height"]
    else:
        raise ValueError(
            'extra_info must hold the image size as "width" and "height", or as "image_wh": '
            f"{info!r}"
        )
    gt = json.loads(ground_truth) if isinstance(ground_truth, str) else ground_truth
    gt_px = convert(gt, BoxFrame(info.get("ground_truth_frame", "pixel")), BoxFrame.PIXEL, image_wh)
    parsed = parse_completion(
        solution_str, frame=BoxFrame(info.get("frame", "norm_1000")), image_wh=image_wh
    )
    return grounding_reward(parsed.box, gt_px, info.get("weight", 0.5))


def _text(completion: str | Sequence[Mapping]) -> str:
    """The text of a completion; of the last message, and of all its text parts, where it is a
    chat.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"] if completion else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())
