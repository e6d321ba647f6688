"""The endpoint engine against replies and refusals as services really send them."""

import base64
import io
import json
from dataclasses import replace
from types import SimpleNamespace

import httpx2
import openai
import pytest
from engine_world import requests_of
from PIL import Image

from egm_lib.inference.answer_form import ConstraintIgnored
from egm_lib.inference.decoding import decoded_as
from egm_lib.inference.engine import Request
from egm_lib.inference.openai_engine import OpenAIEngine, shrink
from egm_lib.inference.predict import predict
from egm_lib.parsing import parse_completion
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=12, repetition_penalty=1.0)
BOX = '[{"bbox_2d": [0, 0, 500, 500], "label": "cup"}]'


def completion(content=BOX, finish="stop", **message) -> dict:
    message = {"role": "assistant", "content": content, **message}
    return {"id": "c", "choices": [{"index": 0, "message": message, "finish_reason": finish}]}


def endpoint(respond, **options) -> OpenAIEngine:
    """An engine on the real client; respond: of a request's body, what the service sends."""

    def handle(request: httpx2.Request) -> httpx2.Response:
        reply = respond(json.loads(request.content))
        if isinstance(reply, httpx2.Response):
            return reply
        if isinstance(reply, bytes):
            return httpx2.Response(200, content=reply, headers={"Content-Type": "application/json"})
        return httpx2.Response(200, json=reply)

    client = openai.OpenAI(
        base_url="http://service.invalid/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(transport=httpx2.MockTransport(handle)),
    )
    return OpenAIEngine("http://service.invalid/v1", "m", "qwen3-vl", 2, client=client, **options)


def ask(engine, *, reasoning=True, sampling=GREEDY):
    request = Request(Image.new("RGB", (64, 48)), "find the cup")
    [answer] = engine.answer([request], sampling, reasoning=reasoning)
    return answer


NO_ANSWERS = {
    "an error with status 200": {"error": {"message": "overloaded"}},
    "an error in a list, as Gemini's": [{"error": {"message": "overloaded"}}],
    "choices null": {"id": "c", "choices": None},
    "choices empty": {"id": "c", "choices": []},
    "message null": {"choices": [{"message": None, "finish_reason": "stop"}]},
    "a web page": httpx2.Response(200, html="<html>Bad gateway</html>"),
    "a web page that calls itself JSON": b"<html>",
    "an empty body": b"",
    "null": b"null",
    "half a body": b'{"choices": [{"mess',
    "not UTF-8": b'{"choices": "\xff',
    "nested without end": b"[" * 100_000,
    **{
        f"finish reason {reason}": completion(finish=reason)
        for reason in ("content_filter", "tool_calls", "error", "abort", "MAX_TOKENS", "SAFETY")
    },
    "a refusal": completion(None, refusal="I cannot help with that"),
}


