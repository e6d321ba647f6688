"""What SFT and GRPO share: the clock that limits a run, its log, its schedule, and finishing
without leaving halves.

A log is JSONL, one line a step, and the same for TensorBoard: `tensorboard --logdir data/runs`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from egm_lib.errors import EgmError
from egm_lib.inference.loading import load_model, load_processor
from egm_lib.profile import Lora, Model
from egm_lib.prompts import Family


class TrainingError(EgmError, RuntimeError):
    """A training that cannot start or must not go on; the message says why and how to mend it."""


def common_options(work: Path, seed: int, dtype: str) -> dict:
    """Options of TRL's trainers that no profile chooses; saving is the clock's."""
    return {
        "output_dir": str(work),
        "seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def lora_config(lora: Lora | None):
    """peft's configuration for a profile's `lora`: all linear layers of the language model."""
    if lora is None:
        return None
    from peft import LoraConfig

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )


def chat_text(processor, prompt: list[dict]) -> str:
    """A row's prompt as the chat template writes it, the assistant's turn begun."""
    content = [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def freeze_tower(model, family: Family, *, tower: bool, merger: bool) -> None:
    """Freezes the vision tower and, apart from it, the mergers that turn its outputs into the
    language model's.
    """
    part = {"qwen3-vl": "visual", "internvl-3": "vision_tower"}[family.name]
    for name, parameter in model.model.named_parameters():
        is_merger = "merger" in name or name.startswith("multi_modal_projector")
        if is_merger or name.startswith(part):
            parameter.requires_grad_(not (merger if is_merger else tower))


def load_start(place: str, start: Model, dtype: str):
    """(model, processor) that a training starts from. Raises TrainingError for what cannot be had,
    gated or offline.
    """
    try:
        return load_model(place, dtype=dtype), load_processor(place, start.family, start.max_pixels)
    except FileNotFoundError:
        raise  # says it in one sentence
    except OSError as error:  # transformers' word for "gated", "no such model" and "no network"
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{place} cannot be loaded: {reason} If it is gated, accept its licence on its page "
            "and run "
            "`hf auth login`; without a network, set HF_HOME to a folder that holds it."
        ) from error
