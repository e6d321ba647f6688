"""Fixtures of the tests of inference: three images, and an engine with tiny random weights."""

import pytest
from PIL import Image
from tiny_qwen import tiny_qwen

from egm_lib.inference.transformers_engine import TransformersEngine


@pytest.fixture
def images(tmp_path):
    for number in range(3):
        Image.new("RGB", (64, 48), (80 * number, 100, 200)).save(tmp_path / f"{number}.png")
    return tmp_path


@pytest.fixture(scope="module")
def engine():
    model, processor = tiny_qwen()
    return TransformersEngine(
        model, "qwen3-vl", "float32", batch_size=4, processor=processor, device="cpu"
    )
