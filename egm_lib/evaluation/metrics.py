"""Metrics of groups of rows: accuracy, mean IoU, faulty answers, tokens."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from egm_lib.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_means,
    image_clusters,
    seed_codes,
)

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100  # COCO's 0.50:0.05:0.95


def metrics(
    scored: pd.DataFrame, by: str | Sequence[str] = (), *, draws: int = 1000, rng_seed: int = 0
) -> pd.DataFrame:
    """One row a group, with shares in 0..1; without `by` all rows are one group.

    Columns: n, acc_at_50 with acc_low and acc_high, mean_iou with iou_low and iou_high, acc_50_95
    (mean accuracy over the IoU thresholds 0.50:0.05:0.95), the shares no_box, several_boxes,
    unclosed_reasoning, malformed, error and truncated, and the mean tokens of an answer.
    """
    by = [by] if isinstance(by, str) else list(by)
    groups = scored.groupby(by, sort=True, observed=True) if by else [((), scored)]
    rows = []
    for key, group in groups:
        iou_N = group["iou"].to_numpy(float)
        success_N = group["success"].to_numpy(float)
        both_N_2 = np.stack([success_N, iou_N], axis=1)
        draws_D_2 = bootstrap_means(
            both_N_2,
            image_clusters(group),
            seeds_N=seed_codes(group),
            draws=draws,
            rng_seed=rng_seed,
        )
        (acc_low, acc_high), (iou_low, iou_high) = (
            bootstrap_interval(column) or (np.nan, np.nan) for column in draws_D_2.T
        )
        status_N = group["status"]
        rows.append(
            {
                **dict(zip(by, key, strict=True)),
                "n": len(group),
                "acc_at_50": success_N.mean(),
                "acc_low": acc_low,
                "acc_high": acc_high,
                "mean_iou": iou_N.mean(),
                "iou_low": iou_low,
                "iou_high": iou_high,
                "acc_50_95": np.mean([(iou_N > threshold).mean() for threshold in IOU_THRESHOLDS]),
                "several_boxes": (group["num_boxes"] > 1).mean(),
                **{
                    name: (status_N == name).mean()
                    for name in ("no_box", "unclosed_reasoning", "malformed", "error")
                },
                "truncated": (group["finish_reason"] == "length").mean(),
                "reasoning_tokens": group["reasoning_tokens"].mean(),
                "answer_tokens": group["answer_tokens"].mean(),
            }
        )
    return pd.DataFrame(rows)