@pytest.mark.parametrize("reasoning", [True, False], ids=["free", "bound"])
@pytest.mark.parametrize("reply", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_a_reply_that_is_no_answer_marks_its_own_row(reply, reasoning):
    answer = ask(endpoint(lambda body: reply), reasoning=reasoning)
    assert answer.finish_reason == "error" and answer.error and answer.raw_answer == ""


def stream(*chunks, content_type="text/event-stream") -> httpx2.Response:
    lines = [chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks]
    text = "".join(f"data: {line}\n\n" for line in lines)
    return httpx2.Response(200, text=text, headers={"Content-Type": content_type})


def delta(content=None, finish=None, **fields) -> dict:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": finish, **fields}
    return {"id": "c", "choices": [choice]}


def test_a_stream_with_null_choices_and_deltas_is_read():
    chunks = [{"choices": None}, delta("[1, 2, "), delta(delta=None), delta("3, 4]", "stop")]
    answer = ask(endpoint(lambda body: stream(*chunks, "[DONE]"), stream=True))
    assert (answer.raw_answer, answer.finish_reason) == ("[1, 2, 3, 4]", "stop")
    assert answer.first_token_ms > 0


def test_who_watches_gets_the_text_as_it_streams():
    """Reasoning set apart is shown as it comes, and closed once the answer begins."""
    pieces = [{"reasoning_content": "left"}, {"reasoning_content": " one"}, {"content": BOX}]
    chunks = [{"id": "c", "choices": [{"index": 0, "delta": delta}]} for delta in pieces]
    chunks.append({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    bodies, seen = [], []

    def respond(body):
        bodies.append(body)
        return stream(*chunks, "[DONE]")

    request = Request(Image.new("RGB", (64, 48)), "find the cup", on_text=seen.append)
    [answer] = endpoint(respond).answer([request], GREEDY)
    assert bodies[0]["stream"] is True  # though the engine was not told to stream
    whole = f"<think>\nleft one\n</think>\n\n{BOX}"
    assert list(dict.fromkeys(seen)) == ["<think>\nleft", "<think>\nleft one", whole]
    assert answer.raw_answer == whole and answer.finish_reason == "stop"


@pytest.mark.parametrize(
    "chunks",
    [[], [delta("[1, 2")], [delta("[1"), {"error": {"message": "lost"}}], ["{torn"], ["<html>"]],
    ids=["nothing", "no finish reason", "an error", "half a chunk", "a web page"],
)
def test_a_broken_stream_marks_its_own_row(chunks):
    answer = ask(endpoint(lambda body: stream(*chunks), stream=True))
    assert answer.finish_reason == "error" and answer.error


@pytest.mark.parametrize("error", [httpx2.ReadTimeout("slow"), httpx2.RemoteProtocolError("cut")])
def test_a_transport_s_error_within_a_stream_marks_its_own_row(error):
    """Versions of the client differ in whether they wrap it: it may come as httpx2's own."""

    def chunks():
        yield delta("[1")
        raise error

    completions = SimpleNamespace(create=lambda **call: chunks())
    client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
    engine = OpenAIEngine("http://service.invalid", "m", "qwen3-vl", client=client, stream=True)
    answer = ask(engine)
    assert answer.finish_reason == "error" and type(error).__name__ in answer.error


def test_content_may_come_in_parts_and_usage_may_be_null():
    parts = [{"type": "text", "text": "[0, 0, "}, {"type": "text", "text": "5, 5]"}]
    for usage in (None, {"prompt_tokens": None, "completion_tokens": 9}):
        answer = ask(endpoint(lambda body, usage=usage: completion(parts) | {"usage": usage}))
        assert answer.error is None and answer.raw_answer == "[0, 0, 5, 5]"


def test_reasoning_that_was_cut_stays_open():
    cut = completion(None, "length", reasoning_content="maybe [0, 0, 5, 5], or")
    answer = ask(endpoint(lambda body: cut))
    parsed = parse_completion(
        answer.raw_answer, frame=FAMILIES["qwen3-vl"].frame, image_wh=(64, 48)
    )
    assert (parsed.status, parsed.box) == ("unclosed_reasoning", None)
    assert answer.finish_reason == "length"


def test_a_box_that_a_thinking_model_merely_considered_does_not_count():
    """Without a reasoning parser a served Thinking model starts inside its reasoning."""
    cut = completion("maybe [0, 0, 500, 500], or", "length")
    for opens_reasoning, status in ((True, "unclosed_reasoning"), (False, "ok")):
        answer = ask(endpoint(lambda body: cut, opens_reasoning=opens_reasoning))
        parsed = parse_completion(
            answer.raw_answer, frame=FAMILIES["qwen3-vl"].frame, image_wh=(64, 48)
        )
        assert parsed.status == status


def test_only_a_finished_answer_outside_the_form_ends_the_run():
    with pytest.raises(ConstraintIgnored):
        ask(endpoint(lambda body: completion("It is on the left")), reasoning=False)
    cut = ask(endpoint(lambda body: completion("It is on", "length")), reasoning=False)
    assert cut.finish_reason == "error" and "ConstraintIgnored" in cut.error
    begun = ask(endpoint(lambda body: completion(BOX[:20], "length")), reasoning=False)
    assert begun.finish_reason == "length" and begun.error is None
    silent = ask(endpoint(lambda body: completion("")), reasoning=False)
    assert silent.error is None  # the model's own miss


@pytest.mark.parametrize(("max_pixels", "size"), [(None, (64, 48)), (32 * 24, (32, 24))])
def test_an_endpoint_gets_an_image_of_the_profile_s_size(max_pixels, size):
    bodies = []
    assert ask(endpoint(lambda body: bodies.append(body) or completion(), max_pixels=max_pixels))
    [image] = (part for part in bodies[0]["messages"][0]["content"] if part["type"] == "image_url")
    encoded = image["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == size


def refusing(refused: dict[str, str], bodies: list):
    """A service that refuses these options, the first that it finds, with these words."""

    def respond(body):
        bodies.append(body)
        for name, words in refused.items():
            if name in body:
                error = {"message": words, "param": name, "type": "invalid_request_error"}
                return httpx2.Response(400, json={"error": error})
        return completion()

    return respond


def test_what_a_service_refuses_is_learned_once(capsys):
    bodies = []
    refused = {
        "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        "top_k": "Unrecognized request argument supplied: top_k",
        "repetition_penalty": "Unrecognized request argument supplied: repetition_penalty",
    }
    engine = endpoint(refusing(refused, bodies))
    assert ask(engine).error is None and len(bodies) == 4
    # What was learned holds for other values too, as a vote has them
    assert ask(engine, sampling=replace(GREEDY, temperature=0.7)).error is None
    assert len(bodies) == 5 and bodies[-1]["temperature"] == 0.7
    assert bodies[-1]["max_completion_tokens"] == 12 and not refused.keys() & bodies[-1].keys()
    assert capsys.readouterr().out.count("the service refuses") == 3


@pytest.mark.parametrize(
    "body",
    [
        # What FastAPI, older vLLM and small servers send
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "top_k"], "msg": "not permitted"}]},
        {"object": "error", "message": "unsupported: top_k", "code": 400},
        {"error": "unknown field top_k"},
        ["unexpected top_k"],
    ],
)
@pytest.mark.parametrize("status", [400, 422])
def test_a_refusal_is_understood_wherever_the_service_words_it(body, status):
    def respond(sent):
        return httpx2.Response(status, json=body) if "top_k" in sent else completion()

    assert ask(endpoint(respond)).error is None
    stubborn = ask(endpoint(lambda sent: httpx2.Response(status, json=body)))
    assert stubborn.finish_reason == "error" and "top_k" in stubborn.error  # says what and why


