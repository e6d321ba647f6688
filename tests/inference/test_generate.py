"""Prediction files: complete, in order, the same after a kill; engines: the same answers in a batch
as alone.
"""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import regex
import torch
from PIL import Image
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen

from egm_lib.inference import from_profile
from egm_lib.inference.answer_form import ANSWER_PATTERNS, ConstraintIgnored
from egm_lib.inference.decoding import decoded_as, most_agreed
from egm_lib.inference.engine import Answer, Request
from egm_lib.inference.from_profile import make_engine
from egm_lib.inference.latency import measure_latency
from egm_lib.inference.openai_engine import OpenAIEngine
from egm_lib.inference.predict import EngineFailure, predict
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.profile import ProfileError, Sampling, load_profile
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


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 48), (80 * number, 100, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


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


def test_rows_carry_sample_prompt_and_boxes_in_pixels(images):
    [row] = run(FakeEngine(), [sample(1)], images, images / "out.jsonl")
    prompt = FAMILIES["qwen3-vl"].prompt(sample(1)["expression"], "vanilla")
    assert row["prompt"] == prompt and row["reasoning"] == "look" and row["status"] == "ok"
    assert row["box"] == pytest.approx([0, 0, len(prompt) * 64 / 1000, 24.0])
    assert row["frame"] == "NORM_1000" and row["revision"] == "r1"
    assert {"iou", "success"}.isdisjoint(row)
    assert set(sample(1)) <= set(row)


def test_a_killed_run_goes_on_and_leaves_the_same_file(images):
    samples = [sample(number) for number in range(50)]
    whole = images / "whole.jsonl"
    run(FakeEngine(), samples, images, whole)
    lines = whole.read_text().splitlines(keepends=True)
    for kept, torn in [(0, 30), (20, 0), (20, 40), (50, 0)]:
        out = images / f"killed-{kept}-{torn}.jsonl"
        out.write_text("".join(lines[:kept]) + "".join(lines[kept : kept + 1])[:torn])
        engine = FakeEngine()
        run(engine, samples, images, out)
        assert out.read_text() == whole.read_text()
        # What is finished is not asked again, but for one window
        assert engine.asked < 50 - kept + 16


def test_a_damaged_row_is_asked_again(images):
    """Valid JSON without the fields of a row: the others are kept."""
    samples, whole, out = (
        [sample(n) for n in range(6)],
        images / "whole.jsonl",
        images / "odd.jsonl",
    )
    run(FakeEngine(), samples, images, whole)
    lines = whole.read_text().splitlines(keepends=True)
    odd = ["{}\n", '{"sample_id": ["a"], "status": "ok"}\n', '{"status": null}\n']
    out.write_text("".join([lines[0], *odd, *lines[2:]]))
    run(FakeEngine(), samples, images, out)
    assert out.read_text() == whole.read_text()


def test_rows_of_another_model_are_not_continued(images):
    out = images / "out.jsonl"
    run(FakeEngine(), [sample(0)], images, out)
    before = out.read_text()
    with pytest.raises(ValueError, match="written for model 'small-base'"):
        run(FakeEngine(), [sample(0)], images, out, model="large-base")
    assert out.read_text() == before


def test_a_corrupt_image_marks_its_row_and_the_run_goes_on(images):
    (images / "1.png").write_bytes(b"not an image")
    rows = run(FakeEngine(), [sample(number) for number in range(6)], images, images / "out.jsonl")
    assert [row["status"] for row in rows] == ["ok", "error", "ok", "ok", "error", "ok"]
    assert (
        "1.png" in rows[1]["error"]
        and rows[1]["box"] is None
        and rows[1]["finish_reason"] == "error"
    )


def test_errors_are_asked_again_only_on_request(images):
    samples, out = [sample(number) for number in range(6)], images / "out.jsonl"
    longest = FAMILIES["qwen3-vl"].prompt(sample(3)["expression"], "vanilla")
    rows = run(FakeEngine(lambda prompt: prompt == longest), samples, images, out)
    assert [row["sample_id"] for row in rows if row["status"] == "error"] == ["s3"]
    engine = FakeEngine()
    assert run(engine, samples, images, out) == rows and engine.asked == 0
    mended = run(FakeEngine(), samples, images, out, retry_errors=True)
    assert [row["sample_id"] for row in mended] == [row["sample_id"] for row in samples]
    assert all(row["status"] == "ok" for row in mended)


def test_an_engine_that_fails_everywhere_stops_the_run(images):
    with pytest.raises(EngineFailure, match="no memory"):
        run(
            FakeEngine(lambda prompt: True),
            [sample(0), sample(1)],
            images,
            images / "out.jsonl",
        )


def test_latency_is_measured_on_a_seeded_subset_one_and_several_at_a_time(images):
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
    again = measure_latency(samples, engine, concurrencies=(1, 4), **options)
    assert [row["sample_id"] for row in again] == [row["sample_id"] for row in rows]


class StreamingServer(ThreadingHTTPServer):
    """Chat completions as a stream of three tokens, DELAY_S before each; counts how many requests
    it has at a time.
    """

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


def test_an_endpoint_is_timed_token_by_token_with_as_many_requests_on_the_way_as_asked(images):
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
    assert 1 < server.most <= 6 and len(server.bodies) == (1 + 2) + (6 + 24)
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


@pytest.fixture(scope="module")
def engine():
    model, processor = tiny_qwen()
    return TransformersEngine(
        model, "qwen3-vl", "float32", batch_size=4, processor=processor, device="cpu"
    )


def requests_of(count: int) -> list[Request]:
    """Images of two sizes and prompts of many lengths, so that batches are padded."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (48, 32 + 16 * (n % 2), 3), dtype=np.uint8))
        for n in range(count)
    ]
    return [Request(image, "find " + "x" * (7 * n % 11)) for n, image in enumerate(images)]


def test_greedy_answers_in_padded_batches_equal_generate_one_by_one(engine):
    requests = requests_of(10)
    sampling = replace(GREEDY, max_new_tokens=24)
    answers = list(engine.answer(requests, sampling))
    processor, ended = engine.processor, 0
    for request, answer in zip(requests, answers, strict=True):
        messages = engine.family.messages(request.prompt)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[request.image]], return_tensors="pt")
        output = engine.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, suppress_tokens=engine.suppress_ids
        )[0, inputs["input_ids"].shape[1] :].tolist()
        stops = [index for index, token in enumerate(output) if token in engine.eos_ids]
        expected = output[: stops[0]] if stops else output
        ended += bool(stops)
        assert answer.raw_answer == "<think>\n" + processor.tokenizer.decode(expected)
        assert answer.finish_reason == ("stop" if stops else "length")
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.reasoning_tokens + answer.answer_tokens == len(expected)
    assert len({answer.raw_answer for answer in answers}) > 3  # or the test would say nothing


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_images_by_the_processor_or_by_the_cache_and_the_repetition_penalty_of_generate(
    engine, penalty
):
    sampling, requests = replace(GREEDY, repetition_penalty=penalty), requests_of(4)
    model, processor = tiny_qwen()
    uncached = TransformersEngine(
        model, "qwen3-vl", processor=processor, device="cpu", cache_vision=False
    )
    answers = list(uncached.answer(requests, sampling))
    timeless = [
        replace(answer, latency_ms=None, first_token_ms=None)
        for answer in engine.answer(requests, sampling)
    ]
    assert [replace(answer, latency_ms=None, first_token_ms=None) for answer in answers] == timeless
    text = processor.apply_chat_template(
        engine.family.messages(requests[1].prompt), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[[requests[1].image]], return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=engine.suppress_ids,
        repetition_penalty=penalty,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    expected = processor.tokenizer.decode(
        [token for token in output if token not in engine.eos_ids]
    )
    assert answers[1].raw_answer == "<think>\n" + expected


def test_internvl_s_padded_batches_equal_generate_one_by_one():
    """A family with one-dimensional positions and a vision tower that nobody remembers."""
    model, processor = tiny_internvl()
    engine = TransformersEngine(model, "internvl-3", processor=processor, device="cpu")
    requests = requests_of(3)
    for request, answer in zip(requests, engine.answer(requests, GREEDY), strict=True):
        text = processor.apply_chat_template(
            engine.family.messages(request.prompt), tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[[request.image]], return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=engine.suppress_ids or None,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        expected = processor.tokenizer.decode(
            [token for token in output if token not in engine.eos_ids]
        )
        assert answer.error is None and answer.raw_answer.endswith(expected) and expected


def test_rows_that_end_early_leave_the_batch_and_the_others_go_on_alike(engine, monkeypatch):
    requests = requests_of(4)
    # let tokens in the middle of three of the four answers count as an end, so that the batch
    # shrinks
    byte_ids = engine.processor.tokenizer
    answers = [next(iter(engine.answer([request], GREEDY))) for request in requests[:3]]
    tokens = [
        byte_ids(answer.raw_answer.removeprefix("<think>\n"))["input_ids"] for answer in answers
    ]
    ends = {ids[4 + number] for number, ids in enumerate(tokens)}
    monkeypatch.setattr(engine, "eos_ids", engine.eos_ids | ends)
    expected = [next(iter(engine.answer([request], GREEDY))) for request in requests]
    together = list(engine.answer(requests, GREEDY))
    assert [a.raw_answer for a in together] == [a.raw_answer for a in expected]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in expected]
    assert "stop" in {a.finish_reason for a in together}


def test_vision_placeholders_are_never_sampled(engine):
    hot = replace(GREEDY, temperature=50.0, top_k=None, max_new_tokens=40)
    text = "".join(answer.raw_answer for answer in engine.answer(requests_of(4), hot))
    assert (
        "<|image_pad|>" not in text
        and "<|video_pad|>" not in text
        and "<|vision_start|>" not in text
    )


def test_sampling_repeats_with_its_seed_and_moves_with_it(engine, monkeypatch):
    warm = replace(GREEDY, temperature=1.0, top_p=0.9, top_k=50)
    first = [answer.raw_answer for answer in engine.answer(requests_of(3), warm)]
    assert [answer.raw_answer for answer in engine.answer(requests_of(3), warm)] == first
    monkeypatch.setattr(engine, "seed", 1)
    assert [answer.raw_answer for answer in engine.answer(requests_of(3), warm)] != first


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_reasoning_the_form_binds_even_a_model_of_random_weights(engine, temperature):
    free = replace(GREEDY, temperature=temperature, max_new_tokens=320)
    pattern = ANSWER_PATTERNS["qwen3-vl"]
    for answer in engine.answer(requests_of(3), free, reasoning=False):
        assert (
            answer.raw_answer.startswith("<think>\n</think>\n\n") and answer.reasoning_tokens == 0
        )
        written = answer.raw_answer.removeprefix("<think>\n</think>\n\n")
        assert regex.fullmatch(pattern, written, partial=answer.finish_reason == "length")
        assert "bbox_2d" in written
    # Unbound, the same weights write anything else
    for answer in engine.answer(requests_of(3), free):
        assert not regex.fullmatch(
            pattern, answer.raw_answer.removeprefix("<think>\n"), partial=True
        )


def test_one_bad_request_of_a_batch_does_not_take_the_others_with_it(engine, monkeypatch):
    requests, decode = requests_of(4), engine._decode

    def decode_or_fail(batch, *args):
        if any(request.prompt == requests[2].prompt for request in batch):
            raise RuntimeError("out of memory")
        return decode(batch, *args)

    monkeypatch.setattr(engine, "_decode", decode_or_fail)
    answers = list(engine.answer(requests, GREEDY))
    assert [answer.error is None for answer in answers] == [True, True, False, True]
    assert "out of memory" in answers[2].error


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("label", ["red cup", 'the "big" one', "Café, left"])
def test_the_form_admits_what_the_family_writes(family, label):
    text = family.answer((3, 4, 50, 40), (64, 48), label, None).removeprefix(
        family.no_reasoning_prefix
    )
    assert regex.fullmatch(ANSWER_PATTERNS[family.name], text)


@pytest.mark.parametrize(
    "text",
    [
        'I look first. [{"bbox_2d": [1, 2, 3, 4]}]',  # reasoning before the answer
        '[{"bbox_2d": [1, 2, 3]}]',  # three numbers
        '[{"bbox_2d": [1, 2, 3, 1001]}]',  # outside 0..1000
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]}]',  # two boxes
    ],
)
def test_the_form_refuses(text):
    assert not regex.fullmatch(ANSWER_PATTERNS["qwen3-vl"], text)


def bound(engine, max_new_tokens: int):
    [answer] = engine.answer(
        requests_of(1), replace(GREEDY, max_new_tokens=max_new_tokens), reasoning=False
    )
    return answer, answer.raw_answer.removeprefix("<think>\n</think>\n\n")


def test_a_bound_answer_ends_where_its_form_ends_or_where_its_tokens_do(engine):
    """Bytes as vocabulary: a token is a character, so that every place is a place to be cut off."""
    pattern, (whole, text) = ANSWER_PATTERNS["qwen3-vl"], bound(engine, 320)
    assert whole.finish_reason == "stop" and regex.fullmatch(pattern, text)
    for cut in (1, whole.answer_tokens // 2, whole.answer_tokens - 1):
        answer, start = bound(engine, cut)
        assert (answer.finish_reason, answer.answer_tokens) == ("length", cut) and text.startswith(
            start
        )
        assert regex.fullmatch(pattern, start, partial=True)
    # The form is complete, but no token was left to say so
    answer, exact = bound(engine, whole.answer_tokens)
    assert exact == text and answer.finish_reason == "length"


class FakeServer:
    """Answers chat.completions.create; bound answers only where it honours response_format."""

    def __init__(self, honours: bool):
        self.honours, self.calls = honours, []
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, **call):
        self.calls.append(call)
        bound = self.honours and "response_format" in call
        content = (
            '[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]'
            if bound
            else "hm\n</think>\n\n[1, 2, 3, 4]"
        )
        message = SimpleNamespace(content=content, reasoning_content=None)
        usage = SimpleNamespace(
            prompt_tokens=7, completion_tokens=9, completion_tokens_details=None
        )
        return SimpleNamespace(
            choices=[SimpleNamespace(message=message, finish_reason="stop")], usage=usage
        )


def endpoint(server) -> OpenAIEngine:
    return OpenAIEngine("http://localhost", "m", "qwen3-vl", 4, client=server, opens_reasoning=True)


def test_endpoint_sends_table_8_and_a_lossless_image():
    server = FakeServer(honours=True)
    [answer] = endpoint(server).answer(requests_of(1), GREEDY)
    [call] = server.calls
    assert (call["temperature"], call["top_p"], call["max_tokens"]) == (0, 1, 12)
    assert call["extra_body"] == {"repetition_penalty": 1.0, "top_k": 20}
    assert call["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert answer.raw_answer == "<think>\nhm\n</think>\n\n[1, 2, 3, 4]" and answer.latency_ms > 0


def test_endpoint_without_reasoning_is_bound_by_a_schema():
    [answer] = endpoint(FakeServer(honours=True)).answer(requests_of(1), GREEDY, reasoning=False)
    assert answer.raw_answer == '</think>\n\n[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]'


def test_an_endpoint_that_silently_ignores_the_schema_is_noticed():
    with pytest.raises(ConstraintIgnored, match="ignores structured output"):
        list(endpoint(FakeServer(honours=False)).answer(requests_of(1), GREEDY, reasoning=False))


def test_rows_of_answers_given_together_have_no_latency(images):
    engine = FakeEngine()
    rows = run(engine, [sample(0), sample(1)], images, images / "two.jsonl")
    assert [row["latency_ms"] for row in rows] == [None, None]
    engine.batch_size = 1
    [row] = run(engine, [sample(0)], images, images / "one.jsonl")
    assert row["latency_ms"] == 1.5


def test_torch_is_not_left_with_gradients(engine):
    list(engine.answer(requests_of(1), GREEDY))
    assert (
        all(parameter.grad is None for parameter in engine.model.parameters())
        and torch.is_grad_enabled()
    )


def test_a_begun_answer_is_continued_where_it_stopped(engine):
    [request] = requests_of(1)
    [whole] = engine.answer([request], GREEDY)
    [start] = engine.answer([request], replace(GREEDY, max_new_tokens=1))
    [rest] = engine.answer([replace(request, begun="looking")], GREEDY)
    assert rest.raw_answer.startswith("<think>\nlooking") and whole.raw_answer.startswith(
        start.raw_answer
    )
    assert rest.prompt_tokens == whole.prompt_tokens + len("looking")


class Thinker:
    """Thinks for 10 tokens ("a " each), then answers in 3; goes on from what was begun. Sampled
    boxes are scripted.
    """

    family, revision, batch_size = FAMILIES["qwen3-vl"], None, 4

    def __init__(self, boxes=()):
        self.seed, self.boxes = 0, boxes

    def describe(self):
        return {"engine": "fake"}

    def answer(self, requests, sampling, *, reasoning=True):
        for request in requests:
            thought = [] if "</think>" in request.begun else ["a "] * 10 + ["</think>"]
            box = self.boxes[self.seed] if sampling.temperature > 0 else [0, 0, 500, 500]
            words = thought + ([f"[{box}"[:-1], "]", "]"] if box else ["none", ".", "."])
            written = words[: sampling.max_new_tokens]
            num_reasoning = len(thought) if len(written) >= len(thought) else 0
            finish = "stop" if len(written) == len(words) else "length"
            text = "<think>\n" + request.begun + "".join(written)
            yield Answer(text, 5, num_reasoning, len(written) - num_reasoning, finish)


def test_a_budget_closes_the_reasoning_and_counts_what_was_thought():
    requests = [Request(Image.new("RGB", (10, 10)), "find")]
    [answer] = decoded_as(Thinker(), "small-egm@budget-4").answer(requests, GREEDY)
    assert answer.raw_answer == "<think>\na a a a \n</think>\n\n[[0, 0, 500, 500]]"
    assert (answer.reasoning_tokens, answer.answer_tokens, answer.finish_reason) == (4, 3, "stop")
    long = replace(GREEDY, max_new_tokens=50)
    [plain] = Thinker().answer(requests, long)
    assert list(decoded_as(Thinker(), "small-egm@budget-40").answer(requests, long)) == [plain]
    # Cut within the answer
    [cut] = decoded_as(Thinker(), "small-egm@budget-12").answer(requests, long)
    assert (cut.reasoning_tokens, cut.answer_tokens) == (11, 4)


def test_a_majority_outvotes_a_stray_sample():
    near, far = [0, 0, 500, 500], [600, 600, 900, 900]
    requests = [Request(Image.new("RGB", (10, 10)), "find")]
    thinker = Thinker([far, near, None, [0, 0, 500, 480]])
    [answer] = decoded_as(thinker, "small-egm@majority-4").answer(
        requests, replace(GREEDY, max_new_tokens=50)
    )
    assert answer.raw_answer.endswith("[[0, 0, 500, 500]]") and thinker.seed == 0
    assert answer.reasoning_tokens == 44 and answer.answer_tokens == 12
    assert most_agreed([None, None]) == 0


@pytest.mark.parametrize("name", ["small-egm@beam-4", "small-egm@budget", "small-egm@majority-0"])
def test_an_unknown_way_of_decoding_is_refused(name):
    with pytest.raises(ValueError, match="unknown way of decoding"):
        decoded_as(Thinker(), name)


def test_a_service_s_key_comes_from_the_variable_that_the_profile_names(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-another-company")
    monkeypatch.delenv("HERE_API_KEY", raising=False)
    profile = load_profile("eval-qwen3vl-235b")
    away = replace(
        profile.generation, base_url="https://example.invalid/v1", api_key_env="HERE_API_KEY"
    )
    with pytest.raises(
        ProfileError, match=r"no key for https://example\.invalid/v1: set .* HERE_API_KEY"
    ):
        make_engine(replace(profile, generation=away), profile.models.large)
    monkeypatch.setenv("HERE_API_KEY", "its-own-key")
    assert (
        make_engine(replace(profile, generation=away), profile.models.large).client.api_key
        == "its-own-key"
    )


def test_vllm_gets_the_profile_s_gpus_and_the_model_s_revision(monkeypatch):
    monkeypatch.setattr(from_profile, "VLLMEngine", lambda *args, **options: (args, options))
    profile = load_profile("eval-egm-8b")
    profile = replace(
        profile, generation=replace(profile.generation, engine="vllm", tensor_parallel=2)
    )
    (path, family), options = make_engine(profile, replace(profile.models.small, revision="abc"))
    assert family == "qwen3-vl" and options["tensor_parallel"] == 2 and options["revision"] == "abc"
