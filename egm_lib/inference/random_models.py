"""Models in the shapes of the paper's, with random weights: they take as long as the real ones.

What a model costs does not depend on what its weights know, so latency can be measured without
them. Nothing is read from a hub.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
)

from egm_lib.inference.loading import avoid_cudnn_defaults
from egm_lib.model_shapes import InternVision, ModelShape

RANDOM_BLOCK = 2**20  # random values that all weights are filled with, again and again


def cut(shape: ModelShape, share: int) -> ModelShape:
    """The shape with one of `share` layers of the language model and of the vision tower.

    The embedding and the head stay whole. Measure such a model as itself: its time times `share` is
    not the time of the whole one.
    """
    if share == 1:
        return shape
    text = replace(shape.text, layers=max(4, shape.text.layers // share))
    vision = replace(shape.vision, depth=max(4, shape.vision.depth // share))
    return replace(shape, text=text, vision=vision)


def config_of(shape: ModelShape) -> PreTrainedConfig:
    """transformers' configuration of a shape."""
    text, vision = shape.text, shape.vision
    sizes = {
        "vocab_size": text.vocabulary,
        "hidden_size": text.hidden,
        "num_hidden_layers": text.layers,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.kv_heads,
        "intermediate_size": text.intermediate,
        "max_position_embeddings": text.context,
    }
    if text.experts:
        sizes |= {
            "num_experts": text.experts,
            "num_experts_per_tok": text.active_experts,
            "moe_intermediate_size": text.intermediate,
        }
    if text.qk_norm:
        sizes["head_dim"] = text.head_dim
    if isinstance(vision, InternVision):
        kind = {"model_type": "qwen3_moe" if text.experts else "qwen2"}
        tower = {
            "num_hidden_layers": vision.depth,
            "hidden_size": vision.hidden,
            "intermediate_size": vision.intermediate,
            "num_attention_heads": vision.heads,
            "attention_bias": vision.attention_bias,
            "use_qk_norm": vision.qk_norm,
            "norm_type": "rms_norm" if vision.rms_norm else "layer_norm",
        }
        return InternVLConfig(
            text_config=sizes | kind, vision_config=tower, tie_word_embeddings=text.tied
        )
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_heads": vision.heads,
        "out_hidden_size": vision.out_hidden,
        # Three layers whose features enter the language model, spread over the tower
        "deepstack_visual_indexes": [vision.depth * (n + 1) // 4 for n in range(vision.deepstack)],
    }
    kind = Qwen3VLMoeConfig if text.experts else Qwen3VLConfig
    return kind(text_config=sizes, vision_config=tower, tie_word_embeddings=text.tied)


def random_model(
    shape: ModelShape, dtype: torch.dtype, device: str | torch.device
) -> PreTrainedModel:
    """A model of a shape in eval mode; every weight is written, so that its memory is really
    read."""
    avoid_cudnn_defaults()  # as for models that are loaded
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(shape), dtype=dtype)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device=device).manual_seed(0)
    block = torch.randn(RANDOM_BLOCK, generator=generator, device=device).mul_(0.02).to(dtype)
    for parameter in model.parameters():
        _fill(parameter.data.view(-1), block)
    for module in model.modules():  # rotary frequencies are buffers, which the meta device lacks
        if hasattr(module, "inv_freq"):
            _fill(module.inv_freq.view(-1), block.abs().float())
    return model.eval()


def _fill(values: Tensor, block: Tensor) -> None:
    for start in range(0, len(values), len(block)):
        part = values[start : start + len(block)]
        part.copy_(block[: len(part)])


def random_inputs(
    model: PreTrainedModel,
    shape: ModelShape,
    image_wh: tuple[int, int],
    prompt_tokens: int,
    requests: int,
) -> dict[str, Tensor]:
    """What a processor returns for so many requests: an image of image_wh each, then words."""
    vision, config, device = shape.vision, model.config, model.device
    image_tokens = vision.image_tokens(*image_wh)
    ids_T = torch.full((image_tokens + prompt_tokens,), config.image_token_id, device=device)
    ids_T[image_tokens:] = 1000  # any word
    ids_N_T = ids_T.expand(requests, -1).contiguous()
    inputs = {"input_ids": ids_N_T, "attention_mask": torch.ones_like(ids_N_T)}
    if isinstance(vision, InternVision):
        count = requests * image_tokens // vision.tile_tokens
        size = (count, 3, vision.tile, vision.tile)
    else:
        # All tokens in one row: as many patches, whatever the processor's resize makes of image_wh
        grid = [1, vision.merge, vision.merge * image_tokens]
        inputs["image_grid_thw"] = torch.tensor([grid] * requests, device=device)
        inputs["mm_token_type_ids"] = (ids_N_T == config.image_token_id).int()
        patches = requests * vision.tower_tokens(image_tokens)
        size = (patches, 3 * vision.temporal_patch * vision.patch**2)
    inputs["pixel_values"] = torch.rand(size, device=device).to(model.dtype)
    return inputs
