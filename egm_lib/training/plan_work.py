"""How long a training takes, and what it needs of disk and host memory, with the arithmetic.

Hours come from floating-point operations and a share of the device's peak. Two for each parameter
and token are one forward pass, four the backward pass, two more where layers are recomputed
(Kaplan et al. 2020, Sec. 2.1). The products of attention itself are left out: they are below 5 % at
these lengths. Where a pass has few tokens, a GPU waits for Python instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from egm_lib.profile import GRPO
from egm_lib.training.checkpoints import STATE_BYTES, WEIGHT_BYTES
from egm_lib.training.hardware import GIB
from egm_lib.training.plan_memory import BYTES, Setting

# Ours, of the peak: trainings of this size reach 0.3 to 0.45 in bfloat16 on A100 and H100, and
# float32 without tensor cores comes nearer to its own, lower peak
UTILISATION = {2: 0.35, 4: 0.7}
# Ours, of the bandwidth: decoding reads weights and KV cache for each token
BANDWIDTH_SHARE = 0.6
# Measured on an H200 (SFT of a Qwen3-VL-2B, 4 rows a pass): a forward and backward pass through a
# layer takes at least so long, because Python starts its kernels one after the other
LAYER_PASS_S = 0.005
# Ours: one Python process with torch, transformers and a CUDA context
PROCESS_BYTES = 4 * GIB


@dataclass(frozen=True)
class Amount:
    """A number of the plan in its unit. how: its arithmetic."""

    name: str
    value: float
    unit: str
    how: str


def steps_of(setting: Setting, samples: int) -> int:
    """Updates of the whole training."""
    options = setting.options
    if isinstance(options, GRPO):
        steps = math.ceil(samples / options.prompts_per_step) * options.num_train_epochs
    else:
        rows = options.per_device_train_batch_size * options.gradient_accumulation_steps
        steps = samples * options.num_train_epochs / (rows * setting.hardware.count)
    return int(min(math.ceil(steps), options.max_steps or math.inf))


def hours(setting: Setting, samples: int) -> list[Amount]:
    """Hours of the stage by kind of work; the last is their sum."""
    device, options, text = setting.hardware.device, setting.options, setting.shape.text
    peak = device.bf16_tflops if setting.compute == 2 else device.float32_tflops
    share = UTILISATION[setting.compute]
    speed = setting.hardware.count * peak * 1e12 * share
    at = f"{setting.hardware.count} x {peak:g} Tflop/s x {share:g}"
    group = options.num_generations if isinstance(options, GRPO) else 1
    rows = steps_of(setting, samples) * _step_rows(setting)
    again = 2 * setting.checkpointing
    reads = 1 / group if setting.shared_prefix or setting.packs else 1  # of a prompt, for each row
    tokens = rows * (setting.row.prompt * reads + setting.row.answer)
    parts = [_by_flops("language model", (6 + again), text.active_parameters, tokens, speed, at)]
    vision, patches = setting.shape.vision, setting.shape.vision.tower_tokens(setting.row.image)
    trains_tower = not (options.freeze_vision or options.lora)
    passes = (6 + again) if trains_tower else 2
    cached = setting.shared_prefix  # each image is encoded once
    if not cached:
        parts.append(
            _by_flops(
                "vision tower", passes, vision.tower, rows * reads * patches, speed, at, "patches"
            )
        )
    if device.is_gpu:
        parts.append(_waiting_hours(setting, rows, sum(part.value for part in parts)))
    if isinstance(options, GRPO):
        if options.beta:
            parts.append(_by_flops("reference", 2, text.active_parameters, tokens, speed, at))
        parts += _rollout_hours(setting, rows, speed, at)
    total = sum(part.value for part in parts)
    limit = options.max_minutes and options.max_minutes / 60
    if limit and limit < total:
        return [*parts, Amount("stops after", limit, "hours", "max_minutes of the profile")]
    return [*parts, Amount("together", total, "hours", "")]


def _waiting_hours(setting: Setting, rows: int, computing: float) -> Amount:
    """Hours that a GPU waits for Python in short passes. computing: hours of the passes' work."""
    layers = setting.shape.text.layers + setting.shape.vision.depth * (not setting.shared_prefix)
    passes = rows / (setting.rows * setting.hardware.count)
    how = (
        f"{passes:,.0f} passes x {layers} layers x {LAYER_PASS_S:g} s, less the {computing:.2f} "
        "hours above, in which the GPU computes"
    )
    value = max(0.0, passes * layers * LAYER_PASS_S / 3600 - computing)
    return Amount("waiting for Python", value, "hours", how)


