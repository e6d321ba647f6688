"""Lets the processes of a DeepSpeed training meet on a machine without GPUs, for rehearsals alone.

accelerate has DeepSpeed on accelerators only: told to use a CPU, it trains without ZeRO-3. So it is
told of an accelerator, which is this CPU.
"""

from __future__ import annotations

import os
import sys

import torch
from accelerate import DistributedType, PartialState


def use_gloo() -> None:
    """From now on accelerate's processes meet over gloo, and may use DeepSpeed, on this CPU.

    The configuration of the training must then say `use_cpu=False`.
    """
    import deepspeed.ops

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed's own choice of device
    # None of DeepSpeed's operators is compiled. It would compile its all-reduce when that is first
    # used, and a compilation that is killed leaves a lock which all later ones wait for
    deepspeed.ops.__compatible_ops__ = {}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def train_as_on_gpus() -> None:
    """Before the trainings are imported: they start as if this CPU were a GPU."""
    from transformers import training_args

    from egm_lib.training import model_setup, preflight

    use_gloo()
    plain_options = model_setup.common_options

    def common_options(*args, **kwargs) -> dict:
        return plain_options(*args, **kwargs) | {"use_cpu": False}

    model_setup.common_options = common_options
    preflight.check_device = preflight.check_rollout = lambda *args: None
    training_args.is_torch_bf16_gpu_available = lambda: True
    if "egm_lib.grpo" in sys.orig_argv:
        keep_sampler_weights()


def keep_sampler_weights() -> None:
    """From now on vLLM's linear layers keep their weights as they were loaded.

    On a CPU with fast half precision vLLM packs weights and drops the originals, and so has nothing
    to put the trainer's weights into.
    """
    from vllm.model_executor.layers import utils

    def use_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    utils.dispatch_cpu_unquantized_gemm = use_weights
