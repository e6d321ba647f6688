"""Seconds and peak memory of a training step, in three ways.

The ways are TRL's plain trainer, the same with the vision cache, and ours (shared prefix).

    python benchmarks/bench_training.py                      # SFT and GRPO, each in three ways
    python benchmarks/bench_training.py grpo --way ours --steps 2
    python benchmarks/bench_training.py grpo --way plain --size 8b --lora 16 --rows 16

Each way runs in a separate process, so that its peak memory can be measured. On a CPU, CPU seconds
are taken, so that other work does not count. In half of the groups the rewards are random, in the
others they are equal, so that the share of groups with unequal rewards is the same for all ways.
Sizes of Qwen3-VL have its shapes, its vocabulary and random weights. Without LoRA there is no
reference, and so no KL.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, TrainerCallback
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from egm_lib import grpo, sft
from egm_lib.data import read_samples
from egm_lib.inference.loading import DTYPES, Qwen3VLProcessor, load_model, load_processor
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.mini.models import build, config, save
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.mini.world import write_split
from egm_lib.profile import Lora, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.training.clock import logged_minutes

STAGES = ("sft", "grpo")
WAYS = ("plain", "cache", "ours")


class Stopwatch(TrainerCallback):
    """Seconds of each step; the first one, which fills caches, separately."""

    def __init__(self):
        self.at: list[float] = []

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.at:
            self.at.append(self.now())

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append(self.now())


def half_random(group_size: int):
    dice = random.Random(0)

    def reward(completions, **kwargs) -> list[float]:
        return [dice.random() if n // group_size % 2 else 0.5 for n in range(len(completions))]

    return reward


TOWER = {"num_heads": 16, "patch_size": 16, "num_position_embeddings": 2304}
SMALL_TOWER = TOWER | {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
LARGE_TOWER = TOWER | {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "deepstack_visual_indexes": [8, 16, 24],
}
SIZES = {  # Qwen3-VL's: its language model and its tower
    "2b": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "intermediate_size": 6144,
            "tie_word_embeddings": True,
        },
        SMALL_TOWER,
    ),
    "4b": (
        {
            "hidden_size": 2560,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 9728,
            "tie_word_embeddings": True,
        },
        SMALL_TOWER,
    ),
    "8b": (
        {
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "intermediate_size": 12_288,
            "tie_word_embeddings": False,
        },
        LARGE_TOWER,
    ),
}
TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
SIDE_PX = 224  # 50,176 px, the authors' max_pixels: 49 tokens an image


def random_model(size: str, dtype: str):
    """(model, processor) with random weights.

    Such a model rarely ends an answer, so every way samples as many tokens.
    """
    tokenizer = build_tokenizer()
    if size == "mini":
        folder = Path(tempfile.mkdtemp())
        save(build("small", tokenizer, seed=0), folder)
        return load_model(folder), load_processor(folder, "qwen3-vl")
    text_options, tower = SIZES[size]
    rope = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    ids = config("small", tokenizer)  # the miniature's vocabulary is the beginning of theirs
    shape = Qwen3VLConfig(
        text_config=text_options
        | {
            "vocab_size": 151_936,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": rope,
            "max_position_embeddings": 32_768,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config=tower | {"out_hidden_size": text_options["hidden_size"]},
        tie_word_embeddings=text_options["tie_word_embeddings"],
        **{name: getattr(ids, name) for name in TOKENS},
    )
    torch.set_default_dtype(DTYPES[dtype])
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen3VLForConditionalGeneration(shape)
    torch.set_default_dtype(torch.float32)
    images = Qwen2VLImageProcessorPil(
        patch_size=16,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE_PX**2, "longest_edge": SIDE_PX**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return model.eval(), Qwen3VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def drawn_samples(folder: Path, count: int) -> list[dict]:
    (folder / "images").mkdir()
    write_split(folder, "validation.jsonl", count)
    return list(read_samples(folder / "validation.jsonl"))


def peak_mb() -> int:
    """Peak GPU memory, or without a GPU that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure_all(stages: tuple[str, ...], ways: tuple[str, ...], options: list[str]) -> None:
    """A row for each stage and way, each measured in a separate process."""
    for stage in stages:
        for way in ways:
            command = [sys.executable, __file__, stage, "--way", way, *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{stage:4} {way:5} {row['s_step']:8.2f} s a step, the first {row['s_first']:.2f}; "
                f"peak {row['peak_mb']:,} MiB; {row['size']}, {row['dtype']}, {row['device']}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", nargs="?", choices=STAGES, help="default: both")
    parser.add_argument("--way", choices=WAYS, help="default: all, one after another")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a GRPO step")
    parser.add_argument(
        "--rows", type=int, default=128, help="rows of a batch; of a part of the step in GRPO"
    )
    parser.add_argument("--tokens", type=int, default=48, help="of a completion in GRPO")
    parser.add_argument("--size", choices=("mini", *SIZES), default="mini")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters alone")
    args = parser.parse_args()
    if args.stage is None or args.way is None:
        stages = STAGES if args.stage is None else (args.stage,)
        ways = WAYS if args.way is None else (args.way,)
        options = [
            f"--{name}={value}"
            for name, value in vars(args).items()
            if name not in ("stage", "way") and value is not None
        ]
        measure_all(stages, ways, options)
        return
    torch.set_num_threads(1)
    profile, family = load_profile("mini"), FAMILIES["qwen3-vl"]
    model, processor = random_model(args.size, args.dtype if args.lora else "float32")
    scratch = Path(tempfile.mkdtemp())
    samples = drawn_samples(scratch, 256)
    lora = Lora(r=args.lora, alpha=2 * args.lora) if args.lora else None
    if args.way == "cache":
        freeze_vision(model)
    common = {
        "work": scratch,
        "log": scratch / "log.jsonl",
        "seed": 0,
        "shared_prefix": args.way == "ours",
    }
    if args.stage == "sft":
        samples = [
            {**sample, "reasoning": " ".join([sample["expression"]] * 3)} for sample in samples
        ]
        options = replace(
            profile.sft,
            max_minutes=None,
            max_steps=args.steps,
            per_device_train_batch_size=args.rows,
            num_train_epochs=1000.0,
            dtype=args.dtype,
            lora=lora,
        )
        rows = sft.answer_rows(samples, family, scratch, reasoning=True, grid=20, label=False)
        trainer = sft.make_sft_trainer(model, processor, rows, family, options, **common)
    else:
        options = replace(
            profile.grpo,
            max_minutes=None,
            max_steps=args.steps,
            prompts_per_step=args.prompts,
            per_device_train_batch_size=args.rows,
            max_completion_length=args.tokens,
            dtype=args.dtype,
            beta=profile.grpo.beta if lora or args.size == "mini" else 0.0,
            lora=lora,
        )
        rows = grpo.question_rows(samples, family, scratch)
        common |= {
            "reward": half_random(options.num_generations),
            "groups": scratch / "groups.jsonl",
        }
        trainer = grpo.make_grpo_trainer(model, processor, rows, family, options, **common)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    seconds = [round(b - a, 3) for a, b in zip(watch.at, watch.at[1:], strict=False)]
    last = [json.loads(line) for line in common["log"].read_text().splitlines()][-2]
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
                "size": args.size,
                "stage": args.stage,
                "way": args.way,
                "dtype": args.dtype,
                "lora": args.lora,
                "rows": args.rows,
                "s_first": seconds[0],
                "s_step": round(sum(seconds[1:]) / max(1, len(seconds) - 1), 3),
                "wall_minutes": round(logged_minutes(common["log"]), 2),
                "peak_mb": peak_mb(),
                "last": {
                    key: last[key]
                    for key in sorted(last)
                    if key.startswith(("time/", "completions/mean", "tokens"))
                },
            }
        )
    )


if __name__ == "__main__":
    main()