def test_a_refusal_of_the_sample_itself_marks_its_row():
    respond = refusing({"messages": "The image is too large"}, bodies := [])
    answer = ask(endpoint(respond))
    assert answer.finish_reason == "error" and len(bodies) == 1


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


def scripted(server) -> OpenAIEngine:
    """An engine on a client that is made by hand."""
    return OpenAIEngine("http://localhost", "m", "qwen3-vl", 4, client=server, opens_reasoning=True)


def test_endpoint_sends_table_8_and_a_lossless_image():
    server = FakeServer(honours=True)
    [answer] = scripted(server).answer(requests_of(1), replace(GREEDY, top_k=20))
    [call] = server.calls
    assert (call["temperature"], call["top_p"], call["max_tokens"]) == (0, 1, 12)
    assert call["extra_body"] == {"repetition_penalty": 1.0, "top_k": 20}
    assert call["messages"][0]["content"][0]["image_url"]["url"].startswith(
        "data:image/png;base64,"
    )
    assert answer.raw_answer == "<think>\nhm\n</think>\n\n[1, 2, 3, 4]" and answer.latency_ms > 0


def test_endpoint_without_reasoning_is_bound_by_a_schema():
    [answer] = scripted(FakeServer(honours=True)).answer(requests_of(1), GREEDY, reasoning=False)
    assert answer.raw_answer == '</think>\n\n[{"bbox_2d": [1, 2, 3, 4], "label": "cup"}]'


def test_an_endpoint_that_silently_ignores_the_schema_is_noticed():
    with pytest.raises(ConstraintIgnored, match="ignores structured output"):
        list(scripted(FakeServer(honours=False)).answer(requests_of(1), GREEDY, reasoning=False))


def test_the_profile_s_token_limit_and_fields_are_sent():
    bodies = []
    options = {"token_limit": "max_completion_tokens", "extra_body": {"top_k": 5, "reasoning": {}}}
    ask(endpoint(refusing({}, bodies), **options))
    [body] = bodies
    assert body["max_completion_tokens"] == 12 and "max_tokens" not in body
    assert body["top_k"] == 5 and body["reasoning"] == {}  # a field of the profile wins


def test_a_vote_over_replies_without_token_details_counts_what_is_known():
    seeds = []

    def respond(body):
        seeds.append(body["seed"])
        if body["seed"] == 0:
            return {"error": {"message": "overloaded"}}
        return completion() | {"usage": {"prompt_tokens": 7, "completion_tokens": 9}}

    answer = ask(decoded_as(endpoint(respond), "m@majority-3"))
    assert sorted(seeds) == [0, 1, 2]
    assert answer.error is None and answer.raw_answer == BOX
    assert (answer.reasoning_tokens, answer.answer_tokens) == (None, 18)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (1000, 1), (1, 1000), (300, 299)])
def test_images_are_shrunk_to_the_limit_and_never_enlarged(size):
    image = Image.new("RGB", size)
    small = shrink(image, 500)
    assert small.width * small.height <= 500
    assert shrink(image, size[0] * size[1]) is image and shrink(image, None) is image


def test_odd_replies_are_marked_resumed_and_asked_again(tmp_path):
    """One run over a file: an error, half a surrogate pair, a good answer; then again."""
    Image.new("RGB", (64, 48)).save(tmp_path / "0.png")
    samples = [
        {
            "sample_id": name,
            "dataset": "refcoco",
            "split": "val",
            "task": "vanilla",
            "image": "0.png",
            "width": 64,
            "height": 48,
            "expression": name,
            "gt_box": [0.0, 0.0, 32.0, 24.0],
            "image_id": "0",
            "flipped": False,
        }
        for name in ("broken", "surrogate", "fine")
    ]
    asked, broken = [], {"error": {"message": "overloaded"}}

    def respond(body):
        prompt = body["messages"][0]["content"][1]["text"]
        name = next(sample["sample_id"] for sample in samples if sample["sample_id"] in prompt)
        asked.append(name)
        replies = {"broken": broken, "surrogate": completion(f"\ud83d {BOX}")}
        return json.dumps(replies.get(name, completion())).encode()

    def run(**options):
        stamp = {"model": "m", "profile": "mini", "seed": 0, "sampling": GREEDY}
        out = tmp_path / "p.jsonl"
        predict(samples, endpoint(respond), out=out, root=tmp_path, **stamp, **options)
        return [json.loads(line)["status"] for line in out.read_text("utf-8").splitlines()]

    assert run() == ["error", "ok", "ok"] and len(asked) == 3
    assert run() == ["error", "ok", "ok"] and len(asked) == 3
    broken = completion()
    assert run(retry_errors=True) == ["ok", "ok", "ok"] and asked.count("broken") == 2
