"""A local server that answers as OpenAI, Gemini and `vllm serve` do, and refuses what they refuse.

    with running() as services:
        services.openai_url, services.gemini_url, services.vllm_url  # base URLs for a client

Answers are canned: they have the form that the project's filters and parsers accept, and say
nothing of the image. The same request gets the same answer. Keys of the outside world are refused,
and no key is printed or kept.

Refusals are those of the services (2025). OpenAI names the parameter that it does not know, or that
a reasoning model does not take. Gemini says INVALID_ARGUMENT, in a list, of a key, a field or a
body; its status is 400 even for a missing key.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import io
import json
import random
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

OPENAI_KEY = "sk-rehearsal"
GEMINI_KEY = "AIza-rehearsal"
# For the processes of a rehearsal, in the place of keys that cost money.
ENVIRONMENT = {"OPENAI_API_KEY": OPENAI_KEY, "GEMINI_API_KEY": GEMINI_KEY}

_PATHS = {"openai": "/openai/v1", "gemini": "/gemini/v1beta/openai", "vllm": "/vllm/v1"}
_MODELS = {  # vLLM serves whatever it was started with
    "openai": re.compile(
        r"gpt-4(\.1|o)?(-(mini|nano))?|gpt-5(\.\d)?(-(mini|nano))?|o[134](-mini)?"
    ),
    "gemini": re.compile(r"(models/)?gemini-[\w.-]+"),
    "vllm": re.compile(r".+", re.DOTALL),
}
_REASONING = re.compile(r"o\d|gpt-5")
_COMMON = """
    model messages temperature top_p n stop stream stream_options max_tokens max_completion_tokens
    presence_penalty frequency_penalty response_format tools tool_choice reasoning_effort user
"""
_OPENAI = """
    audio functions function_call logit_bias logprobs metadata modalities parallel_tool_calls
    prediction prompt_cache_key safety_identifier seed service_tier store top_logprobs verbosity
    web_search_options
