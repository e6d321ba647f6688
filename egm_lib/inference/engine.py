"""Three ways to have a model answer: transformers (any machine), vLLM (GPUs), an OpenAI-compatible
endpoint.

Each engine takes requests (image, prompt) and yields answers in the order of the requests.
`reasoning=False` switches the reasoning off (Table 10) and binds the output to the form of an
answer; an engine that cannot bind it says so.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from egm_lib.profile import Sampling
from egm_lib.prompts import Family

THINK_END = "</think>"
CONCURRENCIES = (1, 64)  # of the latency protocol; the authors' script measures at 64


@dataclass(frozen=True)
class Request:
    """One question about one image; prompt is the user's text, without chat template.

    begun: what the assistant has written already, after the template's own opener; the answer goes
    on from there.
    """

    image: Image.Image
    prompt: str
    begun: str = ""


@dataclass(frozen=True)
class Answer:
    """The assistant's text: what the chat template had begun (such as "<think>"), then what the
    model wrote.

    finish_reason: "stop" | "length" | "error". Tokens are None where an endpoint does not tell.
    latency_ms, first_token_ms: from handing the request over to the last (first) token, in the
    company that it had; a batch ends as one.
    """

    raw_answer: str
    prompt_tokens: int | None
    reasoning_tokens: int | None
    answer_tokens: int | None
    finish_reason: str
    latency_ms: float | None = None
    first_token_ms: float | None = None
    error: str | None = None

    @classmethod
    def failed(cls, error: Exception | str) -> "Answer":
        """No answer, and why: an exception, or a sentence."""
        why = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        return cls("", None, None, None, "error", error=why)


class Engine(Protocol):
    """batch_size: requests that are answered together; `answer` may be given any number. seed: of
    sampled answers.
    """

    family: Family
    revision: str | None
    batch_size: int
    seed: int

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]: ...

    def describe(self) -> dict: ...

    def close(self) -> None:
        """Gives memory and connections back; the engine cannot answer any more."""


def chat_texts(
    processor, family: Family, requests: Sequence[Request], reasoning: bool
) -> list[tuple[str, str]]:
    """(chat text, what of the assistant's turn it has begun: a parser must see that too) of each
    request.
    """
    pairs = []
    for request in requests:
        messages = family.messages(request.prompt)
        chat = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        opener = family.reasoning_opener if chat.endswith(family.reasoning_opener) else ""
        begun = request.begun + ("" if reasoning else family.no_reasoning_prefix)
        pairs.append((chat + begun, opener + begun))
    return pairs


def count_reasoning_tokens(tokenizer, ids: Sequence[int]) -> int:
    """Tokens up to and with the last </think>; 0 where the answer does not close a reasoning.

    The tag is one token for Qwen3-VL and several for InternVL-3, whose last one may hold more.
    """

    def num_closed(length: int) -> int:
        text = tokenizer.decode(
            ids[:length], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text.count(THINK_END)

    closed = num_closed(len(ids))
    if not closed:
        return 0
    return bisect.bisect_left(range(len(ids) + 1), closed, key=num_closed)
