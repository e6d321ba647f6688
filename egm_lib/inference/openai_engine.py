"""The engine on an OpenAI-compatible endpoint, such as `vllm serve`."""

import base64
import io
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import httpx2
import openai
from PIL import Image

from egm_lib.curation.options import AcceptedOptions
from egm_lib.curation.replies import ChatReply, read_reply, read_stream
from egm_lib.curation.services import words_of
from egm_lib.errors import InputError
from egm_lib.inference.answer_form import (
    ANSWER_PATTERNS,
    ANSWER_SCHEMA,
    ConstraintIgnored,
    check_bound,
)
from egm_lib.inference.engine import THINK_END, Answer, Request
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

# Answers may be this many batches in front of a slow one, which is given out before them: the
# longest answer (4,096 tokens) takes as long as some ten of the usual 300 to 400
AHEAD_BATCHES = 8

# Parameters of the client's own; others are sent in its extra_body
_CLIENT_OPTIONS = ("temperature", "top_p", "max_tokens", "max_completion_tokens", "seed")


class OpenAIEngine:
    """vLLM serve, GPT, Gemini, ...: `batch_size` requests at the same time.

    A reply that is no answer marks its own row as an error. An option that the service calls
    unknown or unsupported is left out from then on, with one message.

    extra_sampling: send top_k and repetition_penalty too. vLLM takes them; OpenAI's own service
    refuses them.
    opens_reasoning: the server's chat template writes the reasoning opener, and no reasoning parser
    gives it back (Qwen3-VL Thinking).
    token_limit: the service's name for the limit on tokens, "max_tokens" or
    "max_completion_tokens".
    extra_body: more fields of every request; null leaves out one that is sent otherwise.
    max_pixels: larger images are shrunk to at most so many before they are sent.
    stream: take answers token by token, to measure the time to the first one. It costs the client
    some work for every token.
    key: of the service; a local one needs none.
    """

    window_batches = None

    def __init__(
        self,
        base_url: str,
        model: str,
        family: str,
        batch_size: int = 64,
        *,
        extra_sampling: bool = True,
        opens_reasoning: bool = False,
        token_limit: str | None = None,
        extra_body: Mapping | None = None,
        max_pixels: int | None = None,
        revision: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        seed: int = 0,
        stream: bool = False,
        key: str = "none",
        client=None,
    ):
        self.family, self.model, self.batch_size = FAMILIES[family], model, batch_size
        self.revision, self.base_url, self.max_pixels = revision, base_url, max_pixels
        self.seed, self.stream = seed, stream
        self.opener = self.family.reasoning_opener if opens_reasoning else ""
        self.extra_body = dict(extra_body or {})
        limit = token_limit or "max_tokens"
        names = ["temperature", "top_p", limit, "seed", *self.extra_body]
        if extra_sampling:
            names += ["repetition_penalty", "top_k"]
        names = [name for name in names if self.extra_body.get(name, ...) is not None]
        # Values change with each round of a vote: what is learned is which option is sent as what
        self.accepted = AcceptedOptions({name: name for name in names})
        self._learning = threading.Lock()
        self.client = client or openai.OpenAI(
            base_url=base_url, timeout=timeout_s, max_retries=max_retries, api_key=key
        )

    def describe(self) -> dict:
        return {
            "engine": "openai",
            "device": self.base_url,
            "served": self.model,
            "openai": openai.__version__,
        }

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    def answer(
        self, requests: Iterable[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        """Takes the next request as soon as an earlier one is answered; the answers in order."""
        ahead = AHEAD_BATCHES * self.batch_size
        asked: deque[Future[Answer]] = deque()
        with ThreadPoolExecutor(max_workers=max(1, self.batch_size)) as pool:
            try:
                for request in requests:
                    asked.append(pool.submit(self._ask, request, sampling, reasoning))
                    if len(asked) > ahead:
                        yield asked.popleft().result()
                while asked:
                    yield asked.popleft().result()
            finally:
                for future in asked:
                    future.cancel()

    def _ask(self, request: Request, sampling: Sampling, reasoning: bool) -> Answer:
        if request.begun:
            raise InputError(
                "a chat endpoint cannot continue a given answer; use the engine transformers or "
                "vllm"
            )
        start = time.perf_counter()
        image = shrink(request.image, self.max_pixels)
        content = [
            {"type": "image_url", "image_url": {"url": png_data_url(image)}},
            {"type": "text", "text": request.prompt},
        ]
        try:
            reply = self._reply(request, content, sampling, reasoning)
        # Not every version of the client wraps its transport's errors within a stream. ValueError
        # and RecursionError: it was sent something that calls itself JSON and is not.
        except (openai.OpenAIError, httpx2.HTTPError, ValueError, RecursionError) as error:
            return Answer.failed(words_of(error))
        if reply.error is not None:
            return Answer.failed(reply.error)
        latency_ms = (time.perf_counter() - start) * 1000
        first_token_ms = (
            None if reply.first_token_at is None else (reply.first_token_at - start) * 1000
        )
        if not reasoning and reply.text:
            try:
                pattern = ANSWER_PATTERNS[self.family.name]
                check_bound(reply.text, pattern, finished=reply.finish == "stop")
            except ConstraintIgnored as error:
                if reply.finish == "stop":
                    raise
                return Answer.failed(error)
        return Answer(
            self._raw_answer(reply, reasoning),
            reply.prompt_tokens,
            reply.reasoning_tokens if reasoning else reply.reasoning_tokens or 0,
            reply.answer_tokens,
            reply.finish,
            latency_ms,
            first_token_ms,
        )

    def _reply(
        self, request: Request, content: list[dict], sampling: Sampling, reasoning: bool
    ) -> ChatReply:
        """What the service answers, asked with the options that it accepts.

        Raises openai.OpenAIError, httpx2.HTTPError, and ValueError for what is not JSON.
        """
        values = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "max_completion_tokens": sampling.max_new_tokens,
            "seed": self.seed,
            "repetition_penalty": sampling.repetition_penalty,
            "top_k": sampling.top_k or -1,
            **self.extra_body,
        }
        stream = self.stream or request.on_text is not None
        fixed = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        bound = {}
        if not reasoning:
            if self.family.name == "qwen3-vl":
                schema = {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA}
                fixed["response_format"] = {"type": "json_schema", "json_schema": schema}
            else:  # vLLM's; `guided_regex` would be silently ignored
                bound["structured_outputs"] = {"regex": ANSWER_PATTERNS[self.family.name]}
        for _ in range(len(values)):
            names = self.accepted.sent
            sent = {name: values[source] for name, source in names.items()}
            options = {name: sent.pop(name) for name in _CLIENT_OPTIONS if name in sent}
            try:
                completion = self.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": content}],
                    extra_body={**sent, **bound} or None,
                    **options,
                    **fixed,
                )
                if not stream:
                    return read_reply(completion)
                return read_stream(completion, self._teller(request, reasoning))
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._learn(f"{error.param or ''} {words_of(error)}", names):
                    raise
        raise InputError(f"{self.base_url} refuses one option after another: {self.accepted.notes}")

    def _teller(self, request: Request, reasoning: bool) -> Callable[[ChatReply], None] | None:
        """What tells the request's on_text its text so far; None where it has none."""
        on_text = request.on_text
        if on_text is None:
            return None
        return lambda reply: on_text(self._raw_answer(reply, reasoning))

    def _learn(self, message: str, names: Mapping) -> bool:
        with self._learning:
            known = len(self.accepted.notes)
            learned = self.accepted.learn(message, names)
            for note in self.accepted.notes[known:]:
                print(f"{self.model}: {note}", flush=True)
            return learned

    def _raw_answer(self, reply: ChatReply, reasoning: bool) -> str:
        if not reasoning:
            return self.family.no_reasoning_prefix + reply.text
        if reply.reasoning is None:
            return self.opener + reply.text
        # A server with a reasoning parser hands the two parts over separately
        # Cut within its reasoning, or still writing it
        if not reply.text and reply.finish in ("length", None):
            return f"<think>\n{reply.reasoning}"
        return f"<think>\n{reply.reasoning}\n{THINK_END}\n\n{reply.text}"


def shrink(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image with at most max_pixels pixels and its aspect ratio; a smaller one stays as it is.

    The families' boxes are relative to the image, so they do not change.
    """
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    scale = math.sqrt(max_pixels / (image.width * image.height))
    width, height = (max(1, int(side * scale)) for side in image.size)
    # An image of one row or column: the other side alone must fit
    return image.resize((min(width, max_pixels), min(height, max_pixels)), Image.Resampling.BICUBIC)


def png_data_url(image: Image.Image) -> str:
    """The image as a PNG data URL: lossless, so that every engine sees the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
