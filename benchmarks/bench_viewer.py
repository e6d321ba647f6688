"""How long the trace viewer takes to open, filter, sort and walk 10,000 samples of two models.

Prediction files as the evaluation writes them, with a trace for every sample, and 64 images of
640 x 480 pixels are written to a temporary folder. The script reports CPU seconds of one process,
and the bytes that the page gets for a sample.

    python benchmarks/bench_viewer.py
"""

import json
import random
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from egm_lib.viewer import TraceViewer

SAMPLES, IMAGES, IMAGE_WH = 10_000, 64, (640, 480)
TRACE = (
    "There are three people at the table; the second one from the left wears a red hat, the others "
    "do not. " * 6
)


def write_world(root: Path) -> None:
    rng = random.Random(0)
    noise = np.random.default_rng(0)
    (root / "images").mkdir()
    for number in range(IMAGES):
        small = noise.integers(0, 256, (IMAGE_WH[1] // 8, IMAGE_WH[0] // 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(IMAGE_WH).save(root / "images" / f"{number}.jpg")
    for model in ("small-base", "small-egm"):
        folder = root / "predictions" / model
        folder.mkdir(parents=True)
        with open(folder / "refcoco_val.jsonl", "w", encoding="utf-8") as file:
            for number in range(SAMPLES):
                gt_box = [100.0, 100.0, 300.0, 260.0]
                box = gt_box if rng.random() < 0.6 else [320.0, 100.0, 500.0, 260.0]
                file.write(
                    json.dumps(
                        {
                            "sample_id": f"s{number}",
                            "dataset": "refcoco",
                            "split": "val",
                            "task": "vanilla",
                            "model": model,
                            "image": f"images/{number % IMAGES}.jpg",
                            "width": IMAGE_WH[0],
                            "height": IMAGE_WH[1],
                            "expression": f"person {number} from the left",
                            "gt_box": gt_box,
                            "modal_box": None,
                            "seed": 0,
                            "prompt_kind": "ordinal",
                            "num_lookalikes": number % 5,
                            "frame": "NORM_1000",
                            "box": box,
                            "boxes": [box],
                            "status": "ok",
                            "error": None,
                            "reasoning": TRACE,
                            "reasoning_tokens": 150,
                            "raw_answer": f"{TRACE}</think>\n\n[{{'bbox_2d': {box}}}]",
                            "answer_tokens": 20,
                        }
                    )
                    + "\n"
                )


def cpu_s(act) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root, opened = Path(folder), []
        write_world(root)
        opening = cpu_s(lambda: opened.append(TraceViewer(root / "predictions", root=root)))
        [viewer] = opened
        print(f"open {viewer.total:,} samples of {len(viewer.models)} models: {opening:.2f} CPU s")
        filtering = cpu_s(lambda: viewer.set_trait("filter", {"show": "B solves what A misses"}))
        sorting = cpu_s(lambda: viewer.set_trait("sort", "gain A to B, high first"))
        print(
            f"filter ({viewer.count:,} left): {1000 * filtering:.0f} ms; sort: "
            f"{1000 * sorting:.0f} ms"
        )
        steps = 50
        walking = cpu_s(lambda: [viewer.set_trait("index", place) for place in range(1, steps + 1)])
        print(
            f"next sample: {1000 * walking / steps:.1f} ms, "
            f"{len(json.dumps(viewer.view)) / 1000:.0f} kB to the page"
        )


if __name__ == "__main__":
    main()
