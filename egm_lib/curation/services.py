"""Services that speak OpenAI's chat API: their keys, connections, and what they answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai

from egm_lib.errors import EgmError
from egm_lib.profile import MINI, is_local


class CurationError(EgmError, RuntimeError):
    """The run cannot start or go on; the message says why and what to do."""


class Refused(CurationError):
    """The service refuses everything (wrong key, wrong model, no credit): going on would fail every
    sample.
    """


def connect(
    base_url: str, key: str, *, root: Path, timeout_s: float, max_retries: int
) -> openai.AsyncOpenAI:
    """The openai client of a service. base_url "mini" is answered in process from
    `root/teacher.jsonl`.
    """
    if base_url == MINI:
        from egm_lib.mini.teacher import TeacherTransport

        return openai.AsyncOpenAI(
            base_url="http://mini.invalid/v1",
            api_key=key,
            max_retries=max_retries,
            http_client=httpx2.AsyncClient(transport=TeacherTransport(root / "teacher.jsonl")),
        )
    address = urlsplit(base_url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise CurationError(
            f"{base_url!r} is no base URL: give one like https://api.openai.com/v1 or http://localhost:8000/v1"
        )
    if address.password or address.query:
        raise CurationError(
            "the base URL holds a password or a query; keys belong in the environment only"
        )
    # a proxy set for the outside world is not asked for this machine
    http_client = openai.DefaultAsyncHttpxClient(trust_env=not is_local(base_url))
    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, 15.0))
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        http_client=http_client,
    )


def sampling_options(model: str, temperature: float, max_tokens: int) -> dict:
    """Sampling as the service wants it: OpenAI's reasoning models take no temperature and call the
    limit otherwise.
    """
    if re.match(r"(.*/)?(o\d|gpt-5)", model):
        return {"max_completion_tokens": max_tokens}
    return {"temperature": temperature, "max_tokens": max_tokens}


def read_completion(body: str) -> dict:
    """What the ledger keeps of a chat completion; raises ValueError, KeyError, TypeError, ... where
    the body is none.

    usage: None where the service does not say.
    """
    completion = json.loads(body)
    choice = completion["choices"][0]
    content = choice["message"].get("content") or ""
    if isinstance(content, list):  # some services answer in parts
        content = "".join(part.get("text", "") for part in content)
    usage = completion.get("usage") or {}
    usage = {name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "text": str(content),
        "finish_reason": choice.get("finish_reason"),
        "refusal": choice["message"].get("refusal"),
        "usage": usage if all(isinstance(count, int) for count in usage.values()) else None,
        "response_id": completion.get("id"),
    }


def refuses_everything(error: Exception) -> str | None:
    """A reason that would fail every other sample too, None where this one is alone."""
    if isinstance(
        error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError
    ):
        return f"the service refuses: {error}"
    if isinstance(error, openai.RateLimitError) and error.code == "insufficient_quota":
        return f"the account has no credit: {error}"
    return None
