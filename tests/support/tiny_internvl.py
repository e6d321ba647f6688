"""A tiny InternVL-3 with random weights and bytes as vocabulary, built in memory in a second."""

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from egm_lib.inference.loading import InternVLProcessor

IMAGE = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *IMAGE.values()]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% "
    "endif %}"
)
TILE_PX, TILE_TOKENS = 32, 4


def tiny_internvl(seed: int = 0):
    """(model, processor) with 2 layers. An image becomes one or more tiles of 4 tokens."""
    vocab = {token: index for index, token in enumerate([*sorted(ByteLevel.alphabet()), *SPECIAL])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[],
        unk_token=None,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        extra_special_tokens=IMAGE,
        additional_special_tokens=SPECIAL[1:2],
        chat_template=TEMPLATE,
    )
    token_id = tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 96,
            "initializer_range": 0.2,
            "eos_token_id": token_id(SPECIAL[2]),
            "pad_token_id": token_id(SPECIAL[0]),
            "tie_word_embeddings": True,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "image_size": [TILE_PX, TILE_PX],
            "patch_size": [8, 8],
            "initializer_range": 0.2,
        },
        image_token_id=token_id("<IMG_CONTEXT>"),
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = token_id(SPECIAL[2])
    model.generation_config.pad_token_id = token_id(SPECIAL[0])
    images = GotOcr2ImageProcessorPil(
        size={"height": TILE_PX, "width": TILE_PX},
        crop_to_patches=True,
        min_patches=1,
        max_patches=4,
    )
    return model, InternVLProcessor(images, tokenizer, TILE_TOKENS, chat_template=TEMPLATE)
