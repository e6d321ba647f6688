"""What `egm_lib.training.plan` predicts beside what a real step takes: peak memory on this CPU.

    python benchmarks/bench_plan.py                    # every case
    python benchmarks/bench_plan.py grpo --size 0.1b

A case is two steps, of two passes each, of the trainer that a stage really uses, in a process of
its own. Its peak is the process's largest resident memory, less that of the same training of a tiny
model: Python, libraries and samples. Models have random weights, Qwen3-VL's vocabulary, and shapes
of their own. Images are of 640 x 480 px, 300 tokens.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from egm_lib import grpo, sft
from egm_lib.inference.loading import Qwen3VLProcessor
from egm_lib.mini.models import config as mini_config
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.model_shapes import shape_from_config
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.training.hardware import GIB, hardware
from egm_lib.training.model_setup import load_start
from egm_lib.training.plan import Plan, make_setting
from egm_lib.training.plan_memory import Row, fullest
from egm_lib.training.sft_trainers import PlainCollator

# Width, layers, heads, keys, width of the MLP, and whether the head is the embedding
SIZES = {
    "tiny": (128, 1, 1, 1, 128, True),  # what stays when the model is taken away
    "0.1b": (512, 6, 4, 2, 1536, True),
    "0.2b": (768, 8, 6, 2, 2304, True),
    "0.3b": (768, 8, 6, 2, 2304, False),
}
CASES = (
    ("sft", "0.1b"),
    ("sft", "0.2b"),
    ("sft", "0.3b"),
    ("grpo", "0.1b"),
    ("grpo", "0.2b"),
    ("grpo-budget", "0.2b"),
    ("grpo-packed", "0.1b"),
    ("grpo-shared", "0.2b"),
)
ROWS = 2  # of a pass
COMPLETION = 48  # tokens of a GRPO completion
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def image_processor(least_px: int = 65_536, most_px: int = 16_777_216) -> Qwen2VLImageProcessorPil:
    """Qwen3-VL's, with its own limits of an image's area unless others are given."""
    return Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": least_px, "longest_edge": most_px},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def random_model(size: str):
    """(model, processor): float32, random weights."""
    width, layers, heads, keys, mlp, tied = SIZES[size]
    tokenizer = build_tokenizer()
    ids = mini_config("small", tokenizer)  # its vocabulary is the beginning of the real one
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    shape = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer) if size == "tiny" else 151_936,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "head_dim": 128,
            "intermediate_size": mlp,
            "rope_parameters": rope,
            "max_position_embeddings": 32_768,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 1 if size == "tiny" else 6,
            "hidden_size": 128 if size == "tiny" else 512,
            "num_heads": 8,
            "intermediate_size": 128 if size == "tiny" else 2048,
            "out_hidden_size": width,
            "deepstack_visual_indexes": [0] if size == "tiny" else [1, 3, 4],
        },
        tie_word_embeddings=tied,
        **{name: getattr(ids, name) for name in TOKENS},
    )
    images = image_processor()
    processor = Qwen3VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)
    return Qwen3VLForConditionalGeneration(shape), processor


def noise_samples(folder: Path, count: int) -> list[dict]:
    """Samples with images of noise, in the form of `egm_lib.data`."""
    dice = np.random.default_rng(0)
    for number in range(count):
        pixels = dice.integers(0, 256, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return [
        {
            "sample_id": f"noise-{number}",
            "image": f"{number}.png",
            "width": 640,
            "height": 480,
            "expression": "the red circle on the left",
            "task": "vanilla",
            "gt_box": [10.0, 20.0, 300.0, 400.0],
            "modal_box": None,
            "reasoning": " ".join(["the red circle is on the left ."] * 4),
        }
        for number in range(count)
    ]


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(case: str, size: str) -> dict:
    """Runs one case in this process; returns predicted and measured GiB."""
    torch.set_num_threads(1)
    stage = case.partition("-")[0]
    run_case(case, "tiny")  # what it holds beside the model: libraries, samples, buffers
    base = peak_bytes()
    profile, row, trainer = run_case(case, size)
    setting = make_setting(
        profile,
        stage,
        hardware("cpu"),
        shape=shape_from_config(trainer.model.config),
        row=row,
        shared_prefix=case == "grpo-shared",
    )
    plan = Plan(stage, setting, samples=1)
    return {
        "case": case,
        "size": size,
        "parameters": setting.shape.parameters,
        "tokens": setting.tokens,
        "phase": fullest(plan.parts),
        "predicted_gib": plan.peak_gib,
        "measured_gib": (peak_bytes() - base) / GIB,
        "base_gib": base / GIB,
        "parts": {part.name: part.bytes / GIB for part in plan.parts},
    }


def run_case(case: str, size: str):
    """Trains two steps; returns the profile, the tokens of a row and the trainer."""
    scratch = Path(tempfile.mkdtemp())
    base, family = load_profile("paper-qwen3vl-8b"), FAMILIES["qwen3-vl"]
    samples = noise_samples(scratch, 2 * ROWS)
    model, processor = random_model(size)
    shared = case == "grpo-shared"
    common = {
        "work": scratch / "work",
        "log": scratch / "log.jsonl",
        "seed": 0,
        "shared_prefix": shared,
    }
    launch = replace(base.launch, accelerate_config=None, num_processes=1)
    if case == "sft":
        options = replace(
            base.sft,
            dtype="float32",
            max_steps=2,
            num_train_epochs=100.0,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=2,
            dataloader_num_workers=0,
            max_pixels=None,
        )
        rows = list(sft.answer_rows(samples, family, scratch, reasoning=True, label=False, grid=20))
        row = row_tokens(processor, rows)
        trainer = sft.make_sft_trainer(model, processor, rows, family, options, **common)
        profile = replace(base, sft=options, launch=launch)
    else:
        options = replace(
            base.grpo,
            dtype="float32",
            compute_dtype=None,
            rollout="transformers",
            rollout_dtype="float32",
            max_steps=2,
            num_train_epochs=100.0,
            prompts_per_step=2,
            num_generations=ROWS,
            per_device_train_batch_size=ROWS,
            max_completion_length=COMPLETION,
            micro_batch_tokens=400 if case == "grpo-budget" else None,
            freeze_vision=shared,
            freeze_merger=shared,
            shared_prefix="auto" if case in ("grpo-packed", "grpo-shared") else "off",
        )
        model.save_pretrained(scratch / "model")  # the KL's reference is loaded from a folder
        processor.save_pretrained(scratch / "model")
        del model
        start = replace(base.models.small, path=str(scratch / "model"))
        model, _ = load_start(str(scratch / "model"), start, "float32")
        answers = sft.answer_rows(samples, family, scratch, reasoning=False, label=False, grid=20)
        row = replace(row_tokens(processor, list(answers)), answer=COMPLETION, longest=COMPLETION)
        rows = list(grpo.question_rows(samples, family, scratch))
        common |= {"groups": scratch / "groups.jsonl", "reward": half_rewarded}
        trainer = grpo.make_grpo_trainer(model, processor, rows, family, options, **common)
        profile = replace(base, grpo=options, launch=launch)
    trainer.train()
    return profile, row, trainer


def half_rewarded(completions, **kwargs) -> list[float]:
    """A reward that differs within each group, so that every group is trained on."""
    return [float(number % 2) for number in range(len(completions))]


def row_tokens(processor, rows: list[dict]) -> Row:
    """Tokens of rows as the collator reads them."""
    batch = PlainCollator(processor, None)(rows)
    lengths = batch["attention_mask"].sum(dim=1)
    answers = (batch["labels"] != -100).sum(dim=1)
    image = int((batch["input_ids"][0] == processor.image_token_id).sum())
    question = int((lengths - answers).max()) - image
    return Row(
        image=image,
        question=question,
        answer=round(answers.float().mean().item()),
        longest=int(answers.max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("case", nargs="?", choices=sorted({case for case, _ in CASES}))
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--here", action="store_true", help="in this process; prints JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.case, args.size)))
        return
    chosen = [
        (case, size)
        for case, size in CASES
        if args.case in (None, case) and args.size in (None, size)
    ]
    print("case         size  parameters   tokens a pass   predicted   measured   ratio")
    for case, size in chosen:
        command = [sys.executable, __file__, case, "--size", size, "--here"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(done.stdout.splitlines()[-1])
        ratio = row["predicted_gib"] / row["measured_gib"]
        print(
            f"{case:12} {size:5} {row['parameters'] / 1e6:8.0f} M {row['tokens']:14,} "
            f"{row['predicted_gib']:8.2f} GiB {row['measured_gib']:6.2f} GiB {ratio:7.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
