"""Lets the processes of a DeepSpeed training meet on a machine without GPUs.

accelerate has DeepSpeed on accelerators only: told to use a CPU, it trains without ZeRO-3.
"""

import os

from accelerate import DistributedType, PartialState

# What `accelerate launch` sets from configs/deepspeed_zero3.yaml, but in float32
ZERO_3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "auto",
    "ACCELERATE_MIXED_PRECISION": "no",
    "DS_ACCELERATOR": "cpu",  # DeepSpeed's own choice of device
}


def use_gloo() -> None:
    """From now on accelerate's processes meet over gloo, and may use DeepSpeed, on this CPU.

    The configuration of the training must then say `use_cpu=False`.
    """
    import deepspeed.ops

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    # None of DeepSpeed's operators is compiled. It would compile its all-reduce when that is first
    # used, and a compilation that is killed leaves a lock which all later ones wait for
    deepspeed.ops.__compatible_ops__ = {}
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)
