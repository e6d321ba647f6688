"""Images that are processed once, and results that do not differ."""

import numpy as np
import pytest
import torch
from PIL import Image
from training_world import store_model

from egm_lib.inference.loading import load_processor
from egm_lib.training.step_images import processed_once

SIZES_WH = [(64, 48), (48, 64), (64, 48)]


@pytest.fixture(scope="module", params=["qwen3-vl", "internvl-3"])
def processor(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    store_model(folder, *([] if request.param == "qwen3-vl" else [request.param]))
    return load_processor(folder, request.param)


def drawn(seed: int = 0) -> list[Image.Image]:
    dice = np.random.default_rng(seed)
    return [
        Image.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES_WH
    ]


def same(ours, plain) -> bool:
    if isinstance(plain, torch.Tensor):
        return torch.equal(ours, plain)
    return all(map(np.array_equal, ours, plain)) and len(ours) == len(plain)


@pytest.mark.parametrize("tensors", [None, "pt"])
def test_what_comes_back_is_what_the_processor_returns(processor, tensors):
    first, second, third = drawn()
    # As TRL asks: one list an example. The last image equals the first, and is another object
    rows = [[first], [second], [first], [third], [first.copy()]]
    plain = processor.image_processor(rows, return_tensors=tensors)
    with processed_once(processor.image_processor):
        for _ in range(2):
            ours = processor.image_processor(rows, return_tensors=tensors)
            assert ours.keys() == plain.keys()
            assert all(same(ours[name], plain[name]) for name in plain)
            assert all(type(ours[name]) is type(plain[name]) for name in plain)


def test_an_image_is_processed_again_for_other_options_and_after_the_step(processor, monkeypatch):
    images, asked = drawn(), []
    process = type(processor.image_processor).preprocess

    def spy(self, images, *args, **kwargs):
        asked.append(len(images))
        return process(self, images, *args, **kwargs)

    monkeypatch.setattr(type(processor.image_processor), "preprocess", spy)
    with processed_once(processor.image_processor):
        for rows in (images, [images[0], images[0]], images[1:]):
            processor.image_processor(rows)
        assert asked == [1, 1, 1]
        darker = processor.image_processor(images[:1], do_normalize=False)
        assert asked == [1] * 4
    plain = processor.image_processor(images[:1])
    assert asked == [1] * 5
    assert not np.array_equal(darker["pixel_values"][0], plain["pixel_values"][0])
