"""Services that speak OpenAI's chat API: connections and refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai

from egm_lib.curation.options import CurationError
from egm_lib.profile import MINI, is_local

MAX_WORDS = 500  # of an error
# Some services answer 403 for one input that their moderation flags.
_FLAGGED = re.compile(r"flagged|moderation|safety|content policy", re.IGNORECASE)


def connect(
    base_url: str, key: str, *, root: Path, timeout_s: float, max_retries: int
) -> openai.AsyncOpenAI:
    """The openai client of a service; "mini" is answered in process, from `root/teacher.jsonl`.

    Raises CurationError for what is not a base URL.
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
            f"{base_url!r} is not a base URL: give one like https://api.openai.com/v1 or "
            "http://localhost:8000/v1"
        )
    if address.password or address.query:
        raise CurationError(
            "the base URL holds a password or a query; keys belong in the environment only"
        )
    # This machine is reached without the proxy that is set for the outside world.
    http_client = openai.DefaultAsyncHttpxClient(trust_env=not is_local(base_url))
    timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, 15.0))
    return openai.AsyncOpenAI(
        base_url=base_url,
        api_key=key,
        timeout=timeout,
        max_retries=max_retries,
        http_client=http_client,
    )


def words_of(error: Exception) -> str:
    """What went wrong, in one line of at most MAX_WORDS characters.

    The client's own words lack what a service says in another field than error.message, such as
    FastAPI's "detail".
    """
    body = getattr(error, "body", None)
    told = not body or (isinstance(body, Mapping) and isinstance(body.get("message"), str))
    words = f"{error}" if told else f"{error}: {body}"
    return " ".join(f"{type(error).__name__}: {words}".split())[:MAX_WORDS]


def refuses_everything(error: Exception) -> str | None:
    """Why every other sample would fail too; None if this sample alone is refused."""
    if isinstance(error, openai.PermissionDeniedError) and _FLAGGED.search(str(error)):
        return None
    if isinstance(
        error, openai.AuthenticationError | openai.PermissionDeniedError | openai.NotFoundError
    ):
        return f"the service refuses: {error}"
    no_credit = isinstance(error, openai.APIStatusError) and error.status_code == 402
    if no_credit or getattr(error, "code", None) == "insufficient_quota":
        return f"the account has no credit: {error}"
    return None
