"""What the images of a GRPO step cost on one GPU of eight: 32 prompts, 16 completions each.

TRL processes the image of every completion twice a step. `processed_once` does it once for each
image, and copies the result. CPU seconds of one thread; Qwen3-VL's processor, 640 x 480 px.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from bench_plan import image_processor, noise_samples
from PIL import Image

from egm_lib.training.step_images import processed_once

PROMPTS, COMPLETIONS, TIMES = 32, 16, 2


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    processor = image_processor()
    images = [
        Image.open(folder / sample["image"]).convert("RGB")
        for sample in noise_samples(folder, PROMPTS)
    ]
    rows = [[image] for image in images for _ in range(COMPLETIONS)]
    for name, way in (("every row", nullcontext), ("once", lambda: processed_once(processor))):
        began = time.process_time()
        with way():
            for _ in range(TIMES):
                processor(rows, return_tensors="pt")
        print(f"{name:10} {time.process_time() - began:6.1f} s for {len(rows)} rows, twice")


if __name__ == "__main__":
    main()
