"""Which samples to train on with RL (Sec. 4.2): those that only a stronger reference solves."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from pandas.util import hash_array

# (low, high, share): how the released code divides the easy half by the learner's IoU, low <= IoU <
# high. The last bucket gets what is left.
IOU_BUCKETS = (
    (0.5, 0.6, 0.15),
    (0.6, 0.7, 0.20),
    (0.7, 0.8, 0.20),
    (0.8, 0.9, 0.20),
    (0.9, np.inf, None),
)
EASY_RULES = ("uniform", "iou-buckets")


def select_learnable(
    learner_success_N: ArrayLike,
    reference_success_N: ArrayLike,
    *,
    seed: int,
    easy: str = "uniform",
    sample_ids: Sequence[str] | None = None,
    learner_iou_N: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the hard and of the easy half, both ascending.

    Hard: learnability = S_reference - S_learner > 0.
    Easy: as many of the samples that the learner solves, drawn by the rule `easy`. "uniform" is the
    paper's. "iou-buckets" is that of the released code (there with seed 42); it needs
    learner_iou_N, and takes fewer from a bucket that does not have enough.
    sample_ids: the draw depends on these, not on the order of rows; None: it depends on the order.
    Warns if the learner solves fewer samples than there are hard ones, and takes them all.
    Raises ValueError if lengths differ, an id occurs twice, a success is not 0 or 1, or `easy` is
    unknown.
    """
    learner_N = _successes(learner_success_N, "learner_success_N")
    reference_N = _successes(reference_success_N, "reference_success_N")
    size = len(learner_N)
    ids_N = np.arange(size) if sample_ids is None else np.asarray(sample_ids, dtype=object)
    columns = {"reference_success_N": reference_N, "sample_ids": ids_N}
    if easy == "iou-buckets":
        if learner_iou_N is None:
            raise ValueError('easy="iou-buckets" needs learner_iou_N')
        columns["learner_iou_N"] = learner_iou_N = np.asarray(learner_iou_N, dtype=np.float64)
    elif easy != "uniform":
        raise ValueError(f"unknown easy rule {easy!r}: use one of {', '.join(EASY_RULES)}")
    for name, column in columns.items():
        if len(column) != size:
            raise ValueError(f"{name} has {len(column)} rows, learner_success_N has {size}")

    priority_N = _priorities(ids_N, seed)
    hard = np.flatnonzero(reference_N & ~learner_N)
    right = np.flatnonzero(learner_N)
    if len(right) < len(hard):
        warnings.warn(
            f"only {len(right):,} easy samples for {len(hard):,} hard ones: the learner solves no "
            "more; taking all",
            stacklevel=2,
        )
    if easy == "uniform":
        return hard, _lowest(right, priority_N, len(hard))
    drawn, left = [], len(hard)
    for low, high, share in IOU_BUCKETS:
        quota = left if share is None else min(round(len(hard) * share), left)
        left -= quota
        in_bucket = right[(learner_iou_N[right] >= low) & (learner_iou_N[right] < high)]
        drawn.append(_lowest(in_bucket, priority_N, quota))
    return hard, np.sort(np.concatenate(drawn))


def _successes(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one value a sample, got shape {array.shape}")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(f"{name} must be 0 or 1, got {array[~np.isin(array, (0, 1))][0]!r}")
    return array.astype(bool)


def _priorities(ids_N: np.ndarray, seed: int) -> np.ndarray:
    """A uniform 64-bit number for each sample, from its id and the seed alone."""
    hash_N = hash_array(ids_N, categorize=False)
    sorted_N = np.sort(hash_N)
    if (sorted_N[1:] == sorted_N[:-1]).any():
        names, counts = np.unique(ids_N.astype(str), return_counts=True)
        if (counts > 1).any():
            repeated = names[counts > 1]
            raise ValueError(
                f"{len(repeated):,} sample ids occur more than once, such as {str(repeated[0])!r}"
            )
    # splitmix64 over hash and seed, because hash_array takes a seed for strings only
    mixed_N = hash_N + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_N = (mixed_N ^ (mixed_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed_N ^ (mixed_N >> np.uint64(31))


def _lowest(rows: np.ndarray, priority_N: np.ndarray, count: int) -> np.ndarray:
    """The `count` rows with the lowest priority numbers, ascending; all rows if there are fewer."""
    if count >= len(rows):
        return rows
    return np.sort(rows[np.argpartition(priority_N[rows], count)[:count]])
