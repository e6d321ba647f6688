"""Loading of checkpoints: model and processor by family, with clear errors; no remote code, nothing from a hub here."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    InternVLProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen3VLProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from egm_lib.prompts import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class PictureProcessor(Qwen3VLProcessor):
    """Qwen3-VL's processor without its video half, which needs torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class TileProcessor(InternVLProcessor):
    """InternVL-3's processor without its video half, which needs torchvision. image_seq_length: tokens of a tile."""

    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=256, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, image_seq_length, chat_template=chat_template, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def _present(path: str | Path) -> str:
    """The path as transformers wants it; a local folder must hold a checkpoint, a hub name may need the network."""
    text = str(path)
    looks_local = text.startswith((".", "/", "data/")) or os.sep in text and Path(text).exists()
    if looks_local and not (Path(text) / "config.json").is_file():
        raise FileNotFoundError(
            f"no checkpoint in {text} (config.json is missing): run the stage that makes it, "
            "or restore the shipped one with `git checkout -- data/mini`"
        )
    return text


def load_model(path: str | Path, dtype: str = "float32", **kwargs) -> PreTrainedModel:
    """The vision-language model stored at a path or under a hub name, in eval mode.

    dtype: one of DTYPES. Raises FileNotFoundError where a local folder has no checkpoint, ValueError on another dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    model = AutoModelForImageTextToText.from_pretrained(_present(path), dtype=DTYPES[dtype], **kwargs)
    return model.eval()


def load_processor(
    path: str | Path, family: str, max_pixels: int | None = None, revision: str | None = None
) -> ProcessorMixin:
    """The processor (chat template, tokenizer, pictures) of a checkpoint; the same one with and without torchvision.

    max_pixels: Qwen3-VL's pictures are shrunk to at most so many; None: as the checkpoint says. revision: of the hub's.
    """
    processor = _processor(path, family, {} if revision is None else {"revision": revision})
    if max_pixels is not None:
        size = processor.image_processor.size
        smallest = min(size["shortest_edge"], max_pixels)
        processor.image_processor.size = type(size)(shortest_edge=smallest, longest_edge=max_pixels)
    return processor


def _processor(path: str | Path, family: str, hub: dict) -> ProcessorMixin:
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}: use one of {', '.join(FAMILIES)}")
    place, kind = _present(path), {"qwen3-vl": PictureProcessor, "internvl-3": TileProcessor}[family]
    stated, _ = kind.get_processor_dict(place, **hub)
    tokenizer = AutoTokenizer.from_pretrained(place, **hub)
    template = stated.get("chat_template") or tokenizer.chat_template  # Qwen3-VL's may stand with the processor alone
    if family == "internvl-3":
        pictures = GotOcr2ImageProcessorPil.from_pretrained(place, **hub)
        return TileProcessor(pictures, tokenizer, stated["image_seq_length"], chat_template=template)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(place, **hub)
    return PictureProcessor(pictures, tokenizer, chat_template=template)
