"""Shared by tests of engines and prediction files: samples, requests, an engine without a model."""

import json

import numpy as np
from PIL import Image

from egm_lib.inference.engine import WINDOW_BATCHES, Answer, Request
from egm_lib.inference.predict import predict
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=20, max_new_tokens=12, repetition_penalty=1.0)


def sample(number: int, **changes) -> dict:
    return {
        "sample_id": f"s{number}",
        "dataset": "refcoco",
        "split": "val",
        "task": "vanilla",
        "image": f"{number % 3}.png",
        "width": 64,
        "height": 48,
        "expression": "the red one " + "and the next " * (number % 4),
        "gt_box": [0.0, 0.0, 32.0, 24.0],
        "image_id": str(number % 3),
        "flipped": False,
        **changes,
    }


class FakeEngine:
    """Answers the length of its prompt as a box; counts and keeps what it was asked."""

    family, revision, batch_size, seed = FAMILIES["qwen3-vl"], "r1", 2, 0
    window_batches = WINDOW_BATCHES

    def __init__(self, fails_on=lambda prompt: False):
        self.asked, self.fails_on, self.prompts, self.closed = 0, fails_on, [], False

    def describe(self):
        return {"engine": "fake"}

    def close(self):
        self.closed = True

    def answer(self, requests, sampling, *, reasoning=True):
        for request in requests:
            self.asked += 1
            self.prompts.append(request.prompt)
            if self.fails_on(request.prompt):
                yield Answer.failed(RuntimeError("no memory"))
            else:
                box = f'[{{"bbox_2d": [0, 0, {len(request.prompt)}, 500]}}]'
                text = f"<think>\nlook\n</think>\n\n{box}"
                yield Answer(text, 10, 3, 20, "stop", latency_ms=1.5)


def run(engine, samples, root, out, **options):
    common = {
        "model": "small-base",
        "profile": "test",
        "seed": 0,
        "root": root,
        "sampling": GREEDY,
        **options,
    }
    predict(samples, engine, out=out, **common)
    return [json.loads(line) for line in out.read_text().splitlines()]


def requests_of(count: int) -> list[Request]:
    """Images of two sizes and prompts of many lengths, so that batches are padded."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (48, 32 + 16 * (n % 2), 3), dtype=np.uint8))
        for n in range(count)
    ]
    return [Request(image, "find " + "x" * (7 * n % 11)) for n, image in enumerate(images)]
