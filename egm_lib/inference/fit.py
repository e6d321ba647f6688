"""Whether a model fits the GPUs that a profile gives it: asked before its weights are read."""

import warnings

import torch
from transformers import AutoModelForImageTextToText, PretrainedConfig

from egm_lib.errors import EgmError
from egm_lib.inference.loading import DTYPES, load_config
from egm_lib.inference.vllm_engine import context_length
from egm_lib.model_shapes import shape_from_config
from egm_lib.profile import Generation, Model

GIB = 2**30
# Of each GPU, for CUDA itself and the activations of vLLM's first pass. Ours, meant as the least of
# it, and measured on no GPU
BESIDE_GIB = 1.0


class FitError(EgmError, ValueError):
    """A model that cannot run on the GPUs that the profile gives it, and what to change."""


def check_fit(model: Model, generation: Generation) -> None:
    """Raises FitError where a model cannot run on this machine's GPUs; without GPUs never.

    generation: how this model is asked (`egm_lib.profile.generation_of`).
    """
    if not torch.cuda.is_available():
        return
    try:
        config = load_config(model.location, model.revision)
    except (OSError, ValueError):
        return  # the engine says it
    memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    vllm = generation.engine == "vllm"
    parallel = generation.tensor_parallel if vllm else 1
    if parallel > torch.cuda.device_count():
        raise FitError(
            f"{model.path} needs tensor_parallel = {parallel} GPUs, but only "
            f"{torch.cuda.device_count()} are visible here."
        )
    check_heads(model.path, config, parallel)
    check_memory(
        model.path,
        config,
        model.dtype,
        parallel=parallel,
        memory_gib=memory_gib,
        share=generation.gpu_memory_utilization if vllm else 1.0,
        context=context_length(config, generation.max_model_len) if vllm else 0,
    )


def check_heads(name: str, config: PretrainedConfig, parallel: int) -> None:
    """Raises FitError where vLLM cannot cut the attention heads over `parallel` GPUs.

    Each GPU takes equally many heads. Key-value heads are divided too, or each is kept by equally
    many GPUs (vLLM's QKVParallelLinear).
    """
    text = config.get_text_config()
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    if heads % parallel or (kv_heads % parallel and parallel % kv_heads):
        fitting = [
            number
            for number in range(1, heads + 1)
            if heads % number == 0 and (kv_heads % number == 0 or number % kv_heads == 0)
        ]
        raise FitError(
            f"{name} has {heads} attention heads and {kv_heads} key-value heads, which do not "
            f"divide among tensor_parallel = {parallel} GPUs. Possible are "
            f"{', '.join(map(str, fitting))}."
        )


def check_memory(
    name: str,
    config: PretrainedConfig,
    dtype: str,
    *,
    parallel: int,
    memory_gib: float,
    share: float = 1.0,
    context: int = 0,
) -> None:
    """Raises FitError where a model needs more than what the GPUs hold.

    That is its weights and, with vLLM, the keys and values of one whole context.
    memory_gib: of one GPU. share: what of it may be used. context: its tokens; 0: not counted.
    """
    if getattr(config, "quantization_config", None):
        return  # smaller than dtype says
    value = DTYPES[dtype].itemsize
    needed_gib = num_parameters(config) * value / GIB
    parts, smaller = f"{needed_gib:.0f} GiB of weights in {dtype}", ""
    usable_gib = memory_gib * share * parallel
    if context:
        text = shape_from_config(config).text
        copies = max(1, parallel // text.kv_heads)  # GPUs beyond the heads keep the same ones
        cache_gib = context * text.kv_bytes(value) * copies / GIB
        needed_gib += cache_gib + BESIDE_GIB * parallel
        parts += f", {cache_gib:.1f} GiB for a context of {context:,} tokens"
        parts += f" and some {BESIDE_GIB * parallel:.0f} GiB beside them"
        smaller = "lower its max_model_len, "
    if needed_gib > usable_gib:
        raise FitError(
            f"{name} needs {parts}, but tensor_parallel = {parallel} gives it {usable_gib:.1f} GiB "
            f"({parallel} x {memory_gib:.1f} GiB x {share:g}). Raise its tensor_parallel, {smaller}"
            "take another dtype, or give it the base_url of a server."
        )


def num_parameters(config: PretrainedConfig) -> int:
    """Parameters of a configuration's model, tied ones once. No weights are held."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
