"""Time and memory of scoring 575,208 predictions (the size of the paper's SFT data) with intervals.

    python benchmarks/bench_scoring.py [--rows 575208]

Prediction files with realistic reasoning (two sentences) are written to a temporary folder. Another
process reads, parses, scores and bootstraps them; its peak memory is reported. Goal: 60 s and 2 GB.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REASONING = (
    "There are three people in a row. The second from the left wears a red shirt and holds a "
    "racket."
)


def write_rows(path: Path, rows: int) -> None:
    rng = random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(rows):
            box = [
                rng.randrange(100),
                rng.randrange(100),
                400 + rng.randrange(200),
                400 + rng.randrange(200),
            ]
            answer = f'```json\n[\n\t{{"bbox_2d": {box}, "label": "the second person"}}\n]\n```'
            row = {
                "sample_id": f"refcoco-train-{number}",
                "dataset": "refcoco",
                "split": "val",
                "task": "vanilla",
                "image": f"COCO_train2014_{number // 24:012d}.jpg",
                "width": 640,
                "height": 480,
                "expression": "the second person from the left",
                "gt_box": [10.5, 20.25, 310.0, 230.75],
                "image_id": str(number // 24),
                "prompt_kind": None,
                "num_lookalikes": None,
                "model": "small-egm",
                "revision": None,
                "profile": "bench",
                "seed": 0,
                "prompt": "Locate the second person from the left, output its bbox coordinates "
                "using JSON format.",
                "raw_answer": f"<think>\n{REASONING}\n</think>\n\n{answer}",
                "frame": "NORM_1000",
                "reasoning": REASONING,
                "boxes": [box],
                "box": box,
                "status": "ok",
                "error": None,
                "prompt_tokens": 300,
                "reasoning_tokens": 40,
                "answer_tokens": 30,
                "finish_reason": "stop",
                "latency_ms": None,
            }
            file.write(json.dumps(row) + "\n")


def measure(path: Path) -> None:
    from egm_lib.evaluation.metrics import metrics
    from egm_lib.evaluation.scoring import SCORING_COLUMNS, load_predictions, score
    from egm_lib.evaluation.statistics import estimate

    start, cpu_start = time.perf_counter(), time.process_time()
    predictions = load_predictions(path, SCORING_COLUMNS)
    loaded = time.perf_counter()
    scored = score(predictions)
    parsed = time.perf_counter()
    table = metrics(scored, draws=1000)
    accuracy = estimate(scored, over_splits=True, draws=1000)
    done = time.perf_counter()
    cpu = time.process_time() - cpu_start
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{len(scored):,} predictions: read {loaded - start:.1f} s, parse and score "
        f"{parsed - loaded:.1f} s"
    )
    print(
        f"intervals {done - parsed:.1f} s; all {done - start:.1f} s ({cpu:.1f} s of CPU), peak "
        f"{peak_gb:.2f} GB"
    )
    print(
        f"acc_at_50 {accuracy.mean:.4f} {accuracy.ci95}, mean IoU {table['mean_iou'].iloc[0]:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=575_208)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.jsonl"
        write_rows(path, args.rows)
        print(f"file: {path.stat().st_size / 1e6:.0f} MB")
        subprocess.run([sys.executable, __file__, "--measure", str(path)], check=True)


if __name__ == "__main__":
    main()
