"""The engine on an OpenAI-compatible endpoint, such as `vllm serve`."""

import base64
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from egm_lib.errors import InputError
from egm_lib.inference.answer_form import ANSWER_PATTERNS, ANSWER_SCHEMA, check_bound
from egm_lib.inference.engine import THINK_END, Answer, Request
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES


class OpenAIEngine:
    """vLLM serve, GPT, Gemini, ...: `batch_size` requests at the same time.

    extra_sampling: send top_k and repetition_penalty too (vLLM takes them; OpenAI's own service
    refuses them).
    stream: take answers token by token, for the time to the first one; costs the client some work
    for every token.
    opens_reasoning: the server's chat template begins the answer with the reasoning opener
    (Qwen3-VL Thinking).
    key: of the service; a local one needs none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        family: str,
        batch_size: int = 64,
        *,
        extra_sampling: bool = True,
        opens_reasoning: bool = False,
        revision: str | None = None,
        timeout_s: float = 600.0,
        max_retries: int = 5,
        seed: int = 0,
        stream: bool = False,
        key: str = "none",
        client=None,
    ):
        from openai import OpenAI

        self.family, self.model, self.batch_size = FAMILIES[family], model, batch_size
        self.extra_sampling, self.revision, self.base_url = extra_sampling, revision, base_url
        self.seed, self.stream = seed, stream
        self.opener = self.family.reasoning_opener if opens_reasoning else ""
        self.client = client or OpenAI(
            base_url=base_url, timeout=timeout_s, max_retries=max_retries, api_key=key
        )

    def describe(self) -> dict:
        import openai

        return {
            "engine": "openai",
            "device": self.base_url,
            "served": self.model,
            "openai": openai.__version__,
        }

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        with ThreadPoolExecutor(max_workers=max(1, self.batch_size)) as pool:
            yield from pool.map(lambda request: self._ask(request, sampling, reasoning), requests)

    def _ask(self, request: Request, sampling: Sampling, reasoning: bool) -> Answer:
        from httpx import HTTPError
        from openai import OpenAIError

        if request.begun:
            raise InputError(
                "a chat endpoint cannot go on from a begun answer; use the engine transformers or "
                "vllm"
            )
        start = time.perf_counter()
        extra = {}
        if self.extra_sampling:
            extra = {
                "repetition_penalty": sampling.repetition_penalty,
                "top_k": sampling.top_k or -1,
            }
        pattern = ANSWER_PATTERNS[self.family.name]
        options = {"stream": True, "stream_options": {"include_usage": True}} if self.stream else {}
        if not reasoning:
            if self.family.name == "qwen3-vl":
                schema = {"name": "answer", "strict": True, "schema": ANSWER_SCHEMA}
                options["response_format"] = {"type": "json_schema", "json_schema": schema}
            else:
                # VLLM; `guided_regex` would be silently ignored
                extra["structured_outputs"] = {"regex": pattern}
        content = [
            {"type": "image_url", "image_url": {"url": png_data_url(request.image)}},
            {"type": "text", "text": request.prompt},
        ]
        try:
            reply = (ChatReply.streamed if self.stream else ChatReply.whole)(
                self.client.chat.completions.create(
                    model=self.model,
                    messages=[{"role": "user", "content": content}],
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_new_tokens,
                    seed=self.seed,
                    extra_body=extra or None,
                    **options,
                )
            )
        # The client wraps its transport's errors, but not those of a stream
        except (OpenAIError, HTTPError) as error:
            return Answer.failed(error)
        latency_ms = (time.perf_counter() - start) * 1000
        first_token_ms = (
            None if reply.first_token_at is None else (reply.first_token_at - start) * 1000
        )
        finish = "length" if reply.finish_reason == "length" else "stop"
        if not reasoning:
            check_bound(reply.text, pattern, finished=finish == "stop")
            raw_answer = self.family.no_reasoning_prefix + reply.text
        elif reply.thought:  # a server with a reasoning parser hands the two parts over separately
            raw_answer = f"<think>\n{reply.thought}\n{THINK_END}\n\n{reply.text}"
        else:
            raw_answer = self.opener + reply.text
        usage = reply.usage
        details = getattr(usage, "completion_tokens_details", None)
        num_reasoning = getattr(details, "reasoning_tokens", None) or (0 if not reasoning else None)
        num_answer = None if usage is None else usage.completion_tokens - (num_reasoning or 0)
        return Answer(
            raw_answer,
            usage and usage.prompt_tokens,
            num_reasoning,
            num_answer,
            finish,
            latency_ms,
            first_token_ms,
        )


@dataclass
class ChatReply:
    """What a chat endpoint has said; thought: what its reasoning parser has set apart;
    first_token_at: perf_counter.
    """

    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    usage: object = None
    first_token_at: float | None = None

    @classmethod
    def whole(cls, completion) -> "ChatReply":
        choice = completion.choices[0]
        return cls(
            choice.message.content or "",
            _thought(choice.message),
            choice.finish_reason,
            completion.usage,
        )

    @classmethod
    def streamed(cls, chunks) -> "ChatReply":
        reply = cls()
        for chunk in chunks:
            reply.usage = chunk.usage or reply.usage
            for choice in chunk.choices:  # the last chunk has none
                text, thought = choice.delta.content or "", _thought(choice.delta)
                if reply.first_token_at is None and (text or thought):
                    reply.first_token_at = time.perf_counter()
                reply.text, reply.thought = reply.text + text, reply.thought + thought
                reply.finish_reason = choice.finish_reason or reply.finish_reason
        return reply


def _thought(message) -> str:
    return getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or ""


def png_data_url(image: Image.Image) -> str:
    """The image as a PNG data URL: lossless, so that every engine sees the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
