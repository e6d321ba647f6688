"""Limits of image sizes: images are shrunk and never enlarged."""

import pytest
import torch
from PIL import Image
from tiny_internvl import tiny_internvl

from egm_lib.errors import InputError
from egm_lib.files import project_root
from egm_lib.inference import loading
from egm_lib.inference.loading import load_model, load_processor

MINI = project_root() / "data/mini/small"


def num_pixels(processor, size: tuple[int, int]) -> int:
    images = processor.image_processor
    grid = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
    return int(grid.prod()) * images.patch_size**2


@pytest.mark.parametrize("limit", [1024, 2048, 4096])
def test_max_pixels_limits_and_never_enlarges(limit):
    """A side is rounded to whole tokens; the least is one token."""
    native, limited = load_processor(MINI, "qwen3-vl"), load_processor(MINI, "qwen3-vl", limit)
    for size in ((16, 16), (32, 16), (64, 64), (96, 64)):
        pixels = num_pixels(limited, size)
        assert pixels <= min(limit, num_pixels(native, size))
        if size[0] * size[1] <= limit:
            assert pixels <= size[0] * size[1]
    generous = load_processor(MINI, "qwen3-vl", 10**9)  # above the checkpoint's own limit
    assert generous.image_processor.size == native.image_processor.size


def test_max_pixels_is_refused_for_tiles(monkeypatch):
    monkeypatch.setattr(loading, "_processor", lambda *args: tiny_internvl()[1])
    with pytest.raises(InputError, match="set it to null"):
        load_processor("tiny", "internvl-3", 1024)


def test_a_loaded_model_runs_without_cudnn_s_attention_and_tf32():
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    load_model(MINI)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert not torch.backends.cudnn.allow_tf32
