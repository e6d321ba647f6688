"""Python reads this first, where it is on the path: vLLM and ZeRO-3 beside a CPU-only torch.

torchvision's wheel is built for CUDA, so two operators that it describes are missing. They are
declared here; nothing calls them.
"""

import os

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

if "TORCHELASTIC_RUN_ID" in os.environ:  # one of several processes that `accelerate launch` starts
    from egm_lib.pipeline.rehearsal.cpu_ranks import train_as_on_gpus

    train_as_on_gpus()
