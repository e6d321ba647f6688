"""The latency protocol: a seeded subset, one and several requests at a time, token by token."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from engine_world import GREEDY, FakeEngine, requests_of, sample
from PIL import Image

from egm_lib.inference.latency import measure_latency
from egm_lib.inference.openai_engine import OpenAIEngine


def test_latency_is_measured_on_a_seeded_subset_at_each_concurrency(images):
    samples = [sample(number) for number in range(40)]
    engine, out = FakeEngine(), images / "latency" / "small-base.jsonl"
    options = {
        "out": out,
        "model": "small-base",
        "root": images,
        "sampling": GREEDY,
        "num_samples": 8,
    }
    rows = measure_latency(samples, engine, warmup=2, concurrencies=(1, 4, 64), **options)
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    # 64: there are too few samples
    assert [row["concurrency"] for row in rows] == [1] * 8 + [4] * 16
    assert engine.asked == (2 + 8) + (4 + 16) and engine.batch_size == 2
    assert all(row["latency_ms"] == 1.5 and {"torch", "transformers"} <= set(row) for row in rows)
    again = measure_latency(samples, engine, warmup=2, concurrencies=(1, 4), **options)
    assert [row["sample_id"] for row in again] == [row["sample_id"] for row in rows]


def test_an_image_that_cannot_be_read_marks_its_row_and_the_others_are_measured(images):
    (images / "1.png").write_bytes(b"not an image")  # of every third sample
    options = {"out": images / "l.jsonl", "model": "m", "root": images, "sampling": GREEDY}
    samples = [sample(number) for number in range(40)]
    rows = measure_latency(samples, FakeEngine(), concurrencies=(1, 4), **options)
    images_of = {each["sample_id"]: each["image"] for each in samples}
    for row in rows:
        odd = images_of[row["sample_id"]] == "1.png"
        assert (row["latency_ms"] is None) == odd == (row["finish_reason"] == "error")
        assert ("1.png" in (row["error"] or "")) == odd
    assert {row["concurrency"] for row in rows} == {1, 4}
    assert 0 < sum(row["error"] is None for row in rows) < len(rows)


class Asked(FakeEngine):
    """Keeps what it is asked."""

    def __init__(self):
        super().__init__()
        self.requests = []

    def answer(self, requests, sampling, *, reasoning=True):
        self.requests.append(
            [(request.prompt, request.image.getpixel((0, 0))) for request in requests]
        )
        yield from super().answer(requests, sampling, reasoning=reasoning)


def test_latency_is_not_measured_on_what_was_asked_before(images):
    """Engines remember prompts and images; an image may have several expressions."""
    for number in range(20):
        Image.new("RGB", (64, 48), (number, 0, 0)).save(images / f"own{number}.png")
    samples = [
        sample(number, expression=f"the {number}", image=f"own{number // 2}.png")
        for number in range(40)
    ]
    engine = Asked()
    options = {"out": images / "l.jsonl", "model": "m", "root": images, "sampling": GREEDY}
    rows = measure_latency(
        samples, engine, concurrencies=(1, 4), num_samples=8, warmup=3, **options
    )
    assert [row["concurrency"] for row in rows] == [1] * 8 + [4] * 16
    [first, *singles], second = engine.requests[:9], engine.requests[9:]
    for warm, measured in ((first, singles), (second[0], second[1:])):
        asked = {request for wave in measured for request in wave}
        assert not {prompt for prompt, _ in warm} & {prompt for prompt, _ in asked}
    # At a concurrency of 4 other samples are measured than at 1
    earlier = {prompt for wave in engine.requests[:9] for prompt, _ in wave}
    assert not earlier & {prompt for wave in second[1:] for prompt, _ in wave}
    # Eight samples of at most eight images leave twelve images to warm up on
    assert not {image for _, image in first} & {image for wave in singles for _, image in wave}


class StreamingServer(ThreadingHTTPServer):
    """Streams three tokens, with DELAY_S before each, and counts requests that run at once."""

    request_queue_size, daemon_threads = 128, True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StreamingHandler)
        self.lock, self.now, self.most, self.bodies = threading.Lock(), 0, 0, []
        threading.Thread(target=self.serve_forever, daemon=True).start()


class StreamingHandler(BaseHTTPRequestHandler):
    DELAY_S = 0.05

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for token in ("hm\n</think>\n\n", "[1, 2,", " 3, 4]"):
            time.sleep(self.DELAY_S)
            self.say(choices=[{"index": 0, "delta": {"content": token}, "finish_reason": None}])
        self.say(choices=[{"index": 0, "delta": {}, "finish_reason": "length"}])
        self.say(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16})
        with self.server.lock:
            self.server.now -= 1
        self.wfile.write(b"data: [DONE]\n\n")

    def say(self, **chunk):
        chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", **chunk}
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *args):
        pass


def test_an_endpoint_is_timed_token_by_token_at_the_wanted_concurrency(images):
    server = StreamingServer()
    url = f"http://127.0.0.1:{server.server_port}/v1"
    engine = OpenAIEngine(url, "m", "qwen3-vl", 4, stream=True, opens_reasoning=True, max_retries=0)
    samples = [sample(number) for number in range(24)]
    rows = measure_latency(
        samples,
        engine,
        out=images / "l.jsonl",
        model="m",
        root=images,
        sampling=GREEDY,
        num_samples=2,
        concurrencies=(1, 6),
        warmup=1,
    )
    # 24 samples: 6 to warm up on, 18 to measure
    assert 1 < server.most <= 6 and len(server.bodies) == (1 + 2) + (6 + 18)
    assert all(
        body["stream"] and body["stream_options"] == {"include_usage": True}
        for body in server.bodies
    )
    delay_ms = StreamingHandler.DELAY_S * 1000
    for row in rows:
        assert row["first_token_ms"] >= delay_ms and row["latency_ms"] >= 3 * delay_ms
        assert (row["prompt_tokens"], row["answer_tokens"], row["finish_reason"]) == (
            7,
            9,
            "length",
        )
    # of one at least: on a busy machine the client may read late
    assert max(row["latency_ms"] - row["first_token_ms"] for row in rows) >= delay_ms
    [answer] = engine.answer(requests_of(1), GREEDY)
    assert answer.raw_answer == "<think>\nhm\n</think>\n\n[1, 2, 3, 4]"
    server.shutdown()
    server.server_close()
    [gone] = engine.answer(requests_of(1), GREEDY)
    assert gone.finish_reason == "error" and "Connection" in gone.error
