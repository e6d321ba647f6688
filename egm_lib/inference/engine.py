"""The interface of the three engines: transformers, vLLM, and an OpenAI-compatible endpoint.

Each engine takes requests (image and prompt) and yields answers in the order of the requests.
`reasoning=False` switches the reasoning off (Table 10) and binds the output to the form of an
answer. An engine that cannot do this raises an error.
"""

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from egm_lib.data import open_image, resolve_image
from egm_lib.profile import Sampling
from egm_lib.prompts import Family

THINK_END = "</think>"
WINDOW_BATCHES = 4  # of a window, unless an engine states another number
CONCURRENCIES = (1, 64)  # of the latency protocol; the authors' script measures at 64


@dataclass(frozen=True)
class Request:
    """One question about one image; prompt is the user's text, without chat template.

    begun: what the assistant has already written, after the opener that the template writes. The
    answer continues from there.
    on_text: called with the assistant's text so far, token by token (transformers) or chunk by
    chunk (an endpoint). The vLLM engine answers all at once and never calls it. An exception that
    it raises ends the answer.
    """

    image: Image.Image
    prompt: str
    begun: str = ""
    on_text: Callable[[str], None] | None = None


@dataclass(frozen=True)
class Answer:
    """The assistant's text: what the chat template began (such as "<think>"), and the model's part.

    finish_reason: "stop" | "length" | "error". Token counts are None if an endpoint does not state
    them.
    latency_ms, first_token_ms: time from sending the request to its last (first) token, including
    the other requests of its batch. All requests of a batch end at the same time.
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


def request_of(sample: Mapping, family: Family, root: Path, prompt: str) -> Request | Answer:
    """What an engine is asked about a sample; a failed Answer where the image cannot be read.

    root: the data root that images are relative to. prompt: the name of one of the family's.
    """
    try:
        image = open_image(resolve_image(sample, root))
    except (OSError, ValueError) as error:
        return Answer.failed(error)
    return Request(image, family.prompt(sample["expression"], sample["task"], name=prompt))


class Engine(Protocol):
    """An engine answers requests.

    batch_size: requests that are answered together; `answer` takes any number of them.
    window_batches: so many batches are handed over together, and sorted by length within. None: an
    endpoint, which answers each request on its own and takes the next one as it is free.
    seed: that of sampled answers.
    """

    family: Family
    revision: str | None
    batch_size: int
    window_batches: int | None
    seed: int

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]: ...

    def describe(self) -> dict: ...

    def close(self) -> None:
        """Frees memory and connections. The engine cannot answer after this."""


def begun_reasoning(family: Family, reasoning: str) -> str:
    """`Request.begun` for an answer that continues this reasoning, which is not closed."""
    return ("" if family.reasoning_opener else "<think>") + reasoning


def chat_texts(
    processor, family: Family, requests: Sequence[Request], reasoning: bool
) -> list[tuple[str, str]]:
    """(chat text, the part of it that begins the assistant's turn) of each request.

    A parser must see that part too.
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
    """Tokens up to the last </think>, which is included; 0 if the answer closes no reasoning.

    The tag is one token of Qwen3-VL. It is several of InternVL-3, the last of which may contain
    other text, too.
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
