"""What SFT and GRPO share before they train: options, the model, its frozen parts, LoRA."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from egm_lib.errors import EgmError
from egm_lib.inference.loading import load_model, load_processor
from egm_lib.inference.vllm_engine import MAX_MODEL_LEN
from egm_lib.profile import GRPO, SFT, Lora, Model
from egm_lib.prompts import Family


class TrainingError(EgmError, RuntimeError):
    """A training that cannot start or continue; the message says why and how to mend it."""


def common_options(work: Path, seed: int, dtype: str) -> dict:
    """Options of TRL's trainers that no profile chooses. The clock decides when to save."""
    return {
        "output_dir": str(work),
        "seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "activation_checkpointing": torch.cuda.is_available(),
        "save_strategy": "no",
        "save_total_limit": None,  # the clock removes the older ones, when the next is whole
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def use_one_gpu(config) -> None:
    """One GPU for a process that no launcher started, however many it sees.

    config: TrainingArguments. With several it would use DataParallel, which TRL refuses.
    """
    if config.n_gpu > 1:
        config._n_gpu = 1  # what transformers itself sets for a model that is placed by hand


def share_keys(config) -> None:
    """No gradient checkpointing: it would drop the keys and values that rows share.

    config: TrainingArguments. transformers reads the first name, and TRL the second.
    """
    config.activation_checkpointing = config.gradient_checkpointing = False


def rollout_context(options: GRPO) -> int:
    """Tokens of prompt and completion that vLLM has room for.

    Raises TrainingError where none is left for a prompt.
    """
    length = options.max_model_len or MAX_MODEL_LEN
    if length <= options.max_completion_length:
        raise TrainingError(
            f"grpo.max_model_len = {length} leaves no room for a prompt beside "
            f"grpo.max_completion_length = {options.max_completion_length}: raise it."
        )
    return length


def can_share_prefix(family: Family, options: SFT | GRPO, config) -> bool:
    """Whether prompts of one image can be read once, by our own trainers.

    That takes Qwen3-VL with all of its vision frozen, in one process without DeepSpeed, sampled by
    transformers.
    config: TrainingArguments.
    """
    return (
        family.name == "qwen3-vl"
        and options.freeze_vision
        and options.freeze_merger
        and getattr(options, "rollout", "transformers") == "transformers"
        and config.world_size == 1
        and config.deepspeed_plugin is None
    )


def lora_config(lora: Lora | None):
    """peft's configuration for a profile's `lora`: all linear layers of the language model.

    Raises TrainingError if weights are divided among processes: they could not be merged.
    """
    if lora is None:
        return None
    if os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3":
        raise TrainingError(
            "LoRA cannot be combined with ZeRO-3 here: the adapter is merged into whole "
            "weights. Set launch.accelerate_config to null, or train without lora."
        )
    from peft import LoraConfig

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )


def chat_text(processor, prompt: list[dict]) -> str:
    """A row's prompt as the chat template writes it, up to the beginning of the answer."""
    content = [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def freeze_tower(model, family: Family, *, tower: bool, merger: bool) -> None:
    """Freezes the vision tower, and the mergers between it and the language model."""
    part = {"qwen3-vl": "visual", "internvl-3": "vision_tower"}[family.name]
    for name, parameter in model.model.named_parameters():
        is_merger = "merger" in name or name.startswith("multi_modal_projector")
        if is_merger or name.startswith(part):
            parameter.requires_grad_(not (merger if is_merger else tower))


def load_start(place: str, start: Model, dtype: str):
    """(model, processor) that a training starts from.

    Raises TrainingError for a model that is gated or out of reach.
    """
    try:
        model = load_model(place, dtype, family=start.family, revision=start.revision)
        return model, load_processor(place, start.family, start.max_pixels, start.revision)
    except FileNotFoundError:
        raise  # says it in one sentence
    except OSError as error:  # transformers' word for "gated", "no such model" and "no network"
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{place} cannot be loaded: {reason} If it is gated, accept its licence on its page "
            "and run `hf auth login`; without a network, set HF_HOME to a folder that holds it."
        ) from error
