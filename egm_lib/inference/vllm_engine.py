"""The engine on vLLM in this process."""

import gc
import time
from collections.abc import Iterator, Sequence

import torch
from transformers import PretrainedConfig, ProcessorMixin

from egm_lib.inference.answer_form import ANSWER_PATTERNS, check_bound
from egm_lib.inference.engine import Answer, Request, chat_texts, count_reasoning_tokens
from egm_lib.inference.loading import load_config, load_processor
from egm_lib.inference.model_folder import check_weights, check_whole, find_checkpoint
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

# Tokens that vLLM sets memory aside for: Table 6, for rollouts; ours, for evaluation
MAX_MODEL_LEN = 32_768

# No video: vLLM 0.30 tries one as it starts, in a way that transformers 5.23 refuses.
VLLM_LIMITS = {"image": 1, "video": 0}  # a prompt
# With both off, vLLM tells images apart by their request, so that its encoder's outputs are not
# shared either
WITHOUT_CACHES = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}


def vllm_images(processor: ProcessorMixin) -> dict:
    """vLLM's options on images: one a prompt, in the sizes of `processor`, whatever the
    checkpoint's own says.
    """
    size = processor.image_processor.size
    # InternVL-3: none
    limits = {name: size[name] for name in ("shortest_edge", "longest_edge") if size.get(name)}
    return {
        "limit_mm_per_prompt": VLLM_LIMITS,
        "mm_processor_kwargs": {"size": limits} if limits else None,
    }


def context_length(config: PretrainedConfig, max_model_len: int | None) -> int:
    """Tokens of prompt and answer that vLLM has room for; max_model_len None: MAX_MODEL_LEN.

    config: the model's, which may allow fewer.
    """
    limit = config.get_text_config().max_position_embeddings
    return min(max_model_len or MAX_MODEL_LEN, limit)


class VLLMEngine:
    """vLLM in this process. On a CPU it answers as TransformersEngine does (`make test-vllm`); no
    GPU was at hand.

    tensor_parallel: GPUs that one copy of the model is cut over. More GPUs are used by more
    processes, each on a shard of the samples (egm_lib.inference.shards).
    gpu_memory_utilization: share of each GPU that vLLM takes.
    max_model_len: tokens of prompt and answer; null: MAX_MODEL_LEN, or what the model can.
    for_latency: neither prompts nor images are remembered between requests.
    """

    # It batches a window itself, and waits at its end for the slowest answer only
    window_batches = 16

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
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        for_latency: bool = False,
        seed: int = 0,
    ):
        found = find_checkpoint(model_path, revision, family)
        check_whole(found, "vLLM")
        check_weights(found)
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
        config = load_config(model_path, revision)
        self.llm = LLM(
            model=model_path,
            revision=revision,
            trust_remote_code=False,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            gpu_memory_utilization=gpu_memory_utilization,
            seed=seed,
            max_model_len=context_length(config, max_model_len),
            **vllm_images(self.processor),
            **(WITHOUT_CACHES if for_latency else {}),
        )

    def close(self) -> None:
        """Ends vLLM's engine, which holds the GPU's memory in a process of its own."""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

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
        prompts = [  # one <|image_pad|> or <IMG_CONTEXT> an image: vLLM expands it itself
            {"prompt": text, "multi_modal_data": {"image": request.image}}
            for text, request in zip(texts, requests, strict=True)
        ]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        latency_ms = (time.perf_counter() - start) * 1000
        tokenizer = self.processor.tokenizer
        for output, opening in zip(outputs, begun, strict=True):
            completion = output.outputs[0]
            finish = completion.finish_reason
            if finish not in ("stop", "length"):  # such as "abort"
                yield Answer.failed(f"vLLM ended the answer with {finish!r}")
                continue
            ids = list(completion.token_ids)
            if ids[-1:] == [tokenizer.eos_token_id]:  # not counted, as in TransformersEngine
                ids.pop()
            text = completion.text.removesuffix(tokenizer.eos_token)
            if not reasoning:
                check_bound(text, pattern, finished=finish == "stop")
            num_reasoning = count_reasoning_tokens(tokenizer, ids) if reasoning else 0
            num_answer, num_prompt = len(ids) - num_reasoning, len(output.prompt_token_ids)
            yield Answer(opening + text, num_prompt, num_reasoning, num_answer, finish, latency_ms)
