"""Prediction files -> metrics with intervals, and differences between models with their evidence.

IoU and success are never stored: `score` reads them from the raw answers, by any rule of the
parser, so that the same files can be scored as other evaluators would. Expressions on one picture
are not independent, so every interval comes from a bootstrap that draws pictures (and seeds, where
a run has several), never samples.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from egm_lib.boxes import BoxFrame, iou
from egm_lib.parsing import parse_completion
from egm_lib.peer_rules import PEER_RULES

IOU_THRESHOLDS = np.arange(50, 100, 5) / 100  # COCO's 0.50:0.05:0.95
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


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval (None where it cannot be had), and the number of rows behind it."""

    mean: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Model a minus model b on the samples that both answered.

    p_value: two-sided, from the clustered standard error (pictures, seeds).
    only_a, only_b: discordant samples of McNemar's test; mcnemar_p: None where several seeds repeat
    a sample.
    """

    mean: float
    ci95: tuple[float, float] | None
    n: int
    p_value: float | None
    only_a: int
    only_b: int
    mcnemar_p: float | None


def iter_rows(path: Path) -> Iterator[dict]:
    """The rows of a JSONL file; a last line that a kill cut short is left out, any other bad line
    is a ValueError.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                if not line.endswith("\n"):
                    return
                raise ValueError(
                    f"{path}, line {number}: not JSON ({error.msg}); delete this line"
                ) from error


def read_rows(path: Path) -> list[dict]:
    """`iter_rows` as a list."""
    return list(iter_rows(path))


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
    rows = chain.from_iterable(map(iter_rows, files))
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


def _codes(values: Iterable) -> tuple[np.ndarray, int]:
    codes, uniques = pd.factorize(pd.Series(list(values), dtype=object), use_na_sentinel=False)
    return codes, len(uniques)


