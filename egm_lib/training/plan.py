"""Will it fit, and how long will it take: memory and hours of a profile's training on given
hardware, before it starts.

    python -m egm_lib.training.plan --profile paper-qwen3vl-8b --gpus 8 --gpu-memory 80 --tflops 312

Only the model's configuration is read. Weights, gradients and optimizer state are exact (with
several GPUs divided among them, as ZeRO-3 and FSDP do); activations, KV cache and hours are
estimates, their assumptions beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
from transformers import AutoModelForImageTextToText

from egm_lib.cli import ends
from egm_lib.errors import EgmError
from egm_lib.inference.loading import load_config
from egm_lib.inference.shared_prefix import ROLLOUT_ROWS
from egm_lib.inference.vllm_engine import MAX_MODEL_LEN
from egm_lib.profile import Profile, load_profile

GIB = 2**30
ADAM_BYTES = 8  # two float32 moments a trained parameter
# TRL's chunked head: tokens x vocabulary x float32, whatever the batch
LOGITS_TILE = 4096 * 32768 * 4
# Bytes a token and unit of width that one layer holds in bf16 (Korthikanti et al. 2022)
LIVE_ACTIVATIONS = 34
UTILISATION = 0.35  # share of the peak that training reaches: between 0.3 and 0.45 on A100 and H100
DECODE_UTILISATION = 0.05  # of decoding, which waits for memory


class PlanError(EgmError, ValueError):
    """What cannot be planned, and why."""


@dataclass(frozen=True)
class Hardware:
    gpus: int
    memory_gib: float
    tflops: float  # dense bf16 peak of one GPU

    def __post_init__(self):
        if self.gpus < 1 or self.memory_gib <= 0 or self.tflops <= 0:
            raise PlanError(f"hardware needs at least one GPU with memory and speed, got {self}")


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of one GPU in GiB, and the work; `fits` leaves a tenth of the memory free.

    rollout_weights, kv_cache: a colocated vLLM's, its own copy of the weights whole on every GPU;
    together its share.
    """

    stage: str
    parameters: int
    trained_parameters: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    reference_gib: float
    activations_gib: float
    logits_gib: float
    rollout_weights_gib: float
    kv_cache_gib: float
    total_gib: float
    fits: bool
    steps: int
    tokens: int
    hours: float


def count_parameters(config) -> dict[str, int]:
    """Parameters of a configuration's model: total, vision (tower and mergers), merger. Holds no
    weights.
    """
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    # Tied weights once
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    merger = sum(
        size for name, size in sizes.items() if "merger" in name or "multi_modal_projector" in name
    )
    towers = (".visual.", ".vision_tower.")
    vision = sum(
        size
        for name, size in sizes.items()
        if any(part in name for part in towers) or "projector" in name
    )
    return {"total": sum(sizes.values()), "vision": vision, "merger": merger}


def lora_parameters(config, rank: int) -> int:
    """Parameters of LoRA on every linear layer of the language model."""
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    q, kv, width = (
        text.num_attention_heads * head,
        text.num_key_value_heads * head,
        text.hidden_size,
    )
    ends = 2 * (width + q) + 2 * (width + kv) + 3 * (width + text.intermediate_size)
    return text.num_hidden_layers * rank * ends


