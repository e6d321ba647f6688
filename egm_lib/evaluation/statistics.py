"""Means with intervals, differences between models with their evidence, and fixed random draws.

Expressions on one image are not independent. So every interval comes from a bootstrap that draws
images (and seeds if a run has several), never samples.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from egm_lib.errors import InputError
from egm_lib.evaluation.scoring import codes, split_keys


@dataclass(frozen=True)
class Estimate:
    """A mean, its 95 % interval (None if there are too few draws), and the number of rows."""

    mean: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Difference:
    """Model a minus model b on the samples that both answered.

    p_value: two-sided, from the standard error clustered on images and seeds.
    only_a, only_b: how many samples only one of the two solves.
    mcnemar_p: McNemar's test on these; None if several seeds repeat a sample.
    """

    mean: float
    ci95: tuple[float, float] | None
    n: int
    p_value: float | None
    only_a: int
    only_b: int
    mcnemar_p: float | None


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
    Images are drawn over all groups at once, since RefCOCO's splits share images. seeds_N:
    training seeds are drawn too, crossed with images (few seeds understate their share of the
    variance: n seeds by (n - 1) / n). A draw that leaves a group empty is nan.
    """
    values_N_M = np.asarray(values_N_M, dtype=float)
    if values_N_M.ndim == 1:
        values_N_M = values_N_M[:, None]
    num_values = values_N_M.shape[1]
    cluster_N, num_clusters = codes(clusters_N)
    group_N, num_groups = codes(groups_N if groups_N is not None else np.zeros(len(values_N_M)))
    seed_N, num_seeds = codes(seeds_N if seeds_N is not None else np.zeros(len(values_N_M)))
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


def bootstrap_interval(draws_D: np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the draws; None if there are too few."""
    draws_D = draws_D[np.isfinite(draws_D)]
    if len(draws_D) < 20:
        return None
    low, high = np.percentile(draws_D, [2.5, 97.5])
    return float(low), float(high)


def _mean_of_groups(values_N: np.ndarray, groups_N: Sequence | None) -> float:
    if groups_N is None:
        return float(np.mean(values_N))
    group_N, num_groups = codes(groups_N)
    return float(
        np.mean(np.bincount(group_N, weights=values_N) / np.bincount(group_N, minlength=num_groups))
    )


def image_clusters(scored: pd.DataFrame) -> pd.Series:
    """The cluster of each row. RefCOCO, RefCOCO+ and RefCOCOg share COCO's images and ids."""
    return scored["image_id"].astype(str)


def seed_codes(scored: pd.DataFrame) -> pd.Series | None:
    return scored["seed"] if "seed" in scored and scored["seed"].nunique() > 1 else None


def estimate(
    scored: pd.DataFrame,
    column: str = "success",
    *,
    over_splits: bool = False,
    draws: int = 2000,
    rng_seed: int = 0,
) -> Estimate | None:
    """Mean of a column with its clustered interval; None without rows.

    over_splits: the plain mean of the splits' means.
    """
    rows = scored[scored[column].notna()]
    if rows.empty:
        return None
    values_N = rows[column].to_numpy(dtype=float)
    groups_N = split_keys(rows) if over_splits else None
    draws_D_1 = bootstrap_means(
        values_N,
        image_clusters(rows),
        groups_N=groups_N,
        seeds_N=seed_codes(rows),
        draws=draws,
        rng_seed=rng_seed,
    )
    interval = bootstrap_interval(draws_D_1[:, 0]) if _several_images(rows) else None
    return Estimate(_mean_of_groups(values_N, groups_N), interval, len(rows))


def _several_images(rows: pd.DataFrame) -> bool:
    """One image says nothing about others, so that there is no interval."""
    return image_clusters(rows).nunique() > 1


def sample_fixed(items: Sequence, count: int) -> list:
    """`count` of the items, drawn at random but the same in every call, in their order."""
    chosen = sorted(random.Random(0).sample(range(len(items)), min(count, len(items))))
    return [items[index] for index in chosen]


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: P that a fair coin splits the pairs as unevenly."""
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

    Raises ValueError if a model has two rows for one sample, since then no pairing is right.
    """
    keys = ["sample_id", "seed"] if "seed" in a and "seed" in b else ["sample_id"]
    for frame in (a, b):
        if frame.duplicated(keys).any():
            twice = frame.loc[frame.duplicated(keys), "sample_id"].iloc[0]
            raise InputError(
                f"sample {twice} has more than one row for one model and seed: pass one model at a "
                "time"
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
    """Model a minus model b, paired on samples, with an interval clustered on images.

    None without a common sample. over_splits: the plain mean of the splits' differences.
    """
    both = pair(a, b, column)
    if both.empty:
        return None
    return difference_of(both, over_splits=over_splits, draws=draws, rng_seed=rng_seed)


def difference_of(
    both: pd.DataFrame, *, over_splits: bool = False, draws: int = 2000, rng_seed: int = 0
) -> Difference:
    """The difference between the columns a and b of a table that `pair` made."""
    delta_N = both["a"].to_numpy(float) - both["b"].to_numpy(float)
    groups_N, seeds_N = (split_keys(both) if over_splits else None), seed_codes(both)
    draws_D = bootstrap_means(
        delta_N,
        image_clusters(both),
        groups_N=groups_N,
        seeds_N=seeds_N,
        draws=draws,
        rng_seed=rng_seed,
    )[:, 0]
    mean = _mean_of_groups(delta_N, groups_N)
    interval = bootstrap_interval(draws_D) if _several_images(both) else None
    p_value = None
    if interval is not None:
        error = float(np.nanstd(draws_D, ddof=1))
        if error > 0:
            p_value = float(2 * stats.norm.sf(abs(mean) / error))
        elif mean == 0:
            p_value = 1.0
    only_a, only_b = int((delta_N > 0).sum()), int((delta_N < 0).sum())
    mcnemar_p = mcnemar(only_a, only_b) if seeds_N is None else None
    return Difference(mean, interval, len(both), p_value, only_a, only_b, mcnemar_p)
