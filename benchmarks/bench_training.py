"""Seconds and peak memory of a training step, in several ways.

The ways of SFT and GRPO are TRL's plain trainer, the same with the vision cache, and ours (shared
prefix). Those of `update`, GRPO without sampling, are TRL's path and packed groups.

    python benchmarks/bench_training.py                      # all stages, each in all its ways
    python benchmarks/bench_training.py grpo --way ours --steps 2
    python benchmarks/bench_training.py grpo --way plain --size 8b --lora 16 --rows 16
    python benchmarks/bench_training.py update --size 2b --layers 4 --steps 2

Each way runs in a separate process, so that its peak memory can be measured. On a CPU, CPU seconds
are taken, so that other work does not count. In half of the groups the rewards are random, in the
others they are equal, so that the share of groups with unequal rewards is the same for all ways.
Sizes of Qwen3-VL have its shapes, its vocabulary and random weights. Without LoRA there is no
reference, and so no KL.

`update` has real token counts: 300 of the image, 40 of the prompt, 101 of each of 16 answers. The
answers are drawn at random, and both ways get the same. Vision is trained, as in the paper profile
of Qwen3-VL, and on a GPU gradients are checkpointed. The optimizer's step does not count; SGD takes
it, which needs no memory.
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
from bench_plan import image_processor
from PIL import Image
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, TrainerCallback

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

WAYS = {
    "sft": ("plain", "cache", "ours"),
    "grpo": ("plain", "cache", "ours"),
    "update": ("plain", "packed"),
}
# Of `update`: tokens of an image (that of 640 x 480 px) and of an answer, and answers of a group
IMAGE_TOKENS_WH, ANSWER_TOKENS, ANSWERS = (20, 15), 101, 16
EXPRESSION = " ".join(["red square"] * 14)  # with the template a prompt of 40 tokens
PROMPTS = {"grpo": 32, "update": 2}  # of a step; 2 groups of 16 are Table 6's rows of a GPU


class Stopwatch(TrainerCallback):
    """Seconds of each step, with or without the optimizer's own step."""

    def __init__(self, optimizer: bool):
        self.optimizer = optimizer
        self.seconds: list[float] = []

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = self.now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.optimizer:
            self.seconds.append(self.now() - self.began)

    def on_step_end(self, args, state, control, **kwargs):
        if self.optimizer:
            self.seconds.append(self.now() - self.began)
        if len(self.seconds) == 1 and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # the first step compares two ways


