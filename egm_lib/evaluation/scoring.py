"""Prediction files -> rows with IoU and success, by any rule of the parser."""

from collections.abc import Iterable, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd

from egm_lib.boxes import BoxFrame, iou
from egm_lib.files import iter_jsonl
from egm_lib.parsing import parse_completion
from egm_lib.scoring_rules import PEER_RULES

SCORING_COLUMNS = (
    "sample_id",
    "dataset",
    "split",
    "task",
    "image_id",
    "expression",
    "gt_box",
    "width",
    "height",
    "frame",
    "prompt_kind",
    "num_lookalikes",
    "model",
    "seed",
    "raw_answer",
    "status",
    "finish_reason",
    "reasoning_tokens",
    "answer_tokens",
)


BATCH_ROWS = 20_000  # rows held as Python objects at a time


def load_predictions(
    paths: Path | Iterable[Path], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Prediction rows as a frame; a folder stands for every *.jsonl below it, in the order of
    names.

    columns: keep these alone (SCORING_COLUMNS is all that `score` and the tables need, and a third
    of the memory).
    """
    paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    files = [
        file
        for path in paths
        for file in (sorted(path.rglob("*.jsonl")) if path.is_dir() else [path])
    ]
    rows = chain.from_iterable(map(iter_jsonl, files))
    parts = []
    while batch := list(islice(rows, BATCH_ROWS)):
        names = columns or list(dict.fromkeys(chain.from_iterable(batch)))
        parts.append(pd.DataFrame({name: [row.get(name) for row in batch] for name in names}))
    return (
        pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(columns or ()))
    )


def score(predictions: pd.DataFrame, rule: str = "egm") -> pd.DataFrame:
    """Each answer read by `rule` and compared with its ground truth (Eq. 1).

    Adds iou (0 without a box), success, num_boxes, and status as this rule sees it; a row of status
    "error" stays one. Rules of other evaluators that accept IoU = 0.5 do so here too.
    """
    inclusive = rule != "egm" and PEER_RULES[rule].inclusive
    columns = [
        predictions[name].tolist() for name in ("raw_answer", "gt_box", "width", "height", "status")
    ]
    frames = predictions["frame"].tolist() if "frame" in predictions else [None] * len(predictions)
    ious, counts, statuses = [], [], []
    for raw_answer, gt_box, width, height, status, frame in zip(*columns, frames, strict=True):
        if status == "error" or not isinstance(raw_answer, str):
            ious.append(0.0), counts.append(0), statuses.append("error")
            continue
        box_frame = BoxFrame[frame] if isinstance(frame, str) else BoxFrame.NORM_1000
        parsed = parse_completion(raw_answer, frame=box_frame, image_wh=(width, height), rule=rule)
        ious.append(0.0 if parsed.box is None else iou(parsed.box, gt_box))
        counts.append(len(parsed.boxes))
        statuses.append(parsed.status)
    iou_N = np.array(ious, dtype=float)
    success_N = iou_N >= 0.5 if inclusive else iou_N > 0.5
    return predictions.assign(iou=iou_N, success=success_N, num_boxes=counts, status=statuses)


def codes(values: Iterable) -> tuple[np.ndarray, int]:
    codes, uniques = pd.factorize(pd.Series(list(values), dtype=object), use_na_sentinel=False)
    return codes, len(uniques)


def split_keys(scored: pd.DataFrame) -> pd.Series:
    """The evaluation split of each row, as in the file names: refcoco+_testA."""
    return scored["dataset"].astype(str) + "_" + scored["split"].astype(str)


def with_strata(scored: pd.DataFrame) -> pd.DataFrame:
    """Adds the strata of the breakdowns: size (share of the image's side) and length (words of
    the expression).
    """
    boxes_N_4 = np.array(scored["gt_box"].tolist(), dtype=float).reshape(-1, 4)
    area_N = (boxes_N_4[:, 2] - boxes_N_4[:, 0]) * (boxes_N_4[:, 3] - boxes_N_4[:, 1])
    side_N = np.sqrt(
        np.maximum(area_N, 0) / (scored["width"].to_numpy(float) * scored["height"].to_numpy(float))
    )
    words_N = scored["expression"].str.split().str.len()
    return scored.assign(
        size=pd.cut(
            side_N,
            [-1, 0.15, 0.3, 9],
            labels=["small (side < 15 %)", "medium (15-30 %)", "large (> 30 %)"],
        ),
        length=pd.cut(
            words_N,
            [-1, 3, 7, 12, 9999],
            labels=["1-3 words", "4-7 words", "8-12 words", "13+ words"],
        ),
    )
