"""The one reader of chat completions: a body is an answer or one sentence, and nothing raises."""

import json
import random
from types import SimpleNamespace

import openai.types.chat as chat
import pytest
from reply_fuzz import fuzz

from egm_lib.curation.replies import ChatReply, read_reply, read_stream

USAGE = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}


def completion(message, finish_reason="stop", **more):
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "r", "object": "chat.completion", "choices": [choice], "usage": USAGE} | more


def chunk(delta, finish_reason=None, **more):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]} | more


@pytest.mark.parametrize(
    "form",
    [
        lambda body: body,
        json.dumps,
        lambda body: json.dumps(body).encode(),
        lambda body: b"\xef\xbb\xbf" + json.dumps(body).encode(),  # with a byte-order mark
        lambda body: "\n\n" + json.dumps(body),  # a gateway keeps the connection open with newlines
        lambda body: chat.ChatCompletion.construct(**body),
        lambda body: json.loads(json.dumps(body), object_hook=lambda d: SimpleNamespace(**d)),
    ],
)
def test_a_body_may_come_in_any_form(form):
    reply = read_reply(form(completion({"role": "assistant", "content": "left"})))
    assert (reply.text, reply.reasoning, reply.finish, reply.error) == ("left", None, "stop", None)
    assert (reply.prompt_tokens, reply.reasoning_tokens, reply.answer_tokens) == (9, None, 5)


@pytest.mark.parametrize(
    "body, sentence",
    [
        ({"error": {"message": "slow down", "code": 429}}, "error: slow down"),  # with status 200
        ({"error": "overloaded"}, "error: overloaded"),
        ([{"error": {"message": "quota"}}], "error: quota"),  # Gemini's errors come in a list
        ({"error": {"x": 1}}, "the service reports an error: {'x': 1}"),
        ({"object": "error", "message": "not found"}, "no choices: not found"),  # older vLLM
        ({"detail": "Not Found"}, "no choices: Not Found"),  # FastAPI
        (completion({"content": "half"}, error={"message": "gone"}), "gone"),  # an error beside it
        ({"choices": [{"error": {"message": "gone"}}]}, "gone"),  # an error within the choice
        ({"choices": None}, "no choices"),
        ({"choices": []}, "no choices"),
        ({"choices": {}}, "no choices"),
        ({"choices": [None]}, "no choices"),
        (completion(None), "no message"),
        (completion({"content": 7}), "neither text nor a list"),
        (completion({"content": [{"type": "image_url"}]}), "neither text nor a list"),
        ("<html><body>502 Bad Gateway</body></html>", "web page"),
        ("", "the reply is empty"),
        (b" \n", "the reply is empty"),
        ("null", "the reply is empty"),
        (None, "the reply is empty"),
        ('{"choices": [{"message": {"content": "half', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("7" * 10_000, "not JSON"),  # more digits than Python reads
        ([], "not a chat completion"),
        ("true", "not a chat completion"),
        ([10**5000], "not a chat completion"),
        (ValueError("odd"), "no choices"),
    ],
)
def test_what_is_no_completion_is_one_sentence(body, sentence):
    reply = read_reply(body)
    assert reply.finish == "error" and sentence in reply.error
    assert "\n" not in reply.error and len(reply.error) < 400


@pytest.mark.parametrize(
    "reason, finish",
    [
        ("stop", "stop"),
        ("length", "length"),
        *[
            (reason, "error")
            for reason in ("error", "abort", "content_filter", "MAX_TOKENS", "SAFETY", "tool_calls")
        ],
        ("STOP", "error"),  # no service that speaks this protocol says so
        (None, "error"),  # not finished, as null says in a stream
        (7, "error"),
    ],
)
def test_only_stop_is_finished_and_only_length_is_cut(reason, finish):
    for reply in (
        read_reply(completion({"content": "left"}, reason)),
        read_stream([chunk({"content": "left"}), chunk({}, reason)]),
    ):
        assert reply.finish == finish and (reply.error is None) == (finish != "error")


def test_a_service_that_leaves_the_finish_reason_out_has_sent_a_whole_reply():
    body = {"choices": [{"message": {"content": "left"}}]}
    assert read_reply(body).finish == "stop"
    assert read_reply(chat.ChatCompletion.construct(**body)).finish == "stop"
    assert read_stream([chunk({"content": "left"})]).finish == "error"  # a stream always ends


@pytest.mark.parametrize(
    "message, text, reasoning",
    [
        ({"content": None, "reasoning_content": "think"}, "", "think"),  # never came to an answer
        ({"content": "left", "reasoning": "think"}, "left", "think"),
        (
            {"content": "left", "reasoning": "t", "reasoning_content": "t"},
            "left",
            "t",
        ),  # same twice
        ({"content": [{"type": "text", "text": "le"}, {"text": "ft"}]}, "left", None),
        ({"content": [{"type": "output_text", "text": "left"}, {"type": "image"}]}, "left", None),
        ({"content": ["le", None, "ft"]}, "left", None),
        ({"content": {"type": "text", "text": "left"}}, "left", None),  # one part without a list
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "think"}]},
                    {"type": "text", "text": "left"},
                ]
            },
            "left",
            "think",
        ),
        ({"content": None}, "", None),
        ({"content": "half \ud83d of a pair"}, "half \ufffd of a pair", None),
    ],
)
def test_where_text_and_reasoning_stand(message, text, reasoning):
    whole = read_reply(completion(message, "length"))
    streamed = read_stream([chunk(message), chunk({}, "length")])
    for reply in (whole, streamed):
        assert (reply.text, reply.reasoning, reply.finish) == (text, reasoning, "length")
        reply.text.encode()


