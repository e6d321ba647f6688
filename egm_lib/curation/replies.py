"""The one reader of chat completions, for curation and for evaluation.

Contract:
- `read_reply(body)` takes a whole reply: text, bytes, parsed JSON, or an object of the openai
  client. `read_stream(chunks)` takes the chunks of a streamed reply in any of the same forms.
- Both return a `ChatReply`, whatever the body is. Only errors that the iterator of chunks raises
  itself, those of the transport, pass through `read_stream`.
- Whatever is neither a finished nor a cut answer has `finish == "error"` and one sentence in
  `error`. Such a reply says nothing about the model and must not be scored.
- All texts can be written as UTF-8: half a surrogate pair becomes U+FFFD.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from egm_lib.files import writable

MAX_COUNT = 2**31  # no reply has so many tokens
MAX_SHOWN = 300  # characters of a service's own words in an error
# A service's own decision not to answer: paid for, and the same when asked again.
DECLINED = frozenset(
    ("content_filter", "safety", "prohibited_content", "recitation", "blocklist", "spii", "refusal")
)


@dataclass(frozen=True)
class ChatReply:
    """What a chat endpoint has answered.

    text: the content alone. reasoning: what the service set apart as reasoning, None if it set
    nothing apart. With reasoning, an empty text and finish "length", the answer was never begun.
    finish: "stop" for finish reason "stop", "length" for "length", "error" for everything else;
    error is then one sentence, and None otherwise. None while a stream continues.
    reasoning_tokens: None if the service does not tell; answer_tokens then counts all completion
    tokens. All counts are None if the service reports none.
    finish_reason: the service's own word. refusal: its own words for declining.
    first_token_at: `time.perf_counter()` when the first text of a stream arrived.
    """

    text: str = ""
    reasoning: str | None = None
    finish: Literal["stop", "length", "error"] | None = "error"
    error: str | None = None
    prompt_tokens: int | None = None
    reasoning_tokens: int | None = None
    answer_tokens: int | None = None
    finish_reason: str | None = None
    refusal: str | None = None
    response_id: str | None = None
    first_token_at: float | None = None

    @property
    def completion_tokens(self) -> int | None:
        """All tokens that are charged as output."""
        if self.answer_tokens is None:
            return None
        return self.answer_tokens + (self.reasoning_tokens or 0)

    @property
    def declined(self) -> bool:
        """Whether the service decided not to answer; asking again would give the same."""
        return bool(self.refusal) or (self.finish_reason or "").lower() in DECLINED


def read_reply(body: object) -> ChatReply:
    """A whole chat completion, or the error that came in its place."""
    try:
        node = _parsed(body)
    except EOFError:
        return ChatReply(error="the reply is empty")
    except ValueError as error:
        return ChatReply(error=f"the reply {error}")
    draft = _Draft(usage=_field(node, "usage"), response_id=_field(node, "id"))
    choices = _field(node, "choices")
    choice = choices[0] if isinstance(choices, list | tuple) and choices else None
    message = _field(choice, "message")
    if complaint := _complaint(node) or _complaint(choice):
        draft.error = complaint
    elif choice is None:
        said = _words(node, "message", "detail")
        draft.error = "the reply has no choices" + (f": {said}" if said else "")
    elif message is None:
        draft.error = "the reply has no message"
    draft.take(message)
    # A service that leaves the reason out has sent a whole reply; null says that it is unfinished.
    draft.finish_reason = _field(choice, "finish_reason", "stop")
    return draft.reply()


def read_stream(
    chunks: Iterable[object], on_reply: Callable[[ChatReply], None] | None = None
) -> ChatReply:
    """A chat completion that came in chunks.

    on_reply: is told the reply so far (its finish is None) whenever text has come.
    Chunks without choices or without a delta are passed over: they carry the usage, or keep the
    connection open. A stream that ends without a finish reason is an error.
    """
    draft = _Draft()
    for chunk in chunks:
        try:
            node = _parsed(chunk)
        except EOFError:
            continue
        except ValueError as error:
            draft.error = draft.error or f"a chunk {error}"
            continue
        draft.usage = _field(node, "usage") or draft.usage
        draft.response_id = draft.response_id or _field(node, "id")
        draft.error = draft.error or _complaint(node)
        choices = _field(node, "choices")
        for choice in choices if isinstance(choices, list | tuple) else ():
            if _field(choice, "index", 0) in (0, None):
                draft.error = draft.error or _complaint(choice)
                draft.take(_field(choice, "delta"))
                draft.finish_reason = _field(choice, "finish_reason") or draft.finish_reason
                if draft.first_token_at is None and (draft.text or draft.reasoning):
                    draft.first_token_at = time.perf_counter()
                if on_reply is not None and _field(choice, "delta") is not None:
                    text, reasoning = "".join(draft.text), "".join(draft.reasoning)
                    on_reply(ChatReply(writable(text), writable(reasoning) or None, finish=None))
    return draft.reply()


@dataclass
class _Draft:
    """What has arrived so far of one reply."""

    usage: object = None
    response_id: object = None
    finish_reason: object = None
    error: str | None = None
    first_token_at: float | None = None
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    unread: bool = False  # something stood where text belongs

    def take(self, message: object) -> None:
        """Add a message, or a delta of one."""
        content = _field(message, "content")
        for part in content if isinstance(content, list | tuple) else (content,):
            self._take_part(part)
        for name in ("reasoning_content", "reasoning"):  # some services send the same text in both
            thought = _field(message, name)
            if isinstance(thought, str) and thought:
                self.reasoning.append(thought)
                break
        refusal = _field(message, "refusal")
        if isinstance(refusal, str) and refusal:
            self.refusal.append(refusal)

    def _take_part(self, part: object) -> None:
        if part is None:
            return
        if isinstance(part, str):
            self.text.append(part)
            return
        kind = _field(part, "type")
        if kind in ("thinking", "reasoning"):
            inner = _field(part, kind) or _field(part, "text")
            pieces = inner if isinstance(inner, list | tuple) else (inner,)
            words = [piece if isinstance(piece, str) else _field(piece, "text") for piece in pieces]
            self.reasoning += [word for word in words if isinstance(word, str)]
        elif isinstance(refusal := _field(part, "refusal"), str):
            self.refusal.append(refusal)
        elif isinstance(text := _field(part, "text"), str):
            self.text.append(text)
        else:
            self.unread = True

    def reply(self) -> ChatReply:
        reason = self.finish_reason if isinstance(self.finish_reason, str) else None
        refusal = writable("".join(self.refusal)) or None
        found = self.text or self.reasoning or self.refusal
        error = self.error
        if error is None and (refusal or (reason or "").lower() in DECLINED):
            error = f"the service declined to answer: {_excerpt(refusal or reason)}"
        elif error is None and reason is None:
            error = "the answer has no finish reason"
        elif error is None and reason not in ("stop", "length"):
            error = f"the answer ended with {_excerpt(reason)!r}, not with 'stop' or 'length'"
        elif error is None and self.unread and not found:
            error = "the message's content is neither text nor a list of text parts"
        prompt, reasoning, answer = _tokens(self.usage)
        return ChatReply(
            text=writable("".join(self.text)),
            reasoning=writable("".join(self.reasoning)) or None,
            finish="error" if error else reason,
            error=error,
            prompt_tokens=prompt,
            reasoning_tokens=reasoning,
            answer_tokens=answer,
            finish_reason=reason and writable(reason),
            refusal=refusal,
            response_id=writable(self.response_id) if isinstance(self.response_id, str) else None,
            first_token_at=self.first_token_at,
        )


def _parsed(body: object) -> object:
    """Parsed JSON of a body, or a client's object.

    Raises EOFError for an empty body or the end of a stream, and ValueError with the end of a
    sentence ("is not JSON: ...") for anything else that has no fields.
    """
    if isinstance(body, bytes | bytearray):
        body = body.decode("utf-8", "replace")
    if isinstance(body, str):
        text = body.removeprefix("\ufeff").strip().removeprefix("data:").strip()
        if text in ("", "[DONE]"):
            raise EOFError
        if text.startswith("<"):
            raise ValueError(f"is a web page, not JSON: {_excerpt(text, 80)!r}")
        try:
            body = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"is not JSON: {_excerpt(text, 80)!r}") from None
    if isinstance(body, list) and body:  # Gemini wraps its errors in a list
        body = body[0]
    if body is None:
        raise EOFError
    if isinstance(body, str | int | float | list):
        raise ValueError(f"is not a chat completion: {_shown(body)}")
    return body


def _field(node: object, name: str, default: object = None) -> object:
    """A field of parsed JSON or of a client's object; `default` where it is absent."""
    if isinstance(node, Mapping):
        return node.get(name, default)
    value = getattr(node, name, default)
    # An object of the openai client has None for what the service left out.
    given = getattr(node, "model_fields_set", None)
    return default if value is None and given is not None and name not in given else value


