"""Three ways to have a model answer: transformers (any machine), vLLM (GPUs), an OpenAI-compatible
endpoint.

Each engine takes requests (picture, prompt) and yields answers in the order of the requests.
`reasoning=False` switches the reasoning off (Table 10) and binds the output to the form of an
answer; an engine that cannot bind it says so.
"""

import base64
import io
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import regex
import torch
import xxhash
from PIL import Image
from transformers import AutoConfig, ProcessorMixin

from egm_lib.decode_loop import Prefix, SamplingOptions, complete, read_inputs
from egm_lib.models import DTYPES, load_model, load_processor, picture_tokens
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES, Family
from egm_lib.shared_prefix import Reader, read_prefix
from egm_lib.vision_cache import freeze_vision

THINK_END = "</think>"
# Tokens that vLLM sets memory aside for: Table 6, for rollouts; ours, for evaluation
MAX_MODEL_LEN = 32_768


@dataclass(frozen=True)
class Request:
    """One question about one picture; prompt is the user's text, without chat template.

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
    def failed(cls, error: Exception) -> "Answer":
        return cls("", None, None, None, "error", error=f"{type(error).__name__}: {error}")


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


_NUMBER = r"(?:0|[1-9]\d{0,2}|1000)"
# No "<": a label must not write protocol tags
_LABEL = r'(?:[^"\\<\x00-\x1f]|\\["\\/bfnrt]){0,200}'
_BOX = rf"\[{_NUMBER}(?:, ?{_NUMBER}){{3}}\]"
_OBJECT = rf'\{{"bbox_2d": ?{_BOX}(?:, ?"label": ?"{_LABEL}")?\}}'
ANSWER_PATTERNS = {
    "qwen3-vl": rf"(?:```json\n)?\[[ \n\t]{{0,2}}{_OBJECT}[ \n\t]{{0,2}}\](?:\n```)?",
    "internvl-3": rf"(?:<answer>)?(?:<ref>[^<\n]{{0,200}}</ref>)?<box>\[?{_BOX}\]?</box>(?:</answer>)?",
}
# The same for endpoints that take JSON schemas; a family that answers in tags has the pattern alone
ANSWER_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "maxItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "bbox_2d": {
                "type": "array",
                "minItems": 4,
                "maxItems": 4,
                "items": {"type": "integer", "minimum": 0, "maximum": 1000},
            },
            "label": {"type": "string", "maxLength": 200},
        },
        "required": ["bbox_2d", "label"],
        "additionalProperties": False,
    },
}


class ConstraintIgnored(RuntimeError):
    """An engine that was told to bind the output answered outside the form."""


def check_bound(text: str, pattern: str, *, finished: bool) -> None:
    """Raise ConstraintIgnored unless text has the form (an answer that was cut off: the beginning
    of the form).
    """
    if not regex.fullmatch(pattern, text.strip(), partial=not finished):
        raise ConstraintIgnored(
            f"asked for an answer of a fixed form, got {text[:80]!r}: this engine ignores structured output; "
            "update it or leave out the row without reasoning"
        )


class AnswerForm:
    """Keeps to tokens that continue a text of the form; in order of likelihood, so few of the
    vocabulary are tried.
    """

    def __init__(self, pattern: str, decode: Callable[[list[int]], str], eos_ids: frozenset[int]):
        self.pattern, self.decode, self.eos_ids = regex.compile(pattern), decode, eos_ids

    def bind(self, written: list[int], logits_V: torch.Tensor, keep: int) -> torch.Tensor:
        """logits_V with all but the `keep` likeliest admissible tokens at -inf.

        A vocabulary of words (the miniature's) can come to where none is admissible: the answer
        ends there.
        """
        before = self.decode(written)
        allowed: list[int] = []
        for width in (64, logits_V.numel()):
            tokens = torch.topk(logits_V, min(width, logits_V.numel())).indices.tolist()
            allowed = self._admissible(tokens, written, before, keep)
            allowed = [token for token in allowed if logits_V[token] > -torch.inf]
            if len(allowed) >= keep:
                break
        bound_V = torch.full_like(logits_V, -torch.inf)
        if allowed:
            bound_V[allowed] = logits_V[allowed]
        else:
            bound_V[list(self.eos_ids)] = 0.0
        return bound_V

    def _admissible(
        self, tokens: list[int], written: list[int], before: str, keep: int
    ) -> list[int]:
        allowed: list[int] = []
        for token in tokens:
            if token in self.eos_ids:
                good = self.pattern.fullmatch(before)
            else:
                text = self.decode([*written, token])
                good = len(text) > len(before) and self.pattern.fullmatch(text, partial=True)
            if good:
                allowed.append(token)
                if len(allowed) == keep:
                    break
        return allowed


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


class TransformersEngine:
    """Batches of similar length, a KV cache, float32 or bfloat16; on a CPU or one GPU.

    model_path: a checkpoint folder or hub id, or a loaded model with `processor` beside it.
    cache_vision: on a CPU a picture with several expressions goes through a Qwen3-VL's vision tower
    once; not for measuring latency.
    """

    def __init__(
        self,
        model_path,
        family: str,
        dtype: str = "float32",
        batch_size: int = 64,
        *,
        processor=None,
        revision: str | None = None,
        max_pixels: int | None = None,
        device: str | None = None,
        seed: int = 0,
        cache_vision: bool = True,
    ):
        self.family, self.revision, self.batch_size, self.seed = (
            FAMILIES[family],
            revision,
            batch_size,
            seed,
        )
        self.dtype = DTYPES[dtype]
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if isinstance(model_path, torch.nn.Module):
            model = model_path
        else:
            hub = {} if revision is None else {"revision": revision}
            model = load_model(model_path, dtype, **hub)
            processor = processor or load_processor(model_path, family, max_pixels, revision)
        self.model, self.processor = model.to(self.device, self.dtype).eval(), processor
        self.cache_vision = (
            cache_vision and self.device.type == "cpu" and hasattr(self.model.model, "visual")
        )
        self.pictures: dict[bytes, Image.Image] = {}  # of the batch at work, by their digests
        self.reader = None
        if self.cache_vision:
            self.reader = Reader(processor, model, freeze_vision(model), self.pictures.__getitem__)
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = frozenset(
            token for token in (*ends, tokenizer.eos_token_id) if token is not None
        )
        self.suppress_ids = picture_tokens(self.model.config)
        think_end = tokenizer.convert_tokens_to_ids(THINK_END)
        self.think_end_id = None if think_end in (None, tokenizer.unk_token_id) else think_end

    def describe(self) -> dict:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {
            "engine": "transformers",
            "device": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cache_vision": self.cache_vision,
        }

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        order = sorted(
            range(len(requests)), key=lambda i: (len(requests[i].prompt), requests[i].image.size)
        )
        answers: list[Answer | None] = [None] * len(requests)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            given = self._answer_batch([requests[i] for i in batch], sampling, reasoning)
            for i, answer in zip(batch, given, strict=True):
                answers[i] = answer
        yield from answers

    def _answer_batch(
        self, requests: list[Request], sampling: Sampling, reasoning: bool
    ) -> list[Answer]:
        try:
            return self._decode(requests, sampling, reasoning)
        # Memory, or one odd request: find it, keep the others
        except (RuntimeError, ValueError) as error:
            if len(requests) == 1:
                return [Answer.failed(error)]
            half = len(requests) // 2
            return [
                answer
                for part in (requests[:half], requests[half:])
                for answer in self._answer_batch(part, sampling, reasoning)
            ]

    @torch.no_grad()
    def _decode(self, requests: list[Request], sampling: Sampling, reasoning: bool) -> list[Answer]:
        start = time.perf_counter()
        texts, begun = zip(
            *chat_texts(self.processor, self.family, requests, reasoning), strict=True
        )
        prefix = self._read([request.image for request in requests], texts)
        options = SamplingOptions(
            sampling.max_new_tokens,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k or 0,
            self.suppress_ids,
            sampling.repetition_penalty,
        )
        form = None
        if not reasoning:
            form = AnswerForm(ANSWER_PATTERNS[self.family.name], self._text, self.eos_ids)
        rng = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed}:{texts}".encode()))
        done = complete(self.model, prefix, 1, options, self.eos_ids, rng, form)
        latency_ms, first_token_ms = (
            (time.perf_counter() - start) * 1000,
            (done.first_token_at - start) * 1000,
        )
        answers = []
        for ids, prompt_ids, opening in zip(done.tokens, prefix.ids, begun, strict=True):
            ended = ids[-1] in self.eos_ids
            ids = ids[:-1] if ended else ids
            num_reasoning = self._reasoning_tokens(ids) if reasoning else 0
            answers.append(
                Answer(
                    opening + self._text(ids),
                    len(prompt_ids),
                    num_reasoning,
                    len(ids) - num_reasoning,
                    "stop" if ended else "length",
                    latency_ms,
                    first_token_ms,
                )
            )
        return answers

    def _read(self, images: list[Image.Image], texts: Sequence[str]) -> Prefix:
        if self.reader is not None:  # a picture of several questions is processed once
            digests = [
                xxhash.xxh3_128_digest(repr((x.mode, x.size)).encode() + x.tobytes())
                for x in images
            ]
            self.pictures.clear()
            self.pictures.update(zip(digests, images, strict=True))
            features = self.reader.features(digests)
            prompts = [
                self.reader.prompt(digest, text)
                for digest, text in zip(digests, texts, strict=True)
            ]
            return read_prefix(self.model, prompts, features)
        inputs = self.processor(
            text=list(texts),
            images=[[image] for image in images],
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.dtype)
        return read_inputs(self.model, inputs)

    def _text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _reasoning_tokens(self, ids: list[int]) -> int:
        """Tokens up to and with </think>; 0 where the answer does not close a reasoning."""
        if self.think_end_id is not None:
            return len(ids) - ids[::-1].index(self.think_end_id) if self.think_end_id in ids else 0
        text = self._text(ids)
        if THINK_END not in text:
            return 0
        return len(
            self.processor.tokenizer(text[: text.rindex(THINK_END) + len(THINK_END)])["input_ids"]
        )


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
            raise ValueError(
                "a chat endpoint cannot go on from a begun answer; use the engine transformers or vllm"
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
            {"type": "image_url", "image_url": {"url": data_url(request.image)}},
            {"type": "text", "text": request.prompt},
        ]
        try:
            reply = (Reply.streamed if self.stream else Reply.whole)(
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
class Reply:
    """What a chat endpoint has said; thought: what its reasoning parser has set apart;
    first_token_at: perf_counter.
    """

    text: str = ""
    thought: str = ""
    finish_reason: str | None = None
    usage: object = None
    first_token_at: float | None = None

    @classmethod
    def whole(cls, completion) -> "Reply":
        choice = completion.choices[0]
        return cls(
            choice.message.content or "",
            _thought(choice.message),
            choice.finish_reason,
            completion.usage,
        )

    @classmethod
    def streamed(cls, chunks) -> "Reply":
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


def data_url(image: Image.Image) -> str:
    """The picture as a PNG data URL: lossless, so that every engine sees the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# No video: vLLM 0.30 tries one as it starts, in a way that transformers 5.23 refuses.
VLLM_LIMITS = {"image": 1, "video": 0}  # a prompt


def vllm_pictures(processor: ProcessorMixin) -> dict:
    """vLLM's options on pictures: one a prompt, in the sizes of `processor`, whatever the
    checkpoint's own says.
    """
    size = processor.image_processor.size
    # InternVL-3: none
    limits = {name: size[name] for name in ("shortest_edge", "longest_edge") if size.get(name)}
    return {
        "limit_mm_per_prompt": VLLM_LIMITS,
        "mm_processor_kwargs": {"size": limits} if limits else None,
    }


class VLLMEngine:
    """vLLM in this process. On a CPU it answers as TransformersEngine does (`make test-vllm`); no
    GPU was at hand.

    tensor_parallel: GPUs one copy of the model is cut over. For data parallelism start one process
    a GPU on a share of the splits, or `vllm serve --data-parallel-size` behind OpenAIEngine.
    """

    def __init__(
        self,
        model_path: str,
        family: str,
        dtype: str = "bfloat16",
        batch_size: int = 256,
        *,
        processor=None,
        revision: str | None = None,
        max_pixels: int | None = None,
        tensor_parallel: int = 1,
        seed: int = 0,
    ):
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(
                "the engine 'vllm' needs vLLM: pip install -e .[gpu] on a machine with GPUs"
            ) from error
        self.family, self.revision, self.batch_size, self.dtype, self.seed = (
            FAMILIES[family],
            revision,
            batch_size,
            dtype,
            seed,
        )
        self.processor = processor or load_processor(model_path, family, max_pixels, revision)
        text = AutoConfig.from_pretrained(model_path, revision=revision).get_text_config()
        self.llm = LLM(
            model=model_path,
            revision=revision,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            seed=seed,
            max_model_len=min(MAX_MODEL_LEN, text.max_position_embeddings),
            **vllm_pictures(self.processor),
        )

    def describe(self) -> dict:
        import vllm

        name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
        return {"engine": "vllm", "device": name, "dtype": self.dtype, "vllm": vllm.__version__}

    def answer(
        self, requests: Sequence[Request], sampling: Sampling, *, reasoning: bool = True
    ) -> Iterator[Answer]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        if not requests:
            return
        texts, begun = zip(
            *chat_texts(self.processor, self.family, requests, reasoning), strict=True
        )
        pattern = ANSWER_PATTERNS[self.family.name]
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            seed=self.seed,
            max_tokens=sampling.max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            skip_special_tokens=False,
            structured_outputs=None if reasoning else StructuredOutputsParams(regex=pattern),
        )
        prompts = [  # one <|image_pad|> or <IMG_CONTEXT> a picture: vLLM expands it itself
            {"prompt": text, "multi_modal_data": {"image": request.image}}
            for text, request in zip(texts, requests, strict=True)
        ]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        latency_ms = (time.perf_counter() - start) * 1000
        tokenizer = self.processor.tokenizer
        think_end_id = tokenizer.convert_tokens_to_ids(THINK_END)
        for output, opening in zip(outputs, begun, strict=True):
            completion = output.outputs[0]
            ids = list(completion.token_ids)
            if ids[-1:] == [tokenizer.eos_token_id]:  # not counted, as in TransformersEngine
                ids.pop()
            text = completion.text.removesuffix(tokenizer.eos_token)
            finish = "length" if completion.finish_reason == "length" else "stop"
            if not reasoning:
                check_bound(text, pattern, finished=finish == "stop")
            num_reasoning = len(ids) - ids[::-1].index(think_end_id) if think_end_id in ids else 0
            num_answer, num_prompt = len(ids) - num_reasoning, len(output.prompt_token_ids)
            yield Answer(opening + text, num_prompt, num_reasoning, num_answer, finish, latency_ms)
