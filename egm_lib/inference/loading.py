"""Loading of checkpoints: configuration, model and processor by family, with clear errors.

Code that a checkpoint brings is never run: `trust_remote_code` is False in every call that takes
it, so that nothing is asked at a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import VIDEO_PROCESSOR_NAME
from transformers.video_processing_utils import BaseVideoProcessor

from egm_lib.errors import InputError
from egm_lib.inference.model_folder import (
    COPY_AGAIN,
    Checkpoint,
    check_plain,
    check_processor,
    check_weights,
    find_checkpoint,
)

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


def load_config(path: str | Path, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a checkpoint; a LoRA adapter's is that of its base.

    Raises as `find_checkpoint` does, and InputError for values that transformers refuses.
    """
    return _config(find_checkpoint(path, revision))


def _config(found: Checkpoint) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(found.place, trust_remote_code=False, **found.hub)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the config.json of {found.place} cannot be used ({reason}): {COPY_AGAIN}"
        ) from error


def avoid_cudnn_defaults() -> None:
    """Has PyTorch compute without two defaults of cuDNN, in all of this process.

    Its attention, the first choice on an H100, has a backward pass whose gradients are no numbers
    for some lengths with a mask (pytorch#196678). It also prepares each new length anew, and every
    decoded token is one. And float32 convolutions, which cut an image into patches, would be
    rounded to TF32.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.allow_tf32 = False


def load_model(
    path: str | Path,
    dtype: str = "float32",
    *,
    family: str | None = None,
    revision: str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """The vision-language model stored at a path or under a hub id, in eval mode.

    A LoRA adapter is merged into its base.
    dtype: one of DTYPES. family: the one that it must be of; None: any. revision: of a hub id.
    Raises FileNotFoundError where a local folder has no checkpoint, InputError on another dtype and
    for a checkpoint that cannot be used.
    """
    if dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    avoid_cudnn_defaults()
    found = find_checkpoint(path, revision, family)
    check_plain(found)
    check_weights(found)
    model, report = AutoModelForImageTextToText.from_pretrained(
        found.place,
        config=_config(found),
        dtype=DTYPES[dtype],
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
        **found.hub,
        **kwargs,
    )
    # transformers draws such weights at random, with a warning
    drawn = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if drawn:
        raise InputError(
            f"{found.place} lacks {len(drawn)} of the weights that its config.json describes, or "
            f"holds them in another size, such as {drawn[0]}: weights and config.json belong to "
            "different models; copy both again"
        )
    _keep_names(model)
    return (model if found.adapter is None else _merged(model, found.adapter)).eval()


def _keep_names(model: PreTrainedModel) -> None:
    """Has a model that is saved later give its weights the names that they had when it was loaded.

    transformers undoes, as it saves, how it renamed weights as it loaded. Under ZeRO-3 (in 5.23) it
    also undoes renamings that no weight needed, which leaves names that vLLM does not know.
    """
    if renamings := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [each for each in renamings if each.was_used()]


def _merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a LoRA adapter merged into its weights."""
    from peft import LoraConfig, PeftModel

    try:
        with_adapter = PeftModel(model, LoraConfig.from_pretrained(str(adapter)))
        report = with_adapter.load_adapter(str(adapter), "default", use_safetensors=True)
        unused = [*report.missing_keys, *report.unexpected_keys]
        if unused:
            raise ValueError(f"{len(unused)} weights have no place there, such as {unused[0]}")
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"the LoRA adapter in {adapter} does not fit its base {model.name_or_path} "
            f"({str(error).strip().splitlines()[0]}): name the base that it was trained on in its "
            "adapter_config.json"
        ) from error
    return with_adapter.merge_and_unload()


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

    A LoRA adapter's is that of its base.
    max_pixels: as in `limit_pixels`. revision: of the hub's.
    Raises as `find_checkpoint` and `limit_pixels` do, and InputError where a file is missing.
    """
    processor = _processor(path, family, revision)
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


def _processor(path: str | Path, family: str, revision: str | None) -> ProcessorMixin:
    found = find_checkpoint(path, revision, family)
    place, hub = found.place, found.hub
    if found.folder is not None:
        check_processor(found, found.folder)
    kind = {"qwen3-vl": Qwen3VLProcessor, "internvl-3": InternVLProcessor}[family]
    stated, _ = kind.get_processor_dict(place, **hub)
    tokenizer = _tokenizer(place, hub)
    # Qwen3-VL's may stand with the processor alone
    template = stated.get("chat_template") or tokenizer.chat_template
    if not template:
        raise InputError(
            f"{place} has no chat template: copy chat_template.jinja (or chat_template.json) from "
            "the model that it was made from"
        )
    if family == "internvl-3":
        images = GotOcr2ImageProcessorPil.from_pretrained(place, **hub)
        return InternVLProcessor(
            images, tokenizer, stated["image_seq_length"], chat_template=template
        )
    images = Qwen2VLImageProcessorPil.from_pretrained(place, **hub)
    return Qwen3VLProcessor(images, tokenizer, chat_template=template)


def _tokenizer(place: str, hub: dict) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, **hub)
    except OSError:
        raise  # says it in one sentence
    except Exception as error:  # the Rust library's errors have no class of their own
        raise InputError(
            f"the tokenizer of {place} cannot be read ({error}): copy its files again from the "
            "model that it was made from"
        ) from error


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
