"""A small data root for the tests of curation, its services, and one that a function answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import httpx2
import openai
from PIL import Image

from egm_lib.curation import client
from egm_lib.profile import Price, Teacher

PRICE = Price(prompt=1.0, completion=1.0)


def teacher(base_url: str = "mini", model: str = "mini-teacher", **more: object) -> Teacher:
    values = {"temperature": 0.7, "max_tokens": 800, "concurrency": 8, "price_per_mtok": PRICE}
    return Teacher(base_url=base_url, model=model, **(values | more))


def make_root(folder: Path, count: int) -> list[dict]:
    """A data root: four images, `count` samples, and what the miniature's teacher knows of them."""
    (folder / "images").mkdir(exist_ok=True)
    for number in range(4):
        Image.new("RGB", (128, 96), (60 * number, 90, 90)).save(folder / f"images/{number}.png")
    samples, truths = [], []
    for number in range(count):
        samples.append(
            {
                "sample_id": f"s{number}",
                "dataset": "refcoco",
                "split": "train",
                "task": "amodal",
                "flipped": False,
                "image": f"images/{number % 4}.png",
                "width": 128,
                "height": 96,
                "image_id": str(number % 4),
                "expression": f"red circle {number}",
                "gt_box": [20.0, 20.0, 60.0, 60.0],
                "modal_box": [20.0, 20.0, 60.0, 45.0],
                "box": [70.0, 20.0, 110.0, 60.0],
            }
        )
        truths.append(
            {
                "sample_id": f"s{number}",
                "verify": "NO" if number % 5 == 0 else "YES",
                "planted_cause": None,
                "reasoning": "two red circles : 1 at 825 300 , 2 at 750 850 . it is 2 .",
                "amodal_expression": f"second red circle {number}",
                "gt_box": [20, 20, 60, 60],
                "amodal_reasoning": "a log hides the circle. it extends downward from the visible "
                "part moderately.",
                "lookalike_boxes_px": [[70, 20, 110, 60]],
            }
        )
    for name, rows in (("samples", samples), ("teacher", truths)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return samples


def service(
    handler: Callable[[httpx2.Request], httpx2.Response], monkeypatch, **more: object
) -> Teacher:
    """A teacher whose requests a function answers."""

    def connect(base_url: str, key: str, **_: object) -> openai.AsyncOpenAI:
        http_client = httpx2.AsyncClient(transport=httpx2.MockTransport(handler))
        return openai.AsyncOpenAI(
            base_url=base_url, api_key=key, max_retries=0, http_client=http_client
        )

    monkeypatch.setattr(client, "connect", connect)
    return teacher("http://127.0.0.1:9/v1", **more)


def completion(text: str | None, finish_reason: object = "stop", **more: object) -> dict:
    """The body of a chat completion; `more` goes into its message."""
    message = {"role": "assistant", "content": text, **more}
    usage = {"prompt_tokens": 1000, "completion_tokens": 10}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "r", "choices": [choice], "usage": usage}
