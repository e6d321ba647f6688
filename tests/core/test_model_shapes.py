"""Shapes against transformers' own models on the meta device, and against published totals."""

import pytest
import torch
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen
from transformers import (
    AutoModelForImageTextToText,
    PretrainedConfig,
    Qwen3VLConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from egm_lib.inference.random_models import config_of
from egm_lib.model_shapes import SHAPES, QwenVision, ShapeError, shape_from_config, shape_of

# Billions of parameters that the model cards or the papers state
PUBLISHED = {
    "Qwen3-VL-2B": 2.127532032,
    "Qwen3-VL-4B": 4.437815808,
    "Qwen3-VL-8B": 17_534_247_392 / 2 / 1e9,  # bytes of its bfloat16 weights
    "Qwen3-VL-32B": 33.4,
    "Qwen3-VL-235B-A22B": 236,
    "InternVL3-1B": 0.938,
    "InternVL3-2B": 2.09,
    "InternVL3-8B": 7.94,
    "InternVL3-14B": 15.1,
    "InternVL3-38B": 38.4,
    "InternVL3-78B": 78.4,
    "InternVL3_5-241B-A28B": 240.7,
}


def counted(config: PretrainedConfig) -> dict[str, int]:
    """Parameters of transformers' model, by part."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    merger = [name for name in sizes if "merger" in name or "projector" in name]
    vision = [name for name in sizes if ".visual." in name or ".vision_tower." in name]
    return {
        "parameters": sum(sizes.values()),
        "merger": sum(sizes[name] for name in merger),
        "tower": sum(sizes[name] for name in vision if name not in merger),
    }


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers_model(name):
    shape = SHAPES[name]
    config = config_of(shape)
    found = counted(config)
    assert shape.parameters == found["parameters"]
    assert shape.vision.merger == found["merger"]
    assert shape.vision.tower == found["tower"]
    read = shape_from_config(config)
    assert (read.text, read.vision) == (shape.text, shape.vision)


def test_all_qwen_towers_have_transformers_heads_and_deepstack():
    """The published configurations keep these defaults, whatever the size."""
    default = Qwen3VLConfig().vision_config
    towers = [shape.vision for shape in SHAPES.values() if isinstance(shape.vision, QwenVision)]
    assert {tower.heads for tower in towers} == {default.num_heads}
    assert {tower.deepstack for tower in towers} == {len(default.deepstack_visual_indexes)}


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameters_are_those_of_the_model_card(name, billions):
    assert SHAPES[name].parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_every_shape_has_a_published_total():
    assert set(PUBLISHED) == set(SHAPES)


def test_a_token_of_22b_activates_22_billion():
    """The name says 22 billion, A28B counts the vision tower too."""
    assert SHAPES["Qwen3-VL-235B-A22B"].active_parameters == pytest.approx(22e9, rel=0.03)


@pytest.mark.parametrize("make", [tiny_qwen, tiny_internvl])
def test_models_of_one_s_own_are_read_from_their_configuration(make):
    model = make()[0]
    assert shape_from_config(model.config).parameters == model.num_parameters()


def test_another_architecture_is_refused():
    config = tiny_qwen()[0].config
    config.model_type = "llava"
    with pytest.raises(ShapeError, match="llava"):
        shape_from_config(config)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-VL-8B-Thinking", "Qwen3-VL-8B"),
        ("Qwen/Qwen3-VL-235B-A22B-Instruct", "Qwen3-VL-235B-A22B"),
        ("OpenGVLab/InternVL3-1B-hf", "InternVL3-1B"),
        ("OpenGVLab/InternVL3_5-241B-A28B-HF", "InternVL3_5-241B-A28B"),
        ("nvidia/EGM-4B", "Qwen3-VL-4B"),
    ],
)
def test_names_of_the_hub(path, name):
    assert shape_of(path) is SHAPES[name]


def test_an_unknown_model_is_refused_in_a_sentence():
    with pytest.raises(ShapeError, match="config.json"):
        shape_of("llava-hf/llava-1.5-7b-hf")


SIZES = [(640, 480), (480, 640), (640, 640), (640, 427), (500, 333), (1920, 1080), (100, 60)]


@pytest.mark.parametrize("max_pixels", [None, 50_176])
@pytest.mark.parametrize(("width", "height"), [*SIZES, (40, 30), (6000, 5000), (3000, 20)])
def test_qwen_s_image_tokens_are_its_processor_s(width, height, max_pixels):
    least, most = (65_536, 16_777_216) if max_pixels is None else (1024, max_pixels)
    rows_px, columns_px = smart_resize(height, width, 32, least, most)
    tokens = SHAPES["Qwen3-VL-8B"].vision.image_tokens(width, height, max_pixels)
    assert tokens == rows_px * columns_px // 1024


@pytest.mark.parametrize(("width", "height"), [*SIZES, (4000, 300)])
def test_internvl_s_tiles_are_its_processor_s(width, height):
    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), 1, 12)
    tiles = columns * rows + (columns * rows > 1)  # a thumbnail beside several
    vision = SHAPES["InternVL3-8B"].vision
    assert vision.tiles(width, height) == tiles
    assert vision.image_tokens(width, height) == 256 * tiles


def test_image_tokens_of_a_coco_image():
    """By hand: 640 x 480 px are 20 x 15 squares of 32 px; 4:3 makes 12 tiles and a thumbnail."""
    assert SHAPES["Qwen3-VL-8B"].vision.image_tokens(640, 480) == 300
    assert SHAPES["Qwen3-VL-8B"].vision.image_tokens(640, 480, 50_176) == 48
    assert SHAPES["InternVL3-8B"].vision.image_tokens(640, 480) == 13 * 256