def test_a_refusal_is_the_services_not_the_models():
    for message in (
        {"content": None, "refusal": "I cannot"},
        {"content": [{"type": "refusal", "refusal": "I cannot"}]},
    ):
        reply = read_reply(completion(message))
        assert reply.finish == "error" and reply.declined and "I cannot" in reply.error
    filtered = read_reply(completion({"content": "half a"}, "content_filter"))
    assert filtered.declined and filtered.text == "half a"
    assert not read_reply(completion({"content": "left"}, "abort")).declined


@pytest.mark.parametrize(
    "usage, counts",
    [
        (USAGE, (9, None, 5)),
        (USAGE | {"completion_tokens_details": {"reasoning_tokens": 3}}, (9, 3, 2)),
        (USAGE | {"completion_tokens_details": None}, (9, None, 5)),
        (USAGE | {"completion_tokens_details": {"reasoning_tokens": None}}, (9, None, 5)),
        (USAGE | {"completion_tokens_details": {"reasoning_tokens": 8}}, (9, 8, 5)),  # not within
        (USAGE | {"total_tokens": 114}, (9, 100, 5)),  # Gemini: thoughts in the total alone
        (USAGE | {"prompt_tokens": None}, (None, None, 5)),
        (USAGE | {"completion_tokens": "5"}, (9, None, None)),
        ({"prompt_tokens": True, "completion_tokens": -1}, (None, None, None)),
        ({"prompt_tokens": 10**30}, (None, None, None)),
        ({}, (None, None, None)),
        (None, (None, None, None)),
        ("many", (None, None, None)),
    ],
)
def test_tokens_are_counts_or_unknown(usage, counts):
    for reply in (
        read_reply(completion({"content": "left"}, usage=usage)),
        read_stream([chunk({"content": "left"}, "stop"), {"choices": [], "usage": usage}]),
    ):
        assert (reply.prompt_tokens, reply.reasoning_tokens, reply.answer_tokens) == counts


def test_all_charged_tokens_are_counted():
    assert ChatReply(answer_tokens=5, reasoning_tokens=100).completion_tokens == 105
    assert ChatReply(answer_tokens=5).completion_tokens == 5
    assert ChatReply().completion_tokens is None


def test_a_stream_with_empty_chunks_is_joined():
    chunks = [
        None,
        {},
        {"choices": None},
        {"choices": [{"index": 0, "delta": None}]},
        chunk({"role": "assistant", "content": ""}),
        chunk({"reasoning_content": "think"}),
        chunk({"content": "le"}),
        chat.ChatCompletionChunk.construct(**chunk({"content": "f"})),
        b'data: {"choices": [{"delta": {"content": "t"}}]}\n\n',
        {"choices": [{"index": 1, "delta": {"content": "another answer"}}]},
        chunk({}, "stop"),
        {"choices": [], "usage": USAGE},
        "data: [DONE]",
    ]
    reply = read_stream(iter(chunks))
    assert (reply.text, reply.reasoning, reply.finish) == ("left", "think", "stop")
    assert reply.prompt_tokens == 9 and reply.first_token_at is not None


@pytest.mark.parametrize(
    "last, sentence",
    [
        ({"error": {"message": "the engine died"}}, "the engine died"),
        ("{half a chu", "a chunk is not JSON"),
        (7, "a chunk is not a chat completion"),
    ],
)
def test_a_stream_with_a_broken_chunk_is_an_error_with_its_text(last, sentence):
    reply = read_stream([chunk({"content": "left"}), last, chunk({}, "stop")])
    assert reply.finish == "error" and sentence in reply.error and reply.text == "left"


def test_errors_of_the_transport_pass_through():
    def broken():
        yield chunk({"content": "left"})
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        read_stream(broken())


def test_no_exception_leaves_the_reader():
    """The benchmark runs 100,000 (`benchmarks/bench_curation.py replies`)."""
    assert fuzz(3000, random.Random(0)).total() == 3000
