"""Prediction does not wait where it need not: for a slow answer, or for images."""

import json
import threading
import time
from itertools import islice

import pytest
from engine_world import GREEDY, FakeEngine, sample
from PIL import Image

from egm_lib.inference import engine as engine_module
from egm_lib.inference.engine import Answer, Request
from egm_lib.inference.openai_engine import AHEAD_BATCHES, OpenAIEngine
from egm_lib.inference.predict import EngineFailure, _map_ahead, predict
from egm_lib.inference.vllm_engine import VLLMEngine

STAMP = {"model": "m", "profile": "test", "seed": 0, "sampling": GREEDY}
PATIENCE_S = 60.0


class Endpoint(OpenAIEngine):
    """Two requests at a time; `respond` answers the number in the expression."""

    def __init__(self, respond):
        super().__init__("http://127.0.0.1:1/v1", "m", "qwen3-vl", 2)
        self.respond = respond

    def _ask(self, request, sampling, reasoning):
        number = int(request.prompt.partition("number ")[2].split()[0].strip('".'))
        return self.respond(number)


def numbered(count: int) -> list[dict]:
    return [sample(number, expression=f"number {number} of all") for number in range(count)]


def answered(number: int) -> Answer:
    return Answer(f"</think>\n\n[[0, 0, {number}, 500]]", 10, 3, 20, "stop")


def test_an_endpoint_goes_on_while_one_answer_is_slow(images):
    """Sample 0 is answered only after twelve others: more than a window of four batches of two."""
    seen, enough = [], threading.Event()

    def respond(number):
        if number == 0:
            assert enough.wait(PATIENCE_S)
        seen.append(number)
        if len(seen) == 12:
            enough.set()
        return answered(number)

    out = predict(numbered(30), Endpoint(respond), out=images / "o.jsonl", root=images, **STAMP)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["sample_id"] for row in rows] == [f"s{number}" for number in range(30)]
    assert sorted(seen) == list(range(30)) and seen.index(0) >= 12


def test_an_endpoint_is_not_asked_without_end_for_one_slow_answer():
    """Images that wait for their turn take memory."""
    slow, taken = threading.Event(), []

    def respond(number):
        if number == 0:
            slow.wait(PATIENCE_S)
        return answered(number)

    def requests():
        for number in range(200):
            taken.append(number)
            yield Request(Image.new("RGB", (8, 8)), f"number {number} of all")

    answers = Endpoint(respond).answer(requests(), GREEDY)
    threading.Timer(0.5, slow.set).start()
    assert next(answers).answer_tokens == 20
    assert len(taken) == 2 * AHEAD_BATCHES + 1
    assert len(list(answers)) == 199


def test_a_stopped_endpoint_asks_only_what_is_missing(images):
    seen = []

    def respond(number):
        seen.append(number)
        return answered(number)

    out, samples = images / "o.jsonl", numbered(20)
    predict(samples, Endpoint(respond), out=out, root=images, **STAMP)
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    seen.clear()
    predict(samples, Endpoint(respond), out=out, root=images, **STAMP)
    assert sorted(seen) == list(range(5, 20)) and out.read_bytes() == whole


def test_an_endpoint_that_fails_everywhere_is_not_asked_to_the_end(images):
    seen = []

    def respond(number):
        seen.append(number)
        return Answer.failed("no connection")

    with pytest.raises(EngineFailure, match="no connection"):
        predict(numbered(200), Endpoint(respond), out=images / "o.jsonl", root=images, **STAMP)
    assert len(seen) < 60


class Recorded(VLLMEngine):
    """Answers as FakeEngine does, and keeps how many requests it was handed together."""

    def __init__(self):
        self.plain, self.handed = FakeEngine(), []
        self.family, self.revision, self.batch_size = FakeEngine.family, None, FakeEngine.batch_size

    def answer(self, requests, sampling, *, reasoning=True):
        self.handed.append(len(requests))
        yield from self.plain.answer(requests, sampling, reasoning=reasoning)


def test_a_window_of_vllm_is_longer_than_its_slowest_answer(images):
    """The longest answer (4,096 tokens) takes as long as some ten batches of the usual 300 to 400:
    a shorter window would wait for it more than it works. A whole file of images takes memory.
    """
    engine = Recorded()
    predict(numbered(200), engine, out=images / "o.jsonl", root=images, **STAMP)
    assert sum(engine.handed) == 200
    assert 10 * engine.batch_size < max(engine.handed) <= 50


def test_images_are_decoded_while_the_engine_answers(images, monkeypatch):
    """The engine gives no answer before an image of its next window is open."""
    opened, next_window = [], threading.Event()
    plain = engine_module.open_image

    def open_image(path):
        opened.append(path)
        if len(opened) > 8:  # a window: four batches of two
            next_window.set()
        return plain(path)

    class Waiting(FakeEngine):
        def answer(self, requests, sampling, *, reasoning=True):
            if not self.asked:
                assert next_window.wait(PATIENCE_S)
            yield from super().answer(requests, sampling, reasoning=reasoning)

    monkeypatch.setattr(engine_module, "open_image", open_image)
    samples = [sample(number) for number in range(20)]
    predict(samples, Waiting(), out=images / "o.jsonl", root=images, **STAMP)
    assert len(opened) == 20


def test_no_more_is_done_ahead_than_asked_for():
    done = []
    results = _map_ahead(lambda item: done.append(item) or item, iter(range(100)), 5)
    assert list(islice(results, 3)) == [0, 1, 2]
    time.sleep(0.2)
    assert len(done) <= 3 + 5
    results.close()
    assert len(done) <= 3 + 5


def test_an_error_ahead_arrives_where_it_belongs():
    results = _map_ahead(lambda item: 1 // (2 - item), iter(range(4)), 3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
