"""What is checked before anything long starts: device, memory, rollout engine."""

from __future__ import annotations

import importlib.util
import os

import torch

from egm_lib.inference.loading import load_config
from egm_lib.profile import GRPO, Profile
from egm_lib.training import plan
from egm_lib.training.model_setup import TrainingError


def check_rollout(options: GRPO) -> None:
    """Raises TrainingError where this machine cannot sample as the profile says."""
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
    """Raises TrainingError where half precision is asked for and there is no GPU.

    section, key: where the profile asks for it.
    """
    if dtype != "float32" and not torch.cuda.is_available():
        raise TrainingError(
            f"{section}.{key} is {dtype!r}, and PyTorch sees no GPU here: run it on a GPU machine, "
            f"or set {section}.{key} to float32."
        )


def check_memory(profile: Profile, stage: str, place: str) -> None:
    """Raises TrainingError where not even weights and optimizer state fit into a GPU.

    These are exact. Whether the rest fits too is an estimate, which egm_lib.training.plan makes.
    """
    if not torch.cuda.is_available():
        return
    try:
        config = load_config(place)
    except OSError:
        return  # load_start says it
    # Of accelerate's processes, which divide these among them
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    memory_gib = torch.cuda.get_device_properties(0).total_memory / plan.GIB
    hardware = plan.Hardware(gpus, memory_gib, tflops=1.0)
    parts = plan.estimate(profile, config, stage, hardware, samples=1)
    needed_gib = parts.weights_gib + parts.gradients_gib + parts.optimizer_gib + parts.reference_gib
    if needed_gib > memory_gib:
        raise TrainingError(
            f"{stage} of {place} holds {needed_gib:.0f} GiB of weights, gradients and optimizer on "
            f"each of {gpus} GPUs, and one has {memory_gib:.0f}: take more GPUs "
            "(launch.num_processes) or train with lora. "
            f"`python -m egm_lib.training.plan --profile {profile.name}` shows what would fit."
        )
    share_gib = profile.grpo.vllm_gpu_memory_utilization * memory_gib
    if parts.rollout_weights_gib > share_gib:
        raise TrainingError(
            f"vLLM holds {parts.rollout_weights_gib:.0f} GiB of weights of {place} on each GPU, "
            f"and its share is {share_gib:.0f} of {memory_gib:.0f}: raise "
            "grpo.vllm_gpu_memory_utilization, or set grpo.rollout to vllm-server or transformers."
        )
