"""What is checked before anything long starts: device, memory, rollout engine."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

import torch

from egm_lib.inference.loading import load_config
from egm_lib.model_shapes import shape_from_config
from egm_lib.profile import GRPO, Profile
from egm_lib.training.hardware import DEVICES, GIB, Hardware, PlanError
from egm_lib.training.model_setup import TrainingError
from egm_lib.training.plan import row_of, sharding_of
from egm_lib.training.plan_memory import Setting, states, vllm_need


def check_rollout(options: GRPO) -> None:
    """Raises TrainingError if this machine cannot sample as the profile says."""
    if options.rollout == "transformers":
        return
    if not torch.cuda.is_available():
        raise TrainingError(
            f"grpo.rollout is {options.rollout!r}, and PyTorch sees no GPU here: run it on a GPU "
            "machine, or set grpo.rollout to transformers."
        )
    if importlib.util.find_spec("vllm") is None:
        raise TrainingError(
            f"grpo.rollout is {options.rollout!r}, and vLLM is missing: `pip install -e .[gpu]`."
        )


def check_device(dtype: str, section: str, key: str = "dtype") -> None:
    """Raises TrainingError if half precision is asked for and there is no GPU.

    section, key: where the profile asks for it.
    """
    if dtype != "float32" and not torch.cuda.is_available():
        raise TrainingError(
            f"{section}.{key} is {dtype!r}, and PyTorch sees no GPU here: run it on a GPU machine, "
            f"or set {section}.{key} to float32."
        )


def check_memory(profile: Profile, stage: str, place: str) -> None:
    """Raises TrainingError if not even weights and optimizer state fit into a GPU.

    These are exact. Whether the rest fits too is an estimate, which egm_lib.training.plan makes.
    """
    if not torch.cuda.is_available():
        return
    try:
        setting = _setting(profile, stage, place)
    except (OSError, PlanError):
        return  # load_start says what is wrong with the model; the launcher divides it differently
    memory_gib, gpus = setting.hardware.device.memory_gib, setting.hardware.count
    needed_gib = sum(part.bytes for part in states(setting)) / GIB
    if needed_gib > memory_gib:
        raise TrainingError(
            f"{stage} of {place} needs {needed_gib:.0f} GiB for weights, gradients and optimizer "
            f"on each of {gpus} GPUs, but a GPU has {memory_gib:.0f}: take more GPUs "
            "(launch.num_processes) or train with lora. "
            f"`python -m egm_lib.training.plan --profile {profile.name}` shows what would fit."
        )
    if stage != "grpo" or profile.grpo.rollout != "vllm-colocate":
        return
    need_gib, share_gib = (size / GIB for size in vllm_need(setting))
    if need_gib > share_gib:
        raise TrainingError(
            f"vLLM needs {need_gib:.0f} GiB on each GPU, for the weights of {place} and one whole "
            f"context, but its share is {share_gib:.0f} of {memory_gib:.0f}: raise "
            "grpo.vllm_gpu_memory_utilization, lower grpo.max_model_len, or set grpo.rollout to "
            "vllm-server or transformers."
        )


def _setting(profile: Profile, stage: str, place: str) -> Setting:
    """What decides the memory of the stage on this machine's GPUs."""
    shape = shape_from_config(load_config(place))
    memory_gib = torch.cuda.get_device_properties(0).total_memory / GIB
    # Accelerate's processes divide weights and optimizer state among them
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    return Setting(
        options=getattr(profile, stage),
        shape=shape,
        row=row_of(profile, stage, shape),
        hardware=Hardware(replace(DEVICES["a100"], memory_gib=memory_gib), gpus),
        sharding=sharding_of(profile.launch.accelerate_config),
        shared_prefix=False,
    )
