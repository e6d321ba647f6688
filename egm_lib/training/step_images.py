"""Images of a GRPO step, processed once.

TRL gives the processor the image of every completion, once for the rollout and once for the update:
32 times the same image where groups have 16 completions. A GPU would wait for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from transformers import BatchFeature
from transformers.image_utils import make_flat_list_of_images

from egm_lib.data import image_key


@contextmanager
def processed_once(image_processor) -> Iterator[None]:
    """Within this context, image_processor does not process an image again that it has seen.

    What it returns is the same. image_processor: of Qwen3-VL or InternVL-3, whose result for an
    image does not depend on the other images.
    """
    process, seen = image_processor.preprocess, {}

    def preprocess(images, *args, return_tensors=None, **kwargs) -> BatchFeature:
        flat = make_flat_list_of_images(images)
        keys = [(image_key(image), repr((args, sorted(kwargs.items())))) for image in flat]
        for key, image in zip(keys, flat, strict=True):
            if key not in seen:
                seen[key] = process([image], *args, **kwargs)
        names = seen[keys[0]].keys()
        data = {name: _joined([seen[key][name] for key in keys]) for name in names}
        return BatchFeature(data, tensor_type=return_tensors)

    image_processor.preprocess = preprocess
    try:
        yield
    finally:
        del image_processor.preprocess


def _joined(parts: list) -> np.ndarray | list:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return [value for part in parts for value in part]
