"""Time and memory of reading many samples.

    python benchmarks/bench_data.py 57000 575000 5750000

Each number of rows is measured in a separate process. It prints Markdown: wall and CPU seconds of
each step, and the peak memory so far. Goal for 575,000 rows: the first row in 2 s, stats in 20 s,
at most 1.5 GB, and linear growth.
"""

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from egm_lib.data import load_jsonl, read_samples
from egm_lib.data.leakage import remove_leakage
from egm_lib.data.survey import describe

SAMPLES_PER_IMAGE = 23  # Table 3: 575,208 / 24,407


def write_rows(folder: Path, count: int) -> tuple[Path, Path]:
    """`count` synthetic samples as our records and in the form of other evaluators."""
    rng = random.Random(0)
    ours, theirs = folder / "samples.jsonl", folder / "evaluator.jsonl"
    with open(ours, "w") as samples, open(theirs, "w") as lines:
        for number in range(count):
            image_number = rng.randrange(max(count // SAMPLES_PER_IMAGE, 1))
            x, y = round(rng.random() * 300, 2), round(rng.random() * 200, 2)
            common = dict(
                image=f"train2014/COCO_train2014_{image_number:012d}.jpg", width=640, height=480
            )
            box, words = [x, y, x + 100, y + 80], "second woman from the left in a blue coat"
            lines.write(json.dumps(common | dict(sent=words, bbox=box)) + "\n")
            samples.write(
                json.dumps(
                    common
                    | dict(
                        sample_id=f"s{number}",
                        dataset="refcoco",
                        split="train",
                        task="vanilla",
                        expression=words,
                        gt_box=box,
                        modal_box=None,
                        image_id=str(image_number),
                        ann_id=str(number),
                        ref_id=str(number),
                        flipped=False,
                    )
                )
                + "\n"
            )
    return ours, theirs


def measure(count: int) -> None:
    def step(name, work):
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(f"| {count:,} | {name} | {wall:.2f} | {cpu:.2f} | {peak_gb:.2f} |", flush=True)
        return result

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = write_rows(Path(folder), count)
        samples = step("load, first row", lambda: _first(read_samples(ours)))
        step(
            "remove leakage",
            lambda: remove_leakage([samples], [samples.select(range(count // 50))]),
        )
        step("shuffle, first row", lambda: _first(samples.shuffle(seed=0)))
        step("stats", lambda: describe(samples))
        step(
            "load_jsonl, first row",
            lambda: _first(load_jsonl(theirs, dataset="refcoco", split="train")),
        )


def _first(samples):
    _ = samples[0]
    return samples


if __name__ == "__main__":
    counts = [int(argument) for argument in sys.argv[1:]] or [57_000, 575_000]
    if len(counts) == 1:
        measure(counts[0])
    else:
        print(
            "| rows | step | wall, s | CPU, s | peak so far, GB |\n|---|---|---|---|---|",
            flush=True,
        )
        for count in counts:
            subprocess.run([sys.executable, __file__, str(count)], check=True)
