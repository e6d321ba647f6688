"""Tiny Qwen3-VL configurations: one vision tower, language models of three sizes.

All have the same width, so that tower, mergers and embeddings are the same tensors in all. Only
the language models' depth and MLP differ.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from egm_lib.inference.loading import Qwen3VLProcessor, save_processor
from egm_lib.mini.scenes import SIZE_PX
from egm_lib.mini.tokens import build_tokenizer

PATCH_PX, MERGE, WIDTH = 8, 2, 128
CELLS = SIZE_PX // (PATCH_PX * MERGE)  # merged cells per side: 8 x 8 = 64 image tokens
LANGUAGE = {
    "small": {"num_hidden_layers": 3, "intermediate_size": 256},
    "large": {"num_hidden_layers": 6, "intermediate_size": 768},
    # 16 times the language parameters of small, as the paper's 235B has 29 times those of its 8B
    "huge": {"num_hidden_layers": 12, "intermediate_size": 1600},
}


def config(size: str, tokenizer) -> Qwen3VLConfig:
    """The configuration of a size of LANGUAGE for a tokenizer with Qwen's vision tokens."""
    ids = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        vision_config={
            "depth": 4,
            "hidden_size": WIDTH,
            "num_heads": 4,
            "intermediate_size": 384,
            "patch_size": PATCH_PX,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": WIDTH,
            "num_position_embeddings": (SIZE_PX // PATCH_PX) ** 2,
            "deepstack_visual_indexes": [1, 2],
            "initializer_range": 0.04,
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 2048,
            "initializer_range": 0.04,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **LANGUAGE[size],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def build(size: str, tokenizer, seed: int) -> Qwen3VLForConditionalGeneration:
    """A randomly initialised model of a size; the last layers of its deepstack are zero."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config(size, tokenizer))
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
        torch.nn.init.zeros_(merger.linear_fc2.bias)
    return model


def patchify(images_B_H_W_3: np.ndarray) -> Tensor:
    """uint8 images -> pixel_values_B_P_D in the order of Qwen's image processor.

    Patches are in the order of merge blocks; D is C, T, h, w.
    """
    batch, side = len(images_B_H_W_3), SIZE_PX // PATCH_PX // MERGE
    x = torch.from_numpy(images_B_H_W_3).float().div_(127.5).sub_(1.0).permute(0, 3, 1, 2)
    x = x.reshape(batch, 3, side, MERGE, PATCH_PX, side, MERGE, PATCH_PX)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # B, block row, block column, row, column, C, h, w
    # The two temporal copies of a still image
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    return x.reshape(batch, side * side * MERGE * MERGE, -1)


def encode_images(visual, pixel_values_B_P_D: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The tower on a batch of images of one size: merged_B_64_W and deepstack features.

    It computes what `visual(...)` does, whose attention loops over images; as one batch this is
    about 3 times as fast.
    """
    batch, patches, _ = pixel_values_B_P_D.shape
    side = SIZE_PX // PATCH_PX
    grid = torch.tensor([[1, side, side]])
    from transformers.models.qwen3_vl import modeling_qwen3_vl as hf

    index, weight = hf.get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=visual.num_grid_per_side,
        mode=visual.interpolation_mode,
        align_corners=visual.interpolation_align_corners,
        spatial_merge_size=MERGE,
        kwargs={},
    )
    # Kernel = stride: the convolution is a linear map of each patch
    embed = visual.patch_embed.proj
    x = torch.nn.functional.linear(pixel_values_B_P_D, embed.weight.flatten(1), embed.bias)
    x = x + (visual.pos_embed(index) * weight[:, :, None]).sum(1).to(x.dtype)
    cos, sin = visual.rotary_pos_emb(x, hf.get_vision_position_ids(grid, MERGE, kwargs={}))
    deepstack = []
    for number, block in enumerate(visual.blocks):
        attention = block.attn
        q, k, v = (
            attention.qkv(block.norm1(x)).view(batch, patches, 3, attention.num_heads, -1).unbind(2)
        )
        q, k = hf.apply_rotary_pos_emb_vision(q, k, cos, sin)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=attention.scaling
        )
        x = x + attention.proj(mixed.transpose(1, 2).reshape(batch, patches, -1))
        x = x + block.mlp(block.norm2(x))
        if number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            deepstack.append(merger(x).view(batch, patches // MERGE**2, -1))
    return visual.merger(x).view(batch, patches // MERGE**2, -1), deepstack


def processor(tokenizer):
    """The miniature's processor: images of exactly SIZE_PX square, no resizing."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    area = SIZE_PX * SIZE_PX
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH_PX,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": area, "longest_edge": area},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return Qwen3VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def save(model, folder) -> None:
    """Writes a checkpoint with tokenizer, processor and generation defaults."""
    tokenizer = build_tokenizer()
    model.model.language_model.config._attn_implementation = "sdpa"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    videos = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "patch_size": PATCH_PX,
        "merge_size": MERGE,
    }
    save_processor(processor(tokenizer), Path(folder), videos | {"temporal_patch_size": 2})
