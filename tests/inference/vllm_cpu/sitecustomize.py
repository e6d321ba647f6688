"""On the path of `make test-vllm` alone: lets torchvision be imported beside a CPU-only torch.

Its wheel is built for CUDA, so two operators that it describes are missing. They are declared here;
nothing calls them.
"""

import torch

_library = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
