"""Loading of checkpoints: model and processor by family, with clear errors; no remote code, nothing
from a hub here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel, ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import VIDEO_PROCESSOR_NAME
from transformers.video_processing_utils import BaseVideoProcessor

from egm_lib.errors import InputError
from egm_lib.prompts import FAMILIES

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Qwen3VLProcessor(transformers.Qwen3VLProcessor):
    """Qwen3-VL's processor without its video half, which needs torchvision.

    It bears the public name because checkpoints state it, and are to be read by those who do not
    have this class.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class InternVLProcessor(transformers.InternVLProcessor):
    """InternVL-3's, likewise. image_seq_length: tokens of a tile."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        image_seq_length=256,
        chat_template=None,
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            None,
            image_seq_length,
            chat_template=chat_template,
            **kwargs,
        )

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def _present(path: str | Path) -> str:
    """The path as transformers wants it; a local folder must hold a checkpoint, a hub name may need
    the network.
    """
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

    dtype: one of DTYPES. Raises FileNotFoundError where a local folder has no checkpoint,
    ValueError on another dtype.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    model = AutoModelForImageTextToText.from_pretrained(
        _present(path), dtype=DTYPES[dtype], **kwargs
    )
    return model.eval()


def image_token_ids(config) -> tuple[int, ...]:
    """Tokens of a model's vocabulary that stand for images and videos: an answer with one cannot
    be read again.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return tuple(
        sorted({getattr(config, name) for name in names if getattr(config, name, None) is not None})
    )


def load_processor(
    path: str | Path, family: str, max_pixels: int | None = None, revision: str | None = None
) -> ProcessorMixin:
    """The processor (chat template, tokenizer, images) of a checkpoint; the same one with and
    without torchvision.

    max_pixels: as in `limit_pixels`. revision: of the hub's.
    """
    processor = _processor(path, family, {} if revision is None else {"revision": revision})
    limit_pixels(processor, family, max_pixels)
    return processor


def limit_pixels(processor: ProcessorMixin, family: str, max_pixels: int | None) -> None:
    """Lets a processor shrink Qwen3-VL's images to at most max_pixels; None: as it does already.

    A limit that the processor has already is never raised. Its least size stays if it is below
    max_pixels. Otherwise the least size becomes one token, so that no image is enlarged to the
    limit.
    Raises InputError for InternVL-3, which cuts images into tiles of one size.
    """
    if max_pixels is None:
        return
    if family != "qwen3-vl":
        raise InputError(f"max_pixels is for Qwen3-VL, not for {family}: set it to null")
    images = processor.image_processor
    least = images.size["shortest_edge"]
    if least >= max_pixels:
        least = (images.patch_size * images.merge_size) ** 2
    most = min(max_pixels, images.size["longest_edge"])
    images.size = type(images.size)(shortest_edge=least, longest_edge=most)


def _processor(path: str | Path, family: str, hub: dict) -> ProcessorMixin:
    if family not in FAMILIES:
        raise InputError(f"unknown model family {family!r}: use one of {', '.join(FAMILIES)}")
    place, kind = (
        _present(path),
        {"qwen3-vl": Qwen3VLProcessor, "internvl-3": InternVLProcessor}[family],
    )
    stated, _ = kind.get_processor_dict(place, **hub)
    tokenizer = AutoTokenizer.from_pretrained(place, **hub)
    # Qwen3-VL's may stand with the processor alone
    template = stated.get("chat_template") or tokenizer.chat_template
    if family == "internvl-3":
        images = GotOcr2ImageProcessorPil.from_pretrained(place, **hub)
        return InternVLProcessor(
            images, tokenizer, stated["image_seq_length"], chat_template=template
        )
    images = Qwen2VLImageProcessorPil.from_pretrained(place, **hub)
    return Qwen3VLProcessor(images, tokenizer, chat_template=template)


def video_half(place: str | Path) -> dict | None:
    """What a checkpoint states of videos; None where it states nothing."""
    try:
        stated, _ = BaseVideoProcessor.get_video_processor_dict(place)
    except OSError:
        return None
    # Transformers falls back
    of_images = "image_processor_type" in stated and "video_processor_type" not in stated
    return None if of_images else stated


def save_processor(processor: ProcessorMixin, folder: Path, videos: dict | None) -> None:
    """Writes a checkpoint's processor. videos: of `video_half`; we never load it, but vLLM refuses
    to start without.
    """
    processor.save_pretrained(folder)
    if videos:
        text = json.dumps(videos, indent=2, sort_keys=True)
        (folder / VIDEO_PROCESSOR_NAME).write_text(text + "\n", encoding="utf-8")