def bootstrap_means(
    values_N_M: np.ndarray,
    clusters_N: Sequence,
    *,
    groups_N: Sequence | None = None,
    seeds_N: Sequence | None = None,
    draws: int = 2000,
    rng_seed: int = 0,
) -> np.ndarray:
    """Bootstrap draws of a mean whose rows come in clusters; returns draws x M.

    groups_N: the statistic is the plain mean of the groups' means (the paper's mean over splits).
    Pictures are drawn over all groups at once, since RefCOCO's splits share pictures. seeds_N:
    training seeds are drawn too, crossed with pictures (few seeds understate their share of the
    variance: n seeds by (n - 1) / n). A draw that leaves a group empty is nan.
    """
    values_N_M = np.asarray(values_N_M, dtype=float)
    if values_N_M.ndim == 1:
        values_N_M = values_N_M[:, None]
    num_values = values_N_M.shape[1]
    cluster_N, num_clusters = _codes(clusters_N)
    group_N, num_groups = _codes(groups_N if groups_N is not None else np.zeros(len(values_N_M)))
    seed_N, num_seeds = _codes(seeds_N if seeds_N is not None else np.zeros(len(values_N_M)))
    cell_N = (seed_N * num_clusters + cluster_N) * num_groups + group_N
    shape = (num_seeds, num_clusters, num_groups)
    counts_K_C_G = np.bincount(cell_N, minlength=np.prod(shape)).reshape(shape).astype(float)
    sums_K_C_GM = np.stack(
        [
            np.bincount(cell_N, weights=values_N_M[:, m], minlength=np.prod(shape))
            for m in range(num_values)
        ],
        axis=-1,
    ).reshape(num_seeds, num_clusters, num_groups * num_values)
    rng = np.random.default_rng(rng_seed)
    # At most 160 MB of weights at a time
    step = max(1, min(draws, 20_000_000 // max(1, num_clusters)))
    parts = []
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn_D_C = (
            rng.integers(num_clusters, size=(size, num_clusters))
            + num_clusters * np.arange(size)[:, None]
        )
        weights_D_C = (
            np.bincount(drawn_D_C.ravel(), minlength=size * num_clusters)
            .reshape(size, -1)
            .astype(float)
        )
        weights_D_K = rng.multinomial(
            num_seeds, np.full(num_seeds, 1 / num_seeds), size=size
        ).astype(float)
        sums_D_G_M, counts_D_G = 0.0, 0.0
        for k in range(num_seeds):
            sums_D_G_M += weights_D_K[:, k, None, None] * (weights_D_C @ sums_K_C_GM[k]).reshape(
                size, num_groups, -1
            )
            counts_D_G += weights_D_K[:, k, None] * (weights_D_C @ counts_K_C_G[k])
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((sums_D_G_M / counts_D_G[:, :, None]).mean(axis=1))
    return np.concatenate(parts)


def _interval(draws_D: np.ndarray) -> tuple[float, float] | None:
    draws_D = draws_D[np.isfinite(draws_D)]
    if len(draws_D) < 20:
        return None
    low, high = np.percentile(draws_D, [2.5, 97.5])
    return float(low), float(high)


def _mean_of_groups(values_N: np.ndarray, groups_N: Sequence | None) -> float:
    if groups_N is None:
        return float(np.mean(values_N))
    group_N, num_groups = _codes(groups_N)
    return float(
        np.mean(np.bincount(group_N, weights=values_N) / np.bincount(group_N, minlength=num_groups))
    )


def split_keys(scored: pd.DataFrame) -> pd.Series:
    """The evaluation split of each row, as in the file names: refcoco+_testA."""
    return scored["dataset"].astype(str) + "_" + scored["split"].astype(str)


def _pictures(scored: pd.DataFrame) -> pd.Series:
    """The cluster of each row; RefCOCO, RefCOCO+ and RefCOCOg share COCO's pictures and their
    ids.
    """
    return scored["image_id"].astype(str)


def _seeds(scored: pd.DataFrame) -> pd.Series | None:
    return scored["seed"] if "seed" in scored and scored["seed"].nunique() > 1 else None


def estimate(
    scored: pd.DataFrame,
    column: str = "success",
    *,
    over_splits: bool = False,
    draws: int = 2000,
    rng_seed: int = 0,
) -> Estimate | None:
    """Mean of a column with its clustered interval; over_splits: the plain mean of the splits'
    means. None if empty.
    """
    rows = scored[scored[column].notna()]
    if rows.empty:
        return None
    values_N = rows[column].to_numpy(dtype=float)
    groups_N = split_keys(rows) if over_splits else None
    draws_D_1 = bootstrap_means(
        values_N,
        _pictures(rows),
        groups_N=groups_N,
        seeds_N=_seeds(rows),
        draws=draws,
        rng_seed=rng_seed,
    )
    return Estimate(_mean_of_groups(values_N, groups_N), _interval(draws_D_1[:, 0]), len(rows))


def with_strata(scored: pd.DataFrame) -> pd.DataFrame:
    """Adds the strata of the breakdowns: size (share of the picture's side) and length (words of
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


def metrics(
    scored: pd.DataFrame, by: str | Sequence[str] = (), *, draws: int = 1000, rng_seed: int = 0
) -> pd.DataFrame:
    """One row a group (all rows are one group where `by` is empty), shares in 0..1.

    n, acc_at_50 with acc_low and acc_high, mean_iou with iou_low and iou_high, acc_50_95 (mean
    accuracy over the IoU thresholds 0.50:0.05:0.95), the shares no_box, several_boxes,
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
            both_N_2, _pictures(group), seeds_N=_seeds(group), draws=draws, rng_seed=rng_seed
        )
        (acc_low, acc_high), (iou_low, iou_high) = (
            _interval(column) or (np.nan, np.nan) for column in draws_D_2.T
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
                "reasoning_tokens": pd.to_numeric(group["reasoning_tokens"]).mean(),
                "answer_tokens": pd.to_numeric(group["answer_tokens"]).mean(),
            }
        )
    return pd.DataFrame(rows)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test on the discordant pairs: P of a split at least as uneven under a
    fair coin.
    """
    total = only_a + only_b
    return 1.0 if total == 0 else float(stats.binomtest(only_a, total, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of a table's p-values, in their order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted.tolist()


def pair(a: pd.DataFrame, b: pd.DataFrame, column: str = "success") -> pd.DataFrame:
    """The samples (and seeds) that both answered, with columns a and b.

    Raises ValueError where a model has two rows for one sample, since then no pairing is right.
    """
    keys = ["sample_id", "seed"] if "seed" in a and "seed" in b else ["sample_id"]
    for frame in (a, b):
        if frame.duplicated(keys).any():
            twice = frame.loc[frame.duplicated(keys), "sample_id"].iloc[0]
            raise ValueError(
                f"sample {twice} has more than one row for one model and seed: pass one model at a time"
            )
    left = a[[*keys, "dataset", "split", "image_id", column]].rename(columns={column: "a"})
    return left.merge(
        b[[*keys, column]].rename(columns={column: "b"}), on=keys, how="inner", sort=False
    )


def paired_difference(
    a: pd.DataFrame,
    b: pd.DataFrame,
    column: str = "success",
    *,
    over_splits: bool = False,
    draws: int = 2000,
    rng_seed: int = 0,
) -> Difference | None:
    """Model a minus model b, paired on samples, interval clustered on pictures. None without a
    common sample.
    """
    both = pair(a, b, column)
    if both.empty:
        return None
    delta_N = both["a"].to_numpy(float) - both["b"].to_numpy(float)
    groups_N, seeds_N = (split_keys(both) if over_splits else None), _seeds(both)
    draws_D = bootstrap_means(
        delta_N, _pictures(both), groups_N=groups_N, seeds_N=seeds_N, draws=draws, rng_seed=rng_seed
    )[:, 0]
    mean, interval = _mean_of_groups(delta_N, groups_N), _interval(draws_D)
    p_value = None
    if interval is not None:
        error = float(np.nanstd(draws_D, ddof=1))
        p_value = float(2 * stats.norm.sf(abs(mean) / error)) if error > 0 else float(mean == 0)
    only_a, only_b = int((delta_N > 0).sum()), int((delta_N < 0).sum())
    mcnemar_p = mcnemar(only_a, only_b) if seeds_N is None else None
    return Difference(mean, interval, len(both), p_value, only_a, only_b, mcnemar_p)