class Meter(TrainerCallback):
    """Tokens that the language model reads and patches that the tower reads, in the last step."""

    tokens = patches = 0

    def __init__(self, model):
        model.model.language_model.register_forward_pre_hook(self.read_tokens, with_kwargs=True)
        model.model.visual.register_forward_pre_hook(self.read_patches, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.tokens = self.patches = 0

    def read_tokens(self, module, args, kwargs) -> None:
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def read_patches(self, module, args, kwargs) -> None:
        self.patches += len(args[0] if args else kwargs["hidden_states"])


def half_random(group_size: int):
    dice = random.Random(0)

    def reward(completions, **kwargs) -> list[float]:
        return [0.5 if n // group_size % 2 else dice.random() for n in range(len(completions))]

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
FAMILY = FAMILIES["qwen3-vl"]
SIDE_PX = 224  # 50,176 px, the authors' max_pixels: 49 tokens an image


def random_model(size: str, dtype: str, layers: int | None = None):
    """(model, processor) with random weights.

    Such a model rarely ends an answer, so every way samples as many tokens.

    layers: at most so many of the language model and of the tower, at the full widths.
    """
    tokenizer = build_tokenizer()
    if size == "mini":
        folder = Path(tempfile.mkdtemp())
        save(build("small", tokenizer, seed=0), folder)
        return load_model(folder), load_processor(folder, "qwen3-vl")
    text_options, tower = SIZES[size]
    if layers:
        text_options = text_options | {"num_hidden_layers": layers}
        tower = tower | {"depth": layers, "deepstack_visual_indexes": list(range(min(3, layers)))}
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
    images = image_processor(SIDE_PX**2, SIDE_PX**2)
    return model.eval(), Qwen3VLProcessor(images, tokenizer, chat_template=tokenizer.chat_template)


def drawn_samples(folder: Path, count: int) -> list[dict]:
    (folder / "images").mkdir()
    write_split(folder, "validation.jsonl", count)
    return list(read_samples(folder / "validation.jsonl"))


def paper_samples(folder: Path, count: int, processor, cell_px: int) -> list[dict]:
    """Samples with images of IMAGE_TOKENS_WH. cell_px: side of what is one token."""
    width_px, height_px = (cell_px * tokens for tokens in IMAGE_TOKENS_WH)
    area_px = width_px * height_px
    processor.image_processor.size = {"shortest_edge": area_px, "longest_edge": area_px}
    samples, dice = [], random.Random(0)
    for number in range(count):
        colour = tuple(dice.randrange(256) for _ in range(3))
        Image.new("RGB", (width_px, height_px), colour).save(folder / f"{number}.png")
        samples.append(
            {
                "sample_id": str(number),
                "image": f"{number}.png",
                "width": width_px,
                "height": height_px,
                "expression": EXPRESSION,
                "task": "vanilla",
                "gt_box": [0, 0, width_px, height_px],
                "modal_box": None,
            }
        )
    return samples


def draw_answers(trainer) -> None:
    """Makes the trainer take random tokens as answers, the same in every run."""
    dice = random.Random(0)

    def single_turn(prompt_ids, *args, **kwargs):
        return [[dice.randint(20, 60) for _ in range(ANSWER_TOKENS)] for _ in prompt_ids], None

    trainer._generate_single_turn = single_turn


def peak_mb() -> int:
    """Peak GPU memory, or without a GPU that of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure_all(stage: str | None, way: str | None, options: list[str]) -> None:
    """A row for each stage and way, each measured in a separate process."""
    for name in WAYS if stage is None else (stage,):
        for each in WAYS[name] if way is None else (way,):
            command = [sys.executable, __file__, name, "--way", each, *options]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            read = f"; {row['tokens']:,} tokens and {row['patches']:,} patches read"
            print(
                f"{name:6} {each:6} {row['s_step']:8.2f} s a step, the first {row['s_first']:.2f}; "
                f"peak {row['peak_mb']:,} MiB{read if name == 'update' else ''}; {row['size']}, "
                f"{row['dtype']}, {row['device']}",
                flush=True,
            )


def sft_trainer(model, processor, args: argparse.Namespace, lora: Lora | None, common: dict):
    profile, scratch = load_profile("mini"), common["work"]
    samples = [
        {**sample, "reasoning": " ".join([sample["expression"]] * 3)}
        for sample in drawn_samples(scratch, 256)
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
    rows = sft.answer_rows(samples, FAMILY, scratch, reasoning=True, grid=20, label=False)
    return sft.make_sft_trainer(model, processor, rows, FAMILY, options, **common)


def grpo_trainer(model, processor, args: argparse.Namespace, lora: Lora | None, common: dict):
    """For the stages grpo and update."""
    profile, scratch = load_profile("mini"), common["work"]
    update = args.stage == "update"
    options = replace(
        profile.grpo,
        max_minutes=None,
        max_steps=args.steps,
        prompts_per_step=args.prompts or PROMPTS[args.stage],
        per_device_train_batch_size=args.rows,
        max_completion_length=args.tokens,
        dtype=args.dtype,
        beta=profile.grpo.beta if lora or args.size == "mini" else 0.0,
        lora=lora,
        shared_prefix="auto" if args.way in ("ours", "packed") else "off",
    )
    if update:
        vision = processor.image_processor
        samples = paper_samples(scratch, 16, processor, vision.patch_size * vision.merge_size)
        options = replace(
            options,
            num_generations=ANSWERS,
            per_device_train_batch_size=min(args.rows, ANSWERS * options.prompts_per_step),
            max_completion_length=ANSWER_TOKENS,
            compute_dtype=args.compute,
            freeze_vision=False,
            freeze_merger=False,
        )
    else:
        samples = drawn_samples(scratch, 256)
    config = grpo.grpo_config(options, scratch, seed=0)
    if update:
        config.optim = "sgd"
    trainer = grpo.make_grpo_trainer(
        model,
        processor,
        grpo.question_rows(samples, FAMILY, scratch),
        FAMILY,
        options,
        reward=half_random(options.num_generations),
        groups=scratch / "groups.jsonl",
        config=config,
        **common,
    )
    if update:
        draw_answers(trainer)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", nargs="?", choices=WAYS, help="default: all")
    parser.add_argument(
        "--way",
        choices=sorted({way for ways in WAYS.values() for way in ways}),
        help="default: all of the stage, one after another",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--compute",
        choices=("float32", "bfloat16"),
        help="of update: autocast over float32 weights",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--prompts", type=int, help="prompts of a step; default: 32 in grpo, 2 in update"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=128,
        help="rows of a batch; of a part of the step in grpo and, if fewer than the step, update",
    )
    parser.add_argument("--tokens", type=int, default=48, help="of a completion in grpo")
    parser.add_argument("--size", choices=("mini", *SIZES), default="mini")
    parser.add_argument(
        "--layers", type=int, help="layers of model and tower, of any size but mini"
    )
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters alone")
    args = parser.parse_args()
    if args.stage is None or args.way is None:
        options = [
            f"--{name}={value}"
            for name, value in vars(args).items()
            if name not in ("stage", "way") and value is not None
        ]
        measure_all(args.stage, args.way, options)
        return
    if args.way not in WAYS[args.stage]:
        parser.error(f"{args.stage} has the ways {', '.join(WAYS[args.stage])}")
    torch.set_num_threads(1)
    dtype = args.dtype if args.lora else "float32"
    model, processor = random_model(args.size, dtype, args.layers)
    scratch = Path(tempfile.mkdtemp())
    lora = Lora(r=args.lora, alpha=2 * args.lora) if args.lora else None
    if args.way == "cache":
        freeze_vision(model)
    meter = Meter(model)
    common = {
        "work": scratch,
        "log": scratch / "log.jsonl",
        "seed": 0,
        "shared_prefix": args.way == "ours",
    }
    make = sft_trainer if args.stage == "sft" else grpo_trainer
    trainer = make(model, processor, args, lora, common)
    watch = Stopwatch(optimizer=args.stage != "update")
    trainer.add_callback(watch)
    trainer.add_callback(meter)
    trainer.train()
    seconds = [round(value, 3) for value in watch.seconds]
    last = [json.loads(line) for line in common["log"].read_text().splitlines()][-2]
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU",
                "size": args.size,
                "layers": args.layers,
                "stage": args.stage,
                "way": args.way,
                "dtype": args.compute or args.dtype,
                "lora": args.lora,
                "rows": args.rows,
                "tokens": meter.tokens,
                "patches": meter.patches,
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
