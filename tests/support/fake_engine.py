"""Samples and an engine that answers without a model."""

from egm_lib.inference.engine import Answer
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
    """Answers the length of its prompt as a box; counts what it was asked."""

    family, revision, batch_size, seed = FAMILIES["qwen3-vl"], "r1", 2, 0

    def __init__(self, fails_on=lambda prompt: False):
        self.asked, self.fails_on = 0, fails_on

    def describe(self):
        return {"engine": "fake"}

    def answer(self, requests, sampling, *, reasoning=True):
        for request in requests:
            self.asked += 1
            if self.fails_on(request.prompt):
                yield Answer.failed(RuntimeError("no memory"))
            else:
                box = f'[{{"bbox_2d": [0, 0, {len(request.prompt)}, 500]}}]'
                text = f"<think>\nlook\n</think>\n\n{box}"
                yield Answer(text, 10, 3, 20, "stop", latency_ms=1.5)
