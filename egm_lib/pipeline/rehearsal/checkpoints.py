"""Checkpoints of random weights in the form of Qwen3-VL and InternVL-3.

Real: token ids, vocabulary size, chat template, image processing, generation defaults, names of
files. Tiny: widths and depths. Files are written as the hub has them, for the loaders to read. The
same seed gives the same files.

The weights are random, and then fitted for some seconds to the family's answer form (`fitting`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from egm_lib.files import digest
from egm_lib.inference.loading import load_processor
from egm_lib.pipeline.rehearsal.fitting import fit_answers
from egm_lib.pipeline.rehearsal.tokenizer import write_internvl3_tokenizer, write_qwen3vl_tokenizer
from egm_lib.prompts import FAMILIES, FamilyName

HEAD_DIM = 32  # the least that vLLM's attention takes on every device
VOCAB_SIZE = 151_936  # of Qwen3-VL: more rows than tokens
INTERNVL_VOCAB_SIZE = 151_674  # of InternVL-3: `<video>`, 151674, has no row
# Ten times the usual, so that attention and positions matter: a misplaced image changes the output.
INIT_RANGE = 0.2
TILE_PX, PATCH_PX = 56, 14  # InternVL-3 has tiles of 448 px
TILE_TOKENS = (TILE_PX // PATCH_PX // 2) ** 2
# What a stand-in is made by
_SOURCES = ("annotations.py", "checkpoints.py", "fitting.py", "tokenizer.py")
END_IDS = (151_645, 151_643)  # <|im_end|>, <|endoftext|>

_HEADER = "{{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
_INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif part.type == 'video' %}{{ '<video>\n' }}{% elif part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_qwen3vl(
    folder: str | Path,
    *,
    thinking: bool = True,
    hidden_size: int = 64,
    num_layers: int = 2,
    seed: int = 0,
) -> Path:
    """Makes a Qwen3-VL in `folder`; a finished one is left as it is.

    thinking: with the chat template that opens `<think>`; else as Instruct. Returns folder.
    """
    with _whole(Path(folder)) as work:
        if work is not None:
            template = qwen3vl_template(thinking)
            write_qwen3vl_tokenizer(work, template)
            _write_json(work / "chat_template.json", {"chat_template": template})
            _write_qwen3vl_processor(work)
            config = _qwen3vl_config(hidden_size, num_layers)
            kind = Qwen3VLForConditionalGeneration
            _write_weights(work, kind, config, "qwen3-vl", seed, thinking=thinking)
            sampling = (
                {"temperature": 1.0, "top_p": 0.95}
                if thinking
                else {"temperature": 0.7, "top_p": 0.8}
            )
            _write_generation_config(
                work, {"do_sample": True, "top_k": 20, "repetition_penalty": 1.0, **sampling}
            )
    return Path(folder)


def make_internvl3(
    folder: str | Path, *, hidden_size: int = 64, num_layers: int = 2, seed: int = 0
) -> Path:
    """Makes an InternVL-3 in `folder`; a finished one is left as it is. Returns folder.

    An image becomes as many tiles as in the real one, of 56 px instead of 448.
    """
    with _whole(Path(folder)) as work:
        if work is not None:
            write_internvl3_tokenizer(work, _INTERNVL_TEMPLATE)
            _write_json(work / "chat_template.json", {"chat_template": _INTERNVL_TEMPLATE})
            _write_internvl3_processor(work)
            config = _internvl3_config(hidden_size, num_layers)
            _write_weights(work, InternVLForConditionalGeneration, config, "internvl-3", seed)
            _write_generation_config(work, {})
    return Path(folder)


def qwen3vl_template(thinking: bool) -> str:
    """TRL ships the template of Qwen3-VL Instruct; that of Thinking begins the reasoning itself."""
    trl = Path(find_spec("trl").origin).parent  # importing it takes a second
    plain = (trl / "chat_templates" / "qwen3_vl.jinja").read_text(encoding="utf-8")
    if not plain.rstrip().endswith(_HEADER):
        raise ValueError("TRL's template qwen3_vl.jinja no longer ends with the assistant's header")
    if not thinking:
        return plain
    return plain.rstrip().removesuffix(_HEADER) + _HEADER.replace(
        "assistant\\n", "assistant\\n<think>\\n"
    )


@contextmanager
def _whole(folder: Path) -> Iterator[Path | None]:
    """A folder to fill, which takes its name when it is full; None where it is full already.

    One that an earlier version of the stand-ins filled is filled anew.
    """
    version = digest([Path(__file__).with_name(name).read_text("utf-8") for name in _SOURCES])
    stamp = folder / "standin.txt"
    if stamp.is_file() and stamp.read_text() == version:
        yield None
        return
    work = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    yield work
    (work / stamp.name).write_text(version)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(work, folder)


def _qwen3vl_config(hidden_size: int, num_layers: int) -> Qwen3VLConfig:
    heads = hidden_size // HEAD_DIM
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2 * heads,  # wider than the hidden size, as in Qwen3
            "num_key_value_heads": heads,
            "head_dim": HEAD_DIM,
            "initializer_range": INIT_RANGE,
            "max_position_embeddings": 262_144,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5_000_000.0,
                "mrope_interleaved": True,
                "mrope_section": [
                    6,
                    5,
                    5,
                ],  # together HEAD_DIM / 2; the real one has [24, 20, 20] of 128 / 2
            },
            "bos_token_id": END_IDS[1],
            "eos_token_id": END_IDS[0],
        },
        vision_config={
            "depth": num_layers,
            "hidden_size": hidden_size,
            "num_heads": heads,
            "intermediate_size": 2 * hidden_size,
            "out_hidden_size": hidden_size,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [num_layers - 1],
            "initializer_range": INIT_RANGE,
        },
        tie_word_embeddings=False,  # as the 8B
    )


def _internvl3_config(hidden_size: int, num_layers: int) -> InternVLConfig:
    heads = hidden_size // HEAD_DIM
    return InternVLConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": INTERNVL_VOCAB_SIZE,
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "initializer_range": INIT_RANGE,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
            "bos_token_id": END_IDS[1],
            "eos_token_id": END_IDS[0],
        },
        vision_config={
            "hidden_size": hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": heads,
            "intermediate_size": 2 * hidden_size,
            "image_size": [TILE_PX, TILE_PX],
            "patch_size": [PATCH_PX, PATCH_PX],
            "initializer_range": INIT_RANGE,
        },
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
    )


def _write_weights(
    folder: Path,
    kind: type[PreTrainedModel],
    config,
    family: FamilyName,
    seed: int,
    *,
    thinking: bool = True,
) -> None:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = kind(config)
        config.save_pretrained(folder)  # the processor's loader asks for it
        processor = load_processor(folder, family)
        fit_answers(model, processor, FAMILIES[family], thinking=thinking, seed=seed)
    model.to(torch.bfloat16).save_pretrained(folder)


def _write_generation_config(folder: Path, options: dict) -> None:
    ids = {"bos_token_id": END_IDS[1], "eos_token_id": list(END_IDS), "pad_token_id": END_IDS[1]}
    _write_json(folder / "generation_config.json", ids | options)


def _write_qwen3vl_processor(folder: Path) -> None:
    common = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "merge_size": 2,
        "patch_size": 16,
        "processor_class": "Qwen3VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "temporal_patch_size": 2,
    }
    image = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    }
    video = {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
        "do_sample_frames": True,
        "fps": 2,
        "max_frames": 768,
        "min_frames": 4,
    }
    _write_json(folder / "preprocessor_config.json", common | image)
    _write_json(folder / "video_preprocessor_config.json", common | video)


def _write_internvl3_processor(folder: Path) -> None:
    common = {
        "crop_to_patches": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "processor_class": "InternVLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE_PX, "width": TILE_PX},
    }
    image = {
        "image_processor_type": "GotOcr2ImageProcessorFast",
        "max_patches": 12,
        "min_patches": 1,
    }
    video = {"video_processor_type": "InternVLVideoProcessor", "crop_to_patches": False}
    _write_json(folder / "preprocessor_config.json", common | image)
    _write_json(folder / "video_preprocessor_config.json", common | video)
    stated = {"image_seq_length": TILE_TOKENS, "processor_class": "InternVLProcessor"}
    _write_json(folder / "processor_config.json", stated)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
