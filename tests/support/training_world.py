"""What training tests use: a tiny model in a folder, and images with one coloured square each."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen

from egm_lib.inference.loading import load_model, load_processor, save_processor
from egm_lib.profile import GRPO, SFT

SIZE_PX = 64
VIDEOS = {
    "qwen3-vl": {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 8, "merge_size": 2},
    "internvl-3": {"video_processor_type": "InternVLVideoProcessor"},
}


def store_model(folder: Path, family: str = "qwen3-vl") -> Path:
    model, processor = {"qwen3-vl": tiny_qwen, "internvl-3": tiny_internvl}[family]()
    model.save_pretrained(folder)
    save_processor(processor, folder, VIDEOS[family])
    # With the chat template, as the shipped checkpoints have it
    processor.tokenizer.save_pretrained(folder)
    return folder


def stored(folder: Path, family: str = "qwen3-vl"):
    """(model, processor) of a folder. The folder is the model's name, as TRL's reference needs."""
    return load_model(folder), load_processor(folder, family)


def moved_names(before: Path, after: Path) -> set[str]:
    """Names of the weights that differ between two stored models."""
    old, new = (load_model(folder).state_dict() for folder in (before, after))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def make_samples(folder: Path, images: int = 4, per_image: int = 2) -> list[dict]:
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(images):
        pixels = np.random.default_rng(number).integers(
            0, 60, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8
        )
        left, top = 4 + 6 * number, 8 + 4 * number
        pixels[top : top + 20, left : left + 20] = (250, 40 * number, 10)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        for question in range(per_image):
            samples.append(
                {
                    "sample_id": f"{number}-{question}",
                    "image": f"{number}.png",
                    "image_id": str(number),
                    "width": SIZE_PX,
                    "height": SIZE_PX,
                    "expression": f"square {question}",
                    "task": "vanilla",
                    "gt_box": [left, top, left + 20, top + 20],
                    "modal_box": None,
                    "reasoning": "it is red" + " !" * question,
                }
            )
    return samples


def sft_options(**changes) -> SFT:
    values = dict(
        num_train_epochs=10.0,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        freeze_vision=True,
        freeze_merger=True,
        dtype="float32",
        dataloader_num_workers=0,
    )
    return SFT(**values | changes)


def grpo_options(**changes) -> GRPO:
    values = dict(
        num_train_epochs=1000.0,
        max_steps=2,
        prompts_per_step=4,
        num_generations=4,
        per_device_train_batch_size=8,
        beta=0.01,
        epsilon=0.2,
        entropy_coef=0.0,
        reward_weight=0.5,
        ratio_level="token",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_completion_length=8,
        temperature=1.0,
        top_p=1.0,
        top_k=None,
        rollout="transformers",
        freeze_vision=True,
        freeze_merger=True,
        dtype="float32",
        rollout_dtype="float32",
    )
    return GRPO(**values | changes)


def as_on_a_gpu(monkeypatch, module):
    """Has a trainer's module ask for gradient checkpointing, as it does where it sees a GPU."""
    options = module.common_options
    monkeypatch.setattr(
        module, "common_options", lambda *args: options(*args) | {"activation_checkpointing": True}
    )