def estimate(
    profile: Profile,
    config,
    stage: str,
    hardware: Hardware,
    *,
    samples: int,
    prompt_tokens: int = 300,
    answer_tokens: int = 100,
) -> MemoryPlan:
    """What a stage ("sft" or "grpo") needs. samples: rows it trains on; tokens: means a row,
    image included.
    """
    options, text = getattr(profile, stage), config.get_text_config()
    counts = count_parameters(config)
    trained = _trained(counts, config, options)
    width = 2 if options.dtype != "float32" or options.lora else 4
    # Mixed precision keeps float32 weights beside the half-precision ones it computes with.
    weights = counts["total"] * (width if options.lora else 4 + (2 if width == 2 else 0))
    length, rows = prompt_tokens + answer_tokens, options.per_device_train_batch_size
    kept = rows * length * text.hidden_size * 2
    # Checkpoints, and one layer recomputed
    activations = kept * text.num_hidden_layers + kept * LIVE_ACTIVATIONS / 2
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * 2
    reference = copy = cache = 0.0
    enough = True
    if stage == "grpo":
        per_step, group = options.prompts_per_step, options.num_generations
        # It takes its share whole: weights, and the rest for the cache
        if options.rollout == "vllm-colocate":
            copy, longest = (
                counts["total"] * 2,
                min(MAX_MODEL_LEN, text.max_position_embeddings) * kv_token,
            )
            share = options.vllm_gpu_memory_utilization * hardware.memory_gib * GIB
            enough, cache = share >= copy + longest, max(share - copy, longest)
        elif options.rollout == "transformers":
            cache = min(per_step * group / hardware.gpus, ROLLOUT_ROWS) * length * kv_token
        reference = counts["total"] * width if options.beta and not options.lora else 0.0
        passes = samples * group * options.num_train_epochs
        steps = math.ceil(samples / per_step) * options.num_train_epochs
    else:
        passes = samples * options.num_train_epochs
        steps = passes / (rows * options.gradient_accumulation_steps * hardware.gpus)
    steps = min(math.ceil(steps), options.max_steps or math.inf)
    forwards = 3 + (1 if reference else 0)
    flops = passes * 2 * counts["total"] * length * forwards / UTILISATION
    if stage == "grpo":
        flops += passes * 2 * counts["total"] * answer_tokens / DECODE_UTILISATION
    parts = {
        "weights_gib": weights / hardware.gpus,
        "gradients_gib": trained * 4 / hardware.gpus,
        "optimizer_gib": trained * ADAM_BYTES / hardware.gpus,
        "reference_gib": reference / hardware.gpus,
        "activations_gib": activations,
        "logits_gib": LOGITS_TILE,
        "rollout_weights_gib": copy,
        "kv_cache_gib": cache,
    }
    parts = {name: value / GIB for name, value in parts.items()}
    total = sum(parts.values())
    return MemoryPlan(
        stage=stage,
        parameters=counts["total"],
        trained_parameters=trained,
        **parts,
        total_gib=total,
        fits=enough and total <= 0.9 * hardware.memory_gib,
        steps=int(steps),
        tokens=int(passes * length),
        hours=flops / (hardware.gpus * hardware.tflops * 1e12) / 3600,
    )


def _trained(counts: Mapping[str, int], config, options) -> int:
    if options.lora:
        return lora_parameters(config, options.lora.r)
    frozen = (counts["vision"] - counts["merger"]) * options.freeze_vision + counts[
        "merger"
    ] * options.freeze_merger
    return counts["total"] - frozen


def as_text(plans: list[MemoryPlan], hardware: Hardware) -> str:
    """The estimates as a table, a column a stage."""

    def shown(value: object) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        return (
            value
            if isinstance(value, str)
            else f"{value:,.1f}"
            if isinstance(value, float)
            else f"{value:,}"
        )

    lines = [
        f"{hardware.gpus} x {hardware.memory_gib:g} GiB, {hardware.tflops:g} Tflop/s; "
        "fits: a tenth stays free"
    ]
    for name in (field.name for field in fields(MemoryPlan)):
        label = name.replace("_gib", ", GiB a GPU").replace("_", " ")
        lines.append(
            f"{label:28s}" + "".join(f"{shown(getattr(plan, name)):>16s}" for plan in plans)
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.training.plan", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--gpu-memory", type=float, default=80.0, metavar="GIB")
    parser.add_argument(
        "--tflops",
        type=float,
        default=312.0,
        help="dense bf16 peak of one GPU; A100: 312, H100: 989",
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--sft-samples", type=int, default=575_208, help="Sec. 4.1")
    parser.add_argument("--rl-samples", type=int, default=83_989, help="Table 7")
    args = parser.parse_args(argv)
    return ends(lambda: _print_plan(args))


def _print_plan(args: argparse.Namespace) -> None:
    profile = load_profile(args.profile)
    hardware = Hardware(args.gpus, args.gpu_memory, args.tflops)
    try:
        config = load_config(profile.models.small.location)
    except OSError as error:  # transformers' "cannot reach the hub" and "no such folder"
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"The configuration of {profile.models.small.path} cannot be read: {reason}"
        ) from error
    rows = {"sft": args.sft_samples, "grpo": args.rl_samples}
    plans = [estimate(profile, config, stage, hardware, samples=rows[stage]) for stage in rows]
    if args.json:
        print(json.dumps([asdict(plan) for plan in plans], indent=2))
    else:
        print(as_text(plans, hardware))


if __name__ == "__main__":
    sys.exit(main())
