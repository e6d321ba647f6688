"""The miniature's word-level tokenizer: Qwen's special tokens, and long pieces for fixed phrases.

Decoding an encoded text of known words gives the same text. Numbers are the multiples of 20 in
0..1000, each a single token in four spellings (`420`, `, 420`, ` 420`, ` at 420`), so that a box
takes four tokens and a place two.
"""

from __future__ import annotations

import re
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from egm_lib.mini.language import WORDS

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<unk>",
]
# Not special: they survive skip_special_tokens, as in Qwen's own tokenizer
THINK = ["<think>", "</think>"]
PIECES = [
    ", output its bbox coordinates using JSON format.",
    ", output their bbox coordinates using JSON format.",
    '```json\n[\n\t{"bbox_2d": [',
    ']},\n\t{"bbox_2d": [',
    "]}\n]\n```",
    "user\n",
    "assistant\n",
    "\n\n",
    "\n",
]
NUMBERS = [str(n) for n in range(0, 1001, 20)]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}{{ '<think>\n' }}{% endif -%}"
    "{%- if message.content is string %}{{ message.content }}{% else %}{% for part in "
    "message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == "
    "'text' %}"
    "{{ part.text }}{% endif %}{% endfor %}{% endif -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif -%}"
)
_PATTERN = "|".join(
    [*map(re.escape, PIECES), r" at \d+", r"[ ,]* ?\d+(?!\w)", r" ?\w+", r" ?[^\w\s]", r"\s"]
)


@cache
def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with every word that egm_lib.mini.language can say."""
    punctuation = [*".,:;?()[]{}\"'-", " ", "\t", " ["]
    spellings = [prefix + n for prefix in ("", ", ", " ", " at ") for n in NUMBERS]
    words = [prefix + w for w in sorted(WORDS) for prefix in ("", " ")]
    vocabulary = list(dict.fromkeys([*SPECIAL, *THINK, *PIECES, *spellings, *punctuation, *words]))
    core = Tokenizer(
        models.WordLevel({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in THINK])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        model_max_length=2048,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