def _step_rows(setting: Setting) -> int:
    """Rows that all devices train on in a step."""
    options = setting.options
    if isinstance(options, GRPO):
        return options.prompts_per_step * options.num_generations
    rows = options.per_device_train_batch_size * options.gradient_accumulation_steps
    return rows * setting.hardware.count


def _by_flops(
    name: str,
    passes: float,
    parameters: int,
    tokens: float,
    speed: float,
    at: str,
    unit: str = "tokens",
) -> Amount:
    how = f"{passes:g} x {parameters:,} parameters x {tokens:,.0f} {unit} / ({at})"
    return Amount(name, passes * parameters * tokens / speed / 3600, "hours", how)


def _rollout_hours(setting: Setting, rows: int, speed: float, at: str) -> list[Amount]:
    """Reading each prompt once a group, and decoding, which waits for memory.

    A step reads the weights until its longest answer ends, and the KV cache for each token.
    """
    options, text, row = setting.options, setting.shape.text, setting.row
    value = BYTES[options.rollout_dtype]
    prompts = rows // options.num_generations
    prefill = _by_flops(
        "rollout, prompts", 2, text.active_parameters, prompts * row.prompt, speed, at
    )
    steps = rows / _step_rows(setting)
    weights = steps * row.longest * text.parameters * value
    context = row.prompt + row.answer / 2
    cache = rows / setting.hardware.count * row.answer * context * text.kv_bytes(value)
    bandwidth = setting.hardware.device.bandwidth_tb_s * 1e12 * BANDWIDTH_SHARE
    how = (
        f"({steps:,.0f} steps x {row.longest:,} tokens x {text.parameters * value / 1e9:.1f} GB + "
        f"{rows / setting.hardware.count:,.0f} rows x {row.answer:,} x {context:,.0f} tokens x "
        f"{text.kv_bytes(value):,} bytes) / "
        f"({setting.hardware.device.bandwidth_tb_s:g} TB/s x {BANDWIDTH_SHARE:g})"
    )
    return [
        prefill,
        Amount("rollout, answers", (weights + cache) / bandwidth / 3600, "hours", how),
    ]


def disk(setting: Setting) -> list[Amount]:
    """Disk for one stage and task: at its fullest, and what stays."""
    trained = setting.trained
    frozen = setting.shape.parameters - (0 if setting.options.lora else trained)
    checkpoint = trained * STATE_BYTES + frozen * WEIGHT_BYTES
    value = setting.compute if setting.sharding.kind == "zero-3" else 4
    model = setting.shape.parameters * value
    return [
        Amount(
            "checkpoints",
            2 * checkpoint / 1e9,
            "GB",
            f"2 x ({trained:,} trained x {STATE_BYTES} + {frozen:,} x {WEIGHT_BYTES} bytes): "
            "the older goes when the newer is whole, or before it where the disk is short",
        ),
        Amount(
            "finished model",
            model / 1e9,
            "GB",
            f"{setting.shape.parameters:,} parameters x {value} bytes; it stays",
        ),
    ]


def host(setting: Setting) -> Amount:
    """Memory of the machine while a model is loaded.

    Under ZeRO-3 rank 0 reads the checkpoint as it is stored, and the others its shapes
    (transformers' from_pretrained).
    """
    processes, kind = setting.hardware.count, setting.sharding.kind
    value = BYTES["bfloat16"] if kind == "zero-3" else 4
    if not setting.hardware.device.is_gpu:
        return Amount("host memory", 0.0, "GiB", "the CPU's memory is that of the plan")
    size = setting.shape.parameters * value + processes * PROCESS_BYTES
    how = (
        f"{setting.shape.parameters:,} parameters x {value} bytes in rank 0, and {processes} x "
        f"{PROCESS_BYTES / GIB:g} GiB for the processes"
    )
    return Amount("host memory", size / GIB, "GiB", how)
