"""Services that speak OpenAI's chat API: connections, options, and refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai

from egm_lib.errors import EgmError
from egm_lib.profile import MINI, Teacher, is_local

MAX_WORDS = 500  # of an error
TOKEN_LIMITS = ("max_tokens", "max_completion_tokens")
_UNSUPPORTED = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|extra (?:inputs|fields)"
    r"|not (?:permitted|allowed|accepted)|forbidden|only the default|cannot find field",
    re.IGNORECASE,
)
# Some services answer 403 for one input that their moderation flags.
_FLAGGED = re.compile(r"flagged|moderation|safety|content policy", re.IGNORECASE)


class CurationError(EgmError, RuntimeError):
    """The run cannot start or continue; the message says why and what to do."""


class Refused(CurationError):
    """The service refuses everything: wrong key, wrong model, no credit."""


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


def sampling_options(teacher: Teacher, temperature: float | None) -> dict:
    """The fields of a request beside model and messages, as the profile wants them.

    OpenAI's reasoning models take no temperature and have a name of their own for the limit.
    temperature: None leaves it out.
    """
    reasons = re.match(r"(.*/)?(o\d|gpt-5)", teacher.model) is not None
    limit = teacher.token_limit or ("max_completion_tokens" if reasons else "max_tokens")
    options: dict = {} if reasons or temperature is None else {"temperature": temperature}
    options |= {limit: teacher.max_tokens, **teacher.extra_body}
    return {name: value for name, value in options.items() if value is not None}


class AcceptedOptions:
    """What of the wanted options a service accepts, learned from its refusals.

    sent: the options of the next request. notes: what was learned, a sentence each.
    """

    def __init__(self, wanted: Mapping) -> None:
        self.sent = dict(wanted)
        self.notes: list[str] = []
        self._refused: set[str] = set()

    def learn(self, message: str, sent: Mapping) -> bool:
        """Read a refusal of a request with the options `sent`; True where asking again may help."""
        if sent != self.sent:  # another request has learned something meanwhile
            return True
        name = _refused_option(message, sent)
        if name is None:
            return False
        self._refused.add(name)
        if name in TOKEN_LIMITS:
            other = next(limit for limit in TOKEN_LIMITS if limit != name)
            if other in self._refused:  # never without a limit: it is what the budget counts on
                return False
            self.sent = {other if key == name else key: value for key, value in sent.items()}
            self.notes.append(f"the service refuses {name!r}: it is asked with {other!r} instead")
        else:
            self.sent = {key: value for key, value in sent.items() if key != name}
            self.notes.append(f"the service refuses {name!r}: it is asked without it")
        return True


def _refused_option(message: str, sent: Mapping) -> str | None:
    """The option that a refusal calls unknown or unsupported, None if it names none."""
    if not _UNSUPPORTED.search(message):
        return None
    # The first one named is refused; another may follow as the one to use instead.
    places = {name: re.search(rf"\b{re.escape(name)}\b", message) for name in sent}
    found = [(match.start(), name) for name, match in places.items() if match]
    return min(found)[1] if found else None


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
