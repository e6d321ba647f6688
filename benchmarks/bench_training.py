"""CPU seconds of a training step: TRL's plain path, the same with the vision cache, and ours (shared prefix).

    python benchmarks/bench_training.py grpo --way plain|cache|ours [--dtype bfloat16] [--steps 2]

One way a process, so that each has its own peak memory. CPU time, not wall time: other work does not count.
Rewards are drawn at random in half of the groups and equal in the others: the share of mixed groups is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import TrainerCallback

from egm_lib import grpo, sft
from egm_lib.data import read_train
from egm_lib.mini.models import build, save
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.models import load_model, load_processor
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.training import logged_minutes
from egm_lib.vision_cache import freeze_vision


class Stopwatch(TrainerCallback):
    """CPU seconds of each step; the first one, which fills caches, apart."""

    def __init__(self):
        self.at: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.at:
            self.at.append(time.process_time())

    def on_step_end(self, args, state, control, **kwargs):
        self.at.append(time.process_time())


def half_random(group_size: int):
    dice = random.Random(0)

    def reward(completions, **kwargs) -> list[float]:
        return [dice.random() if n // group_size % 2 else 0.5 for n in range(len(completions))]

    return reward


def random_small(folder: Path) -> str:
    """The miniature's small model with random weights: it rarely ends an answer, so every way writes as many tokens."""
    save(build("small", build_tokenizer(), seed=0), folder)
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=("sft", "grpo"))
    parser.add_argument("--way", choices=("plain", "cache", "ours"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a GRPO step")
    parser.add_argument("--rows", type=int, default=128, help="rows of a batch; of a part of the step in GRPO")
    args = parser.parse_args()
    torch.set_num_threads(1)
    profile, family = load_profile("mini"), FAMILIES["qwen3-vl"]
    place = random_small(Path(tempfile.mkdtemp()))
    model, processor = load_model(place), load_processor(place, family.name)
    samples = list(read_train(profile.data.path, "vanilla", "selection", 256))
    scratch = Path(tempfile.mkdtemp())
    if args.way == "cache":
        freeze_vision(model)
    common = {"work": scratch, "log": scratch / "log.jsonl", "seed": 0, "shared_prefix": args.way == "ours"}
    if args.stage == "sft":
        samples = [{**sample, "reasoning": " ".join([sample["expression"]] * 3)} for sample in samples]
        options = replace(profile.sft, max_minutes=None, max_steps=args.steps, per_device_train_batch_size=args.rows,
                          num_train_epochs=1000.0, dtype=args.dtype)  # fmt: skip
        rows = sft.answer_rows(samples, family, profile.data.path, reasoning=True, grid=20, label=False)
        trainer = sft.make_trainer(model, processor, rows, family, options, **common)
    else:
        options = replace(profile.grpo, max_minutes=None, max_steps=args.steps, prompts_per_step=args.prompts,
                          per_device_train_batch_size=args.rows, max_completion_length=48, dtype=args.dtype)
        rows = grpo.question_rows(samples, family, profile.data.path)
        common |= {"reward": half_random(options.num_generations), "groups": scratch / "groups.jsonl"}
        trainer = grpo.make_trainer(model, processor, rows, family, options, **common)
    watch = Stopwatch()
    trainer.add_callback(watch)
    trainer.train()
    seconds = [round(b - a, 3) for a, b in zip(watch.at, watch.at[1:], strict=False)]
    last = [json.loads(line) for line in common["log"].read_text().splitlines()][-2]
    print(json.dumps({
        "stage": args.stage, "way": args.way, "dtype": args.dtype, "rows": args.rows, "cpu_s_first": seconds[0],
        "cpu_s_step": round(sum(seconds[1:]) / max(1, len(seconds) - 1), 3),
        "wall_minutes": round(logged_minutes(common["log"]), 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "last": {key: last[key] for key in sorted(last) if key.startswith(("time/", "completions/mean", "tokens"))},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
