"""The engine on transformers: batched generation on one CPU or GPU."""

import gc
import time
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from egm_lib.data import image_key
from egm_lib.inference.answer_form import ANSWER_PATTERNS, AnswerForm, Pieces
from egm_lib.inference.decode_loop import Prefix, SamplingOptions, complete, read_inputs
from egm_lib.inference.engine import (
    WINDOW_BATCHES,
    Answer,
    Request,
    chat_texts,
    count_reasoning_tokens,
)
from egm_lib.inference.loading import DTYPES, image_token_ids, load_model, load_processor
from egm_lib.inference.shared_prefix import Reader, read_prefix
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES


class TransformersEngine:
    """Batches of similar length, a KV cache, float32 or bfloat16; on a CPU or one GPU.

    model_path: a checkpoint folder or hub id, or a loaded model with `processor` beside it.
    cache_vision: on a CPU an image with several expressions goes through a Qwen3-VL's vision tower
    once; not for measuring latency.
    """

    window_batches = WINDOW_BATCHES

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
            model = load_model(model_path, dtype, family=family, revision=revision)
            processor = processor or load_processor(model_path, family, max_pixels, revision)
        self.model, self.processor = model.to(self.device, self.dtype).eval(), processor
        self.cache_vision = (
            cache_vision and self.device.type == "cpu" and hasattr(self.model.model, "visual")
        )
        self.images: dict[bytes, Image.Image] = {}  # of the batch at work, by their keys
        self.reader = None
        self.pieces: Pieces | None = None  # read when an output is bound
        if self.cache_vision:
            self.reader = Reader(processor, model, freeze_vision(model), self.images.__getitem__)
        tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.eos_ids = frozenset(
            token for token in (*ends, tokenizer.eos_token_id) if token is not None
        )
        self.suppress_ids = image_token_ids(self.model.config)

    def close(self) -> None:
        """Lets go of the model and of the GPU's memory."""
        self.model = self.reader = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

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
            if self.pieces is None:
                self.pieces = Pieces.of(self.processor.tokenizer)
            pattern = ANSWER_PATTERNS[self.family.name]
            form = AnswerForm(pattern, self._text, self.eos_ids, self.pieces)
        rng = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.seed}:{texts}".encode()))
        tell = self._teller(requests, begun)
        done = complete(self.model, prefix, 1, options, self.eos_ids, rng, form, tell)
        latency_ms, first_token_ms = (
            (time.perf_counter() - start) * 1000,
            (done.first_token_at - start) * 1000,
        )
        answers = []
        for ids, prompt_ids, opening in zip(done.tokens, prefix.ids, begun, strict=True):
            ended = ids[-1] in self.eos_ids
            ids = ids[:-1] if ended else ids
            num_reasoning = (
                count_reasoning_tokens(self.processor.tokenizer, ids) if reasoning else 0
            )
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

    def _teller(
        self, requests: list[Request], begun: Sequence[str]
    ) -> Callable[[int, int], None] | None:
        """What tells each request's on_text its text so far; None where no request has one."""
        if all(request.on_text is None for request in requests):
            return None
        written: list[list[int]] = [[] for _ in requests]

        def tell(row: int, token: int) -> None:
            if (on_text := requests[row].on_text) is not None and token not in self.eos_ids:
                written[row].append(token)
                on_text(begun[row] + self._text(written[row]))

        return tell

    def _read(self, images: list[Image.Image], texts: Sequence[str]) -> Prefix:
        if self.reader is not None:  # an image of several questions is processed once
            keys = [image_key(image) for image in images]
            self.images.clear()
            self.images.update(zip(keys, images, strict=True))
            features = self.reader.features(keys)
            prompts = [self.reader.prompt(key, text) for key, text in zip(keys, texts, strict=True)]
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
