"""CPU seconds of selecting RL samples from the paper's 575,000 rows, a tenth, and ten times them.

python benchmarks/bench_learnability.py
"""

import time

import numpy as np

from egm_lib.learnability import select_learnable


def main() -> None:
    rng = np.random.default_rng(0)
    for size in (57_000, 575_000, 5_750_000):
        learner, reference = rng.random(size) < 0.88, rng.random(size) < 0.92
        ids = np.array([f"refcoco/train/{number}" for number in range(size)], dtype=object)
        iou = np.where(learner, rng.uniform(0.5, 1, size), 0.2)
        for easy in ("uniform", "iou-buckets"):
            start = time.process_time()
            hard, drawn = select_learnable(
                learner, reference, seed=42, easy=easy, sample_ids=ids, learner_iou_N=iou
            )
            took = time.process_time() - start
            print(
                f"{size:>9,} rows, {easy:11}: {took:6.3f} s, {took / size * 1e9:5.0f} ns a row; "
                f"{len(hard):,} hard, {len(drawn):,} easy"
            )


if __name__ == "__main__":
    main()