def _complaint(node: object) -> str | None:
    """What a service says has gone wrong; None if it says nothing."""
    error = _field(node, "error")
    if not error:
        return None
    words = error if isinstance(error, str) else _words(error, "message", "detail", "code", "type")
    return f"the service reports an error: {_excerpt(words or _shown(error))}"


def _words(node: object, *names: str) -> str | None:
    """The first of these fields that holds text."""
    values = (_field(node, name) for name in names)
    return next((_excerpt(value) for value in values if isinstance(value, str) and value), None)


def _tokens(usage: object) -> tuple[int | None, int | None, int | None]:
    """(prompt, reasoning, answer) tokens; None if the service does not tell.

    OpenAI and vLLM count reasoning among the completion tokens; Gemini counts it in the total only.
    """
    prompt = _count(_field(usage, "prompt_tokens"))
    completion = _count(_field(usage, "completion_tokens"))
    total = _count(_field(usage, "total_tokens"))
    reasoning = _count(_field(_field(usage, "completion_tokens_details"), "reasoning_tokens"))
    if completion is None:
        return prompt, reasoning, None
    apart = max(0, total - prompt - completion) if prompt is not None and total is not None else 0
    if apart:
        return prompt, apart, completion
    if reasoning is None:
        return prompt, None, completion
    return prompt, reasoning, completion - reasoning if reasoning <= completion else completion


def _count(value: object) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < MAX_COUNT else None


def _shown(value: object) -> str:
    try:
        return _excerpt(reprlib.repr(value), 80)
    except (ValueError, RecursionError):  # a number with thousands of digits
        return f"a {type(value).__name__}"


def _excerpt(text: str, length: int = MAX_SHOWN) -> str:
    """A text as one short line."""
    line = " ".join(writable(text[: 4 * length]).split())
    return line if len(line) <= length else line[: length - 1] + "…"
