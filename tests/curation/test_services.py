"""Options: what each service wants, and what is learned from a service that refuses one."""

import json

import httpx2
import openai
import pytest
from curation_world import completion, make_root, service, teacher

from egm_lib.curation.options import AcceptedOptions, sampling_options
from egm_lib.curation.services import refuses_everything


@pytest.mark.parametrize(
    "model, options, sent",
    [
        # OpenAI's chat models, Gemini and `vllm serve` take both
        ("gpt-4.1", {}, {"temperature": 0.7, "max_tokens": 800}),
        ("gemini-3-pro-preview", {}, {"temperature": 0.7, "max_tokens": 800}),
        ("Qwen/Qwen3-VL-8B-Thinking", {}, {"temperature": 0.7, "max_tokens": 800}),
        # OpenAI's reasoning models take no temperature
        ("gpt-5", {}, {"max_completion_tokens": 800}),
        ("openai/o3", {}, {"max_completion_tokens": 800}),
        # ... and what a profile may say of any model
        ("m", {"temperature": None}, {"max_tokens": 800}),
        ("m", {"extra_body": {"temperature": None, "top_k": None}}, {"max_tokens": 800}),
        (
            "m",
            {"token_limit": "max_completion_tokens"},
            {"temperature": 0.7, "max_completion_tokens": 800},
        ),
        (
            "m",
            {"extra_body": {"top_p": 0.9, "chat_template_kwargs": {"enable_thinking": False}}},
            {
                "temperature": 0.7,
                "max_tokens": 800,
                "top_p": 0.9,
                "chat_template_kwargs": {"enable_thinking": False},
            },
        ),
    ],
)
def test_options_of_a_request(model, options, sent):
    service = teacher("http://127.0.0.1:9/v1", model=model, **options)
    assert sampling_options(service, service.temperature) == sent


WANTED = {"temperature": 0.7, "max_tokens": 800, "top_k": 20}


@pytest.mark.parametrize(
    "message, left",
    [
        (  # OpenAI
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            {"temperature": 0.7, "max_completion_tokens": 800, "top_k": 20},
        ),
        (
            "Unsupported value: 'temperature' does not support 0.7 with this model. Only the "
            "default (1) value is supported.",
            {"max_tokens": 800, "top_k": 20},
        ),
        (
            "Unrecognized request argument supplied: top_k",
            {"temperature": 0.7, "max_tokens": 800},
        ),
        (  # Gemini
            'Invalid JSON payload received. Unknown name "top_k": Cannot find field.',
            {"temperature": 0.7, "max_tokens": 800},
        ),
        (  # servers that check their input with pydantic
            "[{'type': 'extra_forbidden', 'loc': ('body', 'top_k'), 'msg': 'Extra inputs are not "
            "permitted'}]",
            {"temperature": 0.7, "max_tokens": 800},
        ),
        # A value out of range is the profile's mistake, and dropping the limit would mend nothing
        ("max_tokens is too large: 800. This model allows at most 400 tokens", None),
        ("the image could not be decoded", None),
        ("unsupported image format", None),
    ],
)
def test_what_a_refusal_teaches(message, left):
    options = AcceptedOptions(WANTED)
    assert options.learn(message, WANTED) == (left is not None)
    assert options.sent == (left or WANTED) and len(options.notes) == (left is not None)


def test_requests_under_way_learn_once_and_the_limit_is_never_dropped():
    options = AcceptedOptions({"max_tokens": 800})
    first = options.sent
    for _ in range(8):  # as many as were sent with the first options
        assert options.learn("unsupported: 'max_tokens', use 'max_completion_tokens'", first)
    assert options.sent == {"max_completion_tokens": 800} and len(options.notes) == 1
    assert not options.learn("unknown parameter: max_completion_tokens", options.sent)
    assert options.sent == {"max_completion_tokens": 800}


def test_a_run_learns_from_the_first_refusal_and_reports_it_once(tmp_path, run, monkeypatch):
    bodies = []

    def handler(request):
        body = json.loads(request.content)
        bodies.append(body)
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens' is not supported with this model."
            error = {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}
            return httpx2.Response(400, json={"error": error})
        if "temperature" in body:
            error = {"message": "Unsupported value", "param": "temperature"}
            return httpx2.Response(400, json={"error": error})
        return httpx2.Response(200, json=completion("the left one."))

    asked = service(handler, monkeypatch, concurrency=4)
    report = run("trace", make_root(tmp_path, 40), asked)
    assert report.kept == 40 and report.failed == 0
    assert len(report.notes) == 2 and str(report).count("max_completion_tokens") == 1
    refused = sum("max_tokens" in body or "temperature" in body for body in bodies)
    assert refused <= 2 * 4  # what was under way
    assert {key for key in bodies[-1] if key not in ("model", "messages")} == {
        "max_completion_tokens"
    }
    # The answers belong to what the profile asks for: learning again asks none of them anew.
    assert run("trace", make_root(tmp_path, 40), asked).asked == 0


def error_of(kind, status, message="no", **body):
    response = httpx2.Response(status, request=httpx2.Request("POST", "http://x/v1"))
    return kind(message, response=response, body=body or None)


@pytest.mark.parametrize(
    "error, everything",
    [
        (error_of(openai.AuthenticationError, 401), True),
        (error_of(openai.NotFoundError, 404), True),
        (error_of(openai.PermissionDeniedError, 403), True),
        (error_of(openai.PermissionDeniedError, 403, "your input was flagged"), False),
        (error_of(openai.APIStatusError, 402), True),
        (error_of(openai.RateLimitError, 429), False),
        (error_of(openai.RateLimitError, 429, code="insufficient_quota"), True),
        (error_of(openai.BadRequestError, 400), False),
        (TimeoutError(), False),
    ],
)
def test_what_would_fail_every_sample(error, everything):
    assert (refuses_everything(error) is not None) == everything
