"""The plan's activations compared with what autograd keeps, and its head with what it allocates."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageTextToText, InternVLConfig, Qwen3VLConfig
from trl.kernels import ChunkedLogProbFunction

from egm_lib.model_shapes import shape_from_config
from egm_lib.profile import load_profile
from egm_lib.training.hardware import hardware
from egm_lib.training.packed_groups import pack, use_packed_attention
from egm_lib.training.plan import make_setting
from egm_lib.training.plan_memory import (
    TILE_COPIES_CPU,
    Row,
    block_bytes,
    language_layer_bytes,
    text_layer_bytes,
)
from egm_lib.training.prefix_logps import VOCABULARY_CHUNK

ROWS, LENGTH = 2, 100
DTYPES = [(torch.float32, 4), (torch.bfloat16, 2)]
TEXT = {"vocab_size": 512, "max_position_embeddings": 1024}
ROPE = {
    "rope_type": "default",
    "rope_theta": 5e6,
    "mrope_section": [24, 20, 20],
    "mrope_interleaved": True,
}


def kept_bytes(forward: Callable[[], object], parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd keeps of a forward pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return size


def build(config, dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        return AutoModelForImageTextToText.from_config(config)
    finally:
        torch.set_default_dtype(torch.float32)


def qwen_config(layers: int, hidden: int = 512, heads: int = 4, keys: int = 2, mlp: int = 1536):
    text = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "head_dim": 128,
        "intermediate_size": mlp,
        "rope_parameters": ROPE,
    }
    vision = {
        "depth": 2,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLConfig(text_config=TEXT | text, vision_config=vision)


def internvl_config(layers: int):
    text = {
        "model_type": "qwen2",
        "hidden_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
    }
    vision = {
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "image_size": 112,
        "attention_bias": True,
    }
    return InternVLConfig(text_config=TEXT | text, vision_config=vision)


def language_bytes(config, dtype: torch.dtype) -> int:
    model = build(config, dtype)
    width = config.text_config.hidden_size
    inputs = torch.randn(ROWS, LENGTH, width, dtype=dtype, requires_grad=True)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[0, :20] = 0  # padding: without it no mask is made
    language = model.model.language_model

    def forward():
        return language(inputs_embeds=inputs, attention_mask=mask, use_cache=False)

    return kept_bytes(forward, model.parameters())


@pytest.mark.parametrize(("dtype", "value"), DTYPES)
@pytest.mark.parametrize(
    "make",
    [
        qwen_config,
        lambda layers: qwen_config(layers, heads=8, keys=8, mlp=1024),  # no head is shared
        internvl_config,
    ],
)
def test_a_layer_keeps_what_the_plan_says(make, dtype, value):
    """Three layers less one: embedding and last norm fall out."""
    measured = (language_bytes(make(3), dtype) - language_bytes(make(1), dtype)) / 2
    text = shape_from_config(make(1)).text
    expected = ROWS * LENGTH * text_layer_bytes(text, value, LENGTH)
    assert measured == pytest.approx(expected, rel=0.01)


GROUPS, SIZE, PROMPT, ANSWER = 2, 3, 61, 40


def packed_bytes(config, dtype: torch.dtype) -> int:
    model = build(config, dtype)
    assert use_packed_attention(model)
    positions = torch.arange(PROMPT)[None]
    answers = [torch.zeros(ANSWER, dtype=torch.long)] * SIZE
    prompts = [torch.zeros(PROMPT, dtype=torch.long)] * GROUPS
    row = pack(prompts, [positions] * GROUPS, [answers] * GROUPS)
    length, width = row.ids_1_L.shape[1], config.text_config.hidden_size
    inputs = torch.randn(1, length, width, dtype=dtype, requires_grad=True)
    language = model.model.language_model

    def forward():
        return language(
            inputs_embeds=inputs,
            attention_mask=torch.ones(1, length, dtype=torch.long),
            position_ids=row.positions_A_L,
            use_cache=False,
            packed_groups=row.groups,
        )

    return kept_bytes(forward, model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [qwen_config, internvl_config])
def test_a_layer_that_reads_packed_groups_keeps_what_the_plan_says(make, dtype):
    sizes = [packed_bytes(make(layers), getattr(torch, dtype)) for layers in (1, 3)]
    measured = (sizes[1] - sizes[0]) / 2
    profile = load_profile("paper-qwen3vl-8b")
    options = replace(
        profile.grpo,
        compute_dtype=dtype,
        num_generations=SIZE,
        per_device_train_batch_size=GROUPS * SIZE,
        micro_batch_tokens=None,
    )
    row = Row(image=PROMPT - 11, question=10, answer=ANSWER, longest=ANSWER)
    alone = replace(profile.launch, accelerate_config=None, num_processes=1)
    setting = make_setting(
        replace(profile, grpo=options, launch=alone),
        "grpo",
        hardware("a100"),
        shape=shape_from_config(make(1)),
        row=row,
    )
    assert setting.tokens == GROUPS * (PROMPT - 1 + SIZE * ANSWER)
    assert setting.tokens * language_layer_bytes(setting) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("dtype", "value"), DTYPES)
def test_a_block_of_qwen_s_tower_keeps_what_the_plan_says(dtype, value):
    config = qwen_config(1, heads=2)
    model = build(config, dtype)
    patches = torch.randn(1200, 256, dtype=dtype, requires_grad=True)
    ends, angles = torch.tensor([0, 600, 1200], dtype=torch.int32), torch.randn(1200, 64)
    block = model.model.visual.blocks[0]

    def forward():
        return block(patches, cu_seqlens=ends, position_embeddings=(angles, angles))

    measured = kept_bytes(forward, model.parameters())
    shape = shape_from_config(config).vision
    assert measured == pytest.approx(1200 * block_bytes(shape, value), rel=0.08)


@pytest.mark.parametrize(("dtype", "value"), DTYPES)
def test_a_block_of_internvl_s_tower_keeps_what_the_plan_says(dtype, value):
    config = internvl_config(1)
    model = build(config, dtype)
    patches = torch.randn(5, 65, 256, dtype=dtype, requires_grad=True)
    block = model.model.vision_tower.encoder.layer[0]
    measured = kept_bytes(lambda: block(patches), model.parameters())
    shape = shape_from_config(config).vision
    assert measured == pytest.approx(5 * 65 * block_bytes(shape, value), rel=0.01)


def allocated_bytes(act: Callable[[], object]) -> int:
    """The largest sum of CPU memory that PyTorch allocates during act, above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        act()
    events = profiled.profiler.kineto_results.events()
    sizes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = held = 0
    for _, size in sizes:
        held += size
        peak = max(peak, held)
    return peak


def test_the_chunked_head_takes_what_the_plan_says_without_a_gpu():
    rows, width, vocabulary = 200, 16, 40_000  # more than one chunk
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.arange(rows)

    def score():
        options = (1.0, VOCABULARY_CHUNK, None, 1.0, ())
        logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, *options)
        logps.sum().backward()

    tile = TILE_COPIES_CPU * rows * VOCABULARY_CHUNK * 4
    gradients = 4 * width * (rows + vocabulary)
    assert allocated_bytes(score) == pytest.approx(tile + gradients, rel=0.01)