"""
_GEMINI = "extra_body modalities parallel_tool_calls"
_KNOWN = {  # fields of a request
    "openai": frozenset((_COMMON + _OPENAI).split()),
    "gemini": frozenset((_COMMON + _GEMINI).split()),
}
_NOT_FOR_REASONING = ("top_p", "presence_penalty", "frequency_penalty", "logprobs", "top_logprobs")
_CAUSES = (*["COMPLEX-PROMPT"] * 3, "AMBIGUOUS-IMAGE", "SMALL-OBJECT", "GT-ERROR", "OTHER")
_NO_ONE_IN = 8  # verifications
_IMAGE_TOKENS, _THOUGHT_TOKENS = 765, 64


class Refusal(Exception):
    """An answer that is an error. document: the body."""

    def __init__(self, status: int, document: object) -> None:
        super().__init__(status)
        self.status, self.document = status, document


@dataclass(frozen=True)
class Services:
    """The running server. counts: (service, model, task, HTTP status) -> number of requests."""

    port: int
    counts: Counter

    @property
    def root_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def openai_url(self) -> str:
        return service_url("openai", self.root_url)

    @property
    def gemini_url(self) -> str:
        return service_url("gemini", self.root_url)

    @property
    def vllm_url(self) -> str:
        return service_url("vllm", self.root_url)


def service_url(service: str, root_url: str) -> str:
    """The base URL of "openai", "gemini" or "vllm" on a server at root_url."""
    return root_url.rstrip("/") + _PATHS[service]


@contextmanager
def running(port: int = 0) -> Iterator[Services]:
    """The server, in a thread of this process. port 0: any free one.

    A run that is to be resumed needs the same port again: its profile names it.
    """
    counts: Counter = Counter()
    lock = threading.Lock()

    class Handler(_Handler):
        def count(self, *what: object) -> None:
            with lock:
                counts[what] += 1

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    try:
        yield Services(server.server_address[1], counts)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body are sent apart: the body would wait 40 ms for the header's receipt.
    disable_nagle_algorithm = True

    def count(self, *what: object) -> None:
        raise NotImplementedError

    def log_message(self, *args: object) -> None:
        """Nothing is printed: a header may hold a key."""

    def do_GET(self) -> None:
        service, rest = self._place()
        if service and rest == "/models":
            try:
                _check_key(service, self.headers.get("Authorization"))
            except Refusal as refusal:
                self._send(refusal.status, refusal.document)
                return
            names = {"openai": ["gpt-4.1", "gpt-5"], "gemini": ["models/gemini-3-pro-preview"]}.get(
                service, []
            )
            self._send(
                200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}
            )
        else:
            self._send(404, _error(f"Invalid URL (GET {self.path})"))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        service, rest = self._place()
        if not service or rest != "/chat/completions":
            self._send(404, _error(f"Invalid URL (POST {self.path})"))
            return
        task, model = self.headers.get("X-EGM-Task") or "grounding", None
        try:
            _check_key(service, self.headers.get("Authorization"))
            request = _checked(service, body)
            model = request["model"]
            completion = _completion(service, request, task)
        except Refusal as refusal:
            self.count(service, model, task, refusal.status)
            self._send(refusal.status, refusal.document)
            return
        self.count(service, model, task, 200)
        if request.get("stream"):
            self._stream(
                completion, bool((request.get("stream_options") or {}).get("include_usage"))
            )
        else:
            self._send(200, completion)

    def _place(self) -> tuple[str | None, str]:
        path = self.path.partition("?")[0]
        for service, prefix in _PATHS.items():
            if path.startswith(prefix + "/"):
                return service, path.removeprefix(prefix)
        return None, path

    def _send(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status, HTTPStatus(status).phrase)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, completion: dict, with_usage: bool) -> None:
        """The completion as server-sent events, a word at a time; usage comes last."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = {name: completion[name] for name in ("id", "created", "model")} | {
            "object": "chat.completion.chunk"
        }
        text = completion["choices"][0]["message"]["content"]
        deltas = [
            {"role": "assistant", "content": ""},
            *({"content": word} for word in re.findall(r"\s*\S+|\s+$", text)),
        ]
        events = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
        ]
        reason = completion["choices"][0]["finish_reason"]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
        if with_usage:
            events.append({"choices": [], "usage": completion["usage"]})
        for event in events:
            self.wfile.write(b"data: " + json.dumps(head | event).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")


# --- what is refused ---


def _error(
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: object = None,
) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _gemini_error(message: str, status: int = 400, name: str = "INVALID_ARGUMENT") -> Refusal:
    return Refusal(status, [{"error": {"code": status, "message": message, "status": name}}])


def _check_key(service: str, header: str | None) -> None:
    key = (header or "").removeprefix("Bearer ").strip()
    if service == "openai" and key != OPENAI_KEY:
        if not key:
            raise Refusal(
                401,
                _error(
                    "You didn't provide an API key. You need to provide your API key in an "
                    "Authorization header using Bearer auth."
                ),
            )
        raise Refusal(401, _error("Incorrect API key provided.", code="invalid_api_key"))
    if service == "gemini" and key != GEMINI_KEY:
        raise _gemini_error(
            "API key not valid. Please pass a valid API key."
            if key
            else "Missing Authorization header."
        )


def _checked(service: str, body: bytes) -> dict:
    """The request's JSON; raises Refusal where the service would not take it."""
    try:
        request = json.loads(body)
    except ValueError:
        request = None
    if not isinstance(request, dict):
        message = "We could not parse the JSON body of your request."
        raise _gemini_error(message) if service == "gemini" else Refusal(400, _error(message))
    if service != "vllm":
        _check_fields(service, request)
    model = str(request.get("model", ""))
    if not _MODELS[service].fullmatch(model):
        if service == "gemini":
            message = f"models/{model} is not found for API version v1main, or is not supported."
            raise _gemini_error(message, 404, "NOT_FOUND")
        message = f"The model `{model}` does not exist or you do not have access to it."
        raise Refusal(404, _error(message, code="model_not_found"))
    if service == "openai" and _REASONING.match(model):
        _check_reasoning_model(request)
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        message = "Missing required parameter: 'messages'."
        raise (
            _gemini_error(message)
            if service == "gemini"
            else Refusal(400, _error(message, param="messages"))
        )
    try:
        images_read = all(map(_is_image, _image_urls(messages)))
    except (AttributeError, KeyError, TypeError):
        message = (
            "Invalid type for 'messages': expected a list of messages with text and image parts."
        )
        raise (
            _gemini_error(message)
            if service == "gemini"
            else Refusal(400, _error(message, param="messages"))
        ) from None
    if not images_read:
        if service == "gemini":
            raise _gemini_error("Unable to process input image.")
        message = "You uploaded an unsupported image. Please make sure your image is valid."
        raise Refusal(400, _error(message, param="messages", code="invalid_image_format"))
    return request


def _check_fields(service: str, request: dict) -> None:
    for name in request:
        if name not in _KNOWN[service]:
            if service == "gemini":
                raise _gemini_error(
                    f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.'
                )
            message = f"Unknown parameter: '{name}'."
            raise Refusal(400, _error(message, param=name, code="unknown_parameter"))
    temperature = request.get("temperature")
    if temperature is not None and not (
        isinstance(temperature, int | float) and 0 <= temperature <= 2
    ):
        message = f"Invalid 'temperature': {temperature} is not between 0 and 2."
        raise (
            _gemini_error(message)
            if service == "gemini"
            else Refusal(400, _error(message, param="temperature"))
        )


def _check_reasoning_model(request: dict) -> None:
    if "max_tokens" in request:
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. "
        message += "Use 'max_completion_tokens' instead."
        raise Refusal(400, _error(message, param="max_tokens", code="unsupported_parameter"))
    if request.get("temperature") not in (None, 1):
        value = request["temperature"]
        message = f"Unsupported value: 'temperature' does not support {value} with this model. "
        message += "Only the default (1) value is supported."
        raise Refusal(400, _error(message, param="temperature", code="unsupported_value"))
    for name in _NOT_FOR_REASONING:
        if name in request:
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            raise Refusal(400, _error(message, param=name, code="unsupported_parameter"))


def _parts(messages: list) -> Iterator[dict]:
    for message in messages:
        content = message.get("content")
        yield from (
            [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        )


def _image_urls(messages: list) -> Iterator[str]:
    for part in _parts(messages):
        if part.get("type") == "image_url":
            yield part["image_url"]["url"]


def _is_image(url: str) -> bool:
    head, comma, data = url.partition(",")
    if not comma or not re.fullmatch(r"data:image/(png|jpeg|webp|gif);base64", head):
        return False
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            image.verify()
    except (binascii.Error, OSError, ValueError, SyntaxError):
        return False
    return True


# --- what is answered ---


def _completion(service: str, request: dict, task: str) -> dict:
    prompt = "\n".join(
        part["text"] for part in _parts(request["messages"]) if part.get("type") == "text"
    )
    num_images = sum(1 for _ in _image_urls(request["messages"]))
    digest = hashlib.sha256(
        json.dumps([task, request["messages"]], sort_keys=True).encode()
    ).hexdigest()
    text = _ANSWERS.get(task, _grounding)(prompt, digest, request)
    num_prompt, num_answer = len(prompt) // 4 + num_images * _IMAGE_TOKENS, len(text) // 4 + 1
    usage: dict = {"prompt_tokens": num_prompt}
    if service == "openai" and _REASONING.match(
        request["model"]
    ):  # they think first, and charge for it
        num_answer += _THOUGHT_TOKENS
        usage["completion_tokens_details"] = {"reasoning_tokens": _THOUGHT_TOKENS}
    limit = request.get("max_completion_tokens") or request.get("max_tokens")
    finish_reason = "stop"
    if limit is not None and num_answer > limit:
        text, num_answer, finish_reason = (
            text[: 4 * max(0, limit - num_answer + len(text) // 4)],
            limit,
            "length",
        )
    usage |= {"completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}
    choice = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": text},
    }
    if service == "openai":
        choice["message"]["refusal"] = None
    return {
        "id": f"chatcmpl-{digest[:24]}",
        "object": "chat.completion",
        "created": 0,  # the same request gets the same answer
        "model": request["model"],
        "choices": [choice],
        "usage": usage,
    }


def _quoted(prompt: str) -> str:
    """The expression of a curation prompt: alone on its line, in quotation marks."""
    found = re.search(r'^\s*(?:Expression: )?"(.+)"\s*$', prompt, re.MULTILINE)
    return found[1] if found else "thing that is asked for"


def _trace(prompt: str, digest: str, request: dict) -> str:
    expression = _quoted(prompt).removeprefix("the ").removeprefix("a ")
    return f"Look for the {expression} among the shapes. Colour and place fit only this one."


def _amodal_expression(prompt: str, digest: str, request: dict) -> str:
    found = re.search(r"one object, an? (.+?), is marked", " ".join(prompt.split()))
    kind = found[1] if found else "shape"
    return f"the partly hidden {kind}" if int(digest[0], 16) % 2 else f"{kind} behind another shape"


def _verdict(prompt: str, digest: str, request: dict) -> str:
    return "NO" if int(digest[:8], 16) % _NO_ONE_IN == 0 else "YES"


def _amodal_trace(prompt: str, digest: str, request: dict) -> str:
    found = re.search(r"the object extends: (.+?)\.\s", " ".join(prompt.split()) + " ")
    extent = found[1] if found and not found[1].startswith("in no direction") else ""
    begun = f"First find the {_quoted(prompt).removeprefix('the ')}. "
    if not extent:
        return begun + "Nothing hides it, so its complete shape is what one sees."
    return begun + f"Another shape lies on top of part of it. The whole shape extends {extent}."


def _cause(prompt: str, digest: str, request: dict) -> str:
    """What failed, mostly the same for all judges: every fifth verdict is a judge's own."""
    shared = random.Random(digest)
    cause = shared.choice(_CAUSES)
    of_judge = random.Random(digest + str(request["model"]))
    return of_judge.choice(_CAUSES) if of_judge.random() < 0.2 else cause


def _grounding(prompt: str, digest: str, request: dict) -> str:
    """A box in 0..1000, drawn from the digest, as the family of the prompt writes one.

    Bare JSON where a schema binds the answer.
    """
    x1, y1, x2, y2 = (int(digest[8 * place : 8 * place + 8], 16) for place in range(4))
    box = [x1 % 500, y1 % 500, 501 + x2 % 500, 501 + y2 % 500]
    label = re.search(r"<ref>(.+?)</ref>", prompt)
    if label:
        return f"<answer><ref>{label[1]}</ref><box>{box}</box></answer>"
    named = re.match(r'Locate (.+?)(?: amodally)?, output|.*description "(.+?)"', prompt)
    item = json.dumps(
        {"bbox_2d": box, "label": (named and (named[1] or named[2])) or "object"},
        ensure_ascii=False,
    )
    bound = (request.get("response_format") or {}).get("type") == "json_schema"
    return f"[{item}]" if bound else f"```json\n[\n\t{item}\n]\n```"


_ANSWERS = {
    "trace": _trace,
    "amodal-expression": _amodal_expression,
    "verify": _verdict,
    "amodal-trace": _amodal_trace,
    "failure": _cause,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The stand-in services, until Ctrl-C; prints their base URLs."
    )
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args(argv)
    with running(args.port) as services:
        print(services.openai_url, services.gemini_url, services.vllm_url, sep="\n", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
