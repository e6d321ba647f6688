"""The miniature's fast paths equal the stock Qwen3-VL; its tokenizer is exact."""

import json
import shutil
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from egm_lib.inference.loading import load_model, load_processor, video_half
from egm_lib.mini.models import build, encode_images, patchify, processor, save
from egm_lib.mini.pretraining import base_models as pretrain
from egm_lib.mini.pretraining import questions as question_module
from egm_lib.mini.pretraining.packing import pack, packed_loss
from egm_lib.mini.pretraining.questions import WORDED_STEPS
from egm_lib.mini.pretraining.vision import scene_batch
from egm_lib.mini.tokens import NUMBERS, build_tokenizer
from egm_lib.prompts import FAMILIES


@pytest.fixture(scope="module")
def tiny():
    """A small model of random weights whose deepstack speaks."""
    model = build("small", build_tokenizer(), seed=0)
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.normal_(merger.linear_fc2.weight, std=0.05)
    return model.eval()


def test_patches_and_tower_equal_transformers(tiny):
    _, pixels_B_H_W_3 = scene_batch(5, 0, 3)
    images = [Image.fromarray(p) for p in pixels_B_H_W_3]
    stock = processor(build_tokenizer()).image_processor(images=images, return_tensors="pt")
    patches = patchify(pixels_B_H_W_3)
    torch.testing.assert_close(stock["pixel_values"], patches.flatten(0, 1))
    with torch.no_grad():
        wanted = tiny.model.visual(stock["pixel_values"], grid_thw=stock["image_grid_thw"])
        merged, deepstack = encode_images(tiny.model.visual, patches)
    torch.testing.assert_close(merged.flatten(0, 1), wanted.pooler_output, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(deepstack, wanted.deepstack_features, strict=True):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, atol=1e-5, rtol=1e-5)


def test_packed_questions_score_as_each_question_alone(tiny):
    tokenizer = build_tokenizer()
    chat = processor(tokenizer)
    scenes, pixels_B_H_W_3 = scene_batch(6, 0, 2)
    asked = [
        question_module.questions(scene, Random(n), WORDED_STEPS) for n, scene in enumerate(scenes)
    ]
    packed = pack([[(p, a) for _, p, a in questions] for questions in asked], tokenizer)
    assert tokenizer.unk_token_id not in packed.ids_N
    patches = patchify(pixels_B_H_W_3)
    try:
        with torch.no_grad():
            _, scores = packed_loss(tiny, packed, *encode_images(tiny.model.visual, patches))
    finally:
        tiny.model.language_model.config._attn_implementation = "sdpa"
    begin = 0
    for number, questions in enumerate(asked):
        for _, prompt, answer in questions:
            text = chat.apply_chat_template(
                FAMILIES["qwen3-vl"].messages(prompt), add_generation_prompt=True
            )
            image = Image.fromarray(pixels_B_H_W_3[number])
            inputs = chat(text=[text + answer + "<|im_end|>"], images=[image], return_tensors="pt")
            length = len(tokenizer(answer).input_ids) + 1
            with torch.no_grad():
                alone = tiny(**inputs).logits[0, -length - 1 : -1]
            torch.testing.assert_close(scores[begin : begin + length], alone, atol=2e-5, rtol=1e-4)
            begin += length
    assert begin == len(scores)


def test_every_number_of_the_grid_has_one_token_in_each_spelling():
    tokenizer = build_tokenizer()
    for number in NUMBERS:
        for spelling in (number, f", {number}", f" {number}", f" at {number}"):
            assert len(tokenizer(spelling).input_ids) == 1


def test_the_answer_of_the_family_is_exact_and_short():
    tokenizer = build_tokenizer()
    text = FAMILIES["qwen3-vl"].answer(
        (10, 20, 50, 60), (128, 128), None, "the red circle is at 240 320.", grid=20
    )
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert len(ids) < 20


@pytest.mark.parametrize("size", ["small", "large"])
def test_saved_checkpoints_load_with_the_project_loader(size, tmp_path):
    model = build(size, build_tokenizer(), seed=1)
    save(model, tmp_path)
    loaded = load_model(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    chat = load_processor(tmp_path, "qwen3-vl")
    assert chat.tokenizer("red circle").input_ids == build_tokenizer()("red circle").input_ids


def test_a_chat_template_that_stands_beside_the_processor_alone_is_found(tmp_path):
    """As in the published Qwen3-VL: chat_template.json, of which the tokenizer knows nothing."""
    shutil.copytree(pretrain.SHIPPED / "small", tmp_path, dirs_exist_ok=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_processor(tmp_path, "qwen3-vl").chat_template == template


def test_both_sizes_differ_in_the_language_model_only():
    small, large = (build(size, build_tokenizer(), seed=1) for size in ("small", "large"))
    assert [p.shape for p in small.model.visual.parameters()] == [
        p.shape for p in large.model.visual.parameters()
    ]
    count = [sum(p.numel() for p in m.model.language_model.parameters()) for m in (small, large)]
    assert count[1] >= 4 * count[0]


def test_a_missing_checkpoint_is_one_clear_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_model(tmp_path)


def test_scene_batches_are_a_function_of_seed_and_index():
    first, second = scene_batch(3, 4, 2)[1], scene_batch(3, 4, 2)[1]
    assert np.array_equal(first, second)
    assert not np.array_equal(first, scene_batch(3, 5, 2)[1])


@pytest.mark.parametrize("sizes", [("small", "large"), ("large", "huge")])
def test_a_grown_model_computes_what_it_grew_out_of(sizes):
    tokenizer = build_tokenizer()
    tiny, large = (build(size, tokenizer, seed=2).eval() for size in sizes)
    pretrain.grow(tiny.state_dict(), large)
    ids = torch.tensor([tokenizer("Locate red circle left of the blue star").input_ids])
    with torch.no_grad():
        torch.testing.assert_close(
            tiny(input_ids=ids).logits, large(input_ids=ids).logits, atol=1e-5, rtol=1e-5
        )
    new = [p for n, p in large.named_parameters() if ".layers.1." in n and "o_proj" in n]
    assert new and not new[0].any(), "a new layer starts silent"


SHIPPED = ("small", "large", "huge", "reference")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_speak_the_language_of_this_code(name):
    folder = pretrain.SHIPPED / name
    assert load_processor(folder, "qwen3-vl").tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_the_shipped_models_have_the_same_vision_tower():
    small, *others = (
        load_model(pretrain.SHIPPED / name).model.visual.state_dict() for name in SHIPPED
    )
    for other in others:
        assert small.keys() == other.keys()
        assert all(torch.equal(small[name], other[name]) for name in small)


@pytest.mark.parametrize(
    ("files", "videos"),
    [
        ({}, None),
        ({"preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessor"}}, None),
        ({"video_preprocessor_config.json": {"patch_size": 8}}, {"patch_size": 8}),
        (
            {"processor_config.json": {"video_processor": {"video_processor_type": "X"}}},
            {"video_processor_type": "X"},
        ),
    ],
)
def test_what_a_checkpoint_states_of_videos(tmp_path, files, videos):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert video_half(tmp_path) == videos
