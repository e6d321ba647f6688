"""Answers for scoring, and scored rows with given successes."""

import numpy as np
import pandas as pd


def answers(boxes, **columns) -> pd.DataFrame:
    """Prediction rows for a 100 x 100 image whose target is the upper left quarter.

    boxes: in 0..1000; None for an answer without a box.
    """
    texts = ["I see none." if box is None else f'[{{"bbox_2d": {list(box)}}}]' for box in boxes]
    count = len(boxes)
    frame = pd.DataFrame(
        {
            "sample_id": [f"s{number}" for number in range(count)],
            "dataset": "refcoco",
            "split": "val",
            "task": "vanilla",
            "image_id": [str(number // 2) for number in range(count)],
            "expression": "red one",
            "model": "m",
            "seed": 0,
            "gt_box": [[0.0, 0.0, 50.0, 50.0]] * count,
            "width": 100,
            "height": 100,
            "frame": "NORM_1000",
            "raw_answer": texts,
            "status": "ok",
            "finish_reason": "stop",
            "reasoning_tokens": 0,
            "answer_tokens": 10,
        }
    )
    return frame.assign(**columns)


def outcomes(success, clusters=None, seed=0, split="val") -> pd.DataFrame:
    """Scored rows with given successes."""
    count = len(success)
    return pd.DataFrame(
        {
            "sample_id": [f"s{number}" for number in range(count)],
            "dataset": "refcoco",
            "split": split,
            "seed": seed,
            "image_id": list(map(str, range(count) if clusters is None else clusters)),
            "success": np.array(success, bool),
        }
    )
