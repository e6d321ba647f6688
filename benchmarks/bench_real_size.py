"""Memory and seconds of a training step of the paper's own sizes on one GPU, beside the plan's.

    python benchmarks/bench_real_size.py                        # every case that the GPU holds
    python benchmarks/bench_real_size.py --only Qwen3-VL-2B --case sft

A case is three steps of a stage with the options of the model's paper profile: float32 weights
under bf16 autocast, and with `zero3` DeepSpeed's ZeRO-3 through `accelerate launch`, in one
process. Weights are random, images of 640 x 480 px are noise. Answers have 101 tokens, and GRPO
has 8 prompts a step, so that a step takes seconds. transformers samples, so no vLLM is needed. The
first step, in which packed groups are compared with TRL's path, does not count. Memory is what
PyTorch has allocated, by phase of a step, and the CUDA context. Results go to
results/real-size/<name of the GPU>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from bench_plan import TOKENS, half_rewarded, image_processor, noise_samples, row_tokens
from transformers import Qwen3VLForConditionalGeneration, TrainerCallback

from egm_lib import grpo, sft
from egm_lib.files import project_root, write_text
from egm_lib.inference.loading import Qwen3VLProcessor, limit_pixels
from egm_lib.inference.random_models import config_of
from egm_lib.mini.models import config as mini_config
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.model_shapes import shape_of
from egm_lib.pipeline.launch import launch_command
from egm_lib.profile import load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.training import plan_work
from egm_lib.training.hardware import GIB, hardware
from egm_lib.training.model_setup import load_start
from egm_lib.training.plan import Plan, make_setting
from egm_lib.training.plan_memory import ALL, total_bytes

PROFILES = {"Qwen3-VL-2B": "paper-qwen3vl-2b", "Qwen3-VL-4B": "paper-qwen3vl-4b"}
CASES = ("sft", "grpo", "sft-zero3", "grpo-zero3")
STEPS, PROMPTS, ANSWER_TOKENS = 3, 8, 101
OUT = project_root() / "results" / "real-size"
FAMILY = FAMILIES["qwen3-vl"]


class Phases(TrainerCallback):
    """Peak bytes of each phase, and seconds of each step, of all steps but the first.

    DeepSpeed takes the optimizer's step within the last backward pass, so that its two phases are
    one.
    """

    def __init__(self):
        self.peaks = dict.fromkeys(ALL, 0)
        self.seconds: list[float] = []

    def mark(self, phase: str | None) -> None:
        """Ends a phase. None: the one before a step."""
        torch.cuda.synchronize()
        if phase and self.step:
            self.peaks[phase] = max(self.peaks[phase], torch.cuda.max_memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step
        self.mark(None)
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.mark("update")

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.mark("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        if self.step:
            self.seconds.append(time.perf_counter() - self.began)


def write_checkpoint(model: str, folder: Path) -> None:
    """A checkpoint in the shape of a model, with random weights in bf16 and a small tokenizer."""
    tokenizer = build_tokenizer()
    ids = mini_config("small", tokenizer)  # its vocabulary is the beginning of the real one
    shape = config_of(shape_of(model))
    for name in TOKENS:
        setattr(shape, name, getattr(ids, name))
    shape.text_config.pad_token_id = tokenizer.pad_token_id
    shape.text_config.eos_token_id = tokenizer.eos_token_id
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        random = Qwen3VLForConditionalGeneration(shape)
    torch.set_default_dtype(torch.float32)
    random.save_pretrained(folder)
    processor = Qwen3VLProcessor(
        image_processor(), tokenizer, chat_template=tokenizer.chat_template
    )
    processor.save_pretrained(folder)


def measure(case: str, model: str, folder: Path) -> dict:
    """Runs one case in this process. folder: of `write_checkpoint`."""
    stage, _, zero = case.partition("-")
    profile = load_profile(PROFILES[model])
    launch = replace(
        profile.launch, num_processes=1, accelerate_config="deepspeed_zero3" if zero else None
    )
    profile = replace(profile, launch=launch)
    scratch, phases = Path(tempfile.mkdtemp()), Phases()
    torch.cuda.init()
    if stage == "sft":
        profile, row, trainer = sft_case(profile, folder, scratch)
    else:
        profile, row, trainer = grpo_case(profile, folder, scratch, phases)
    trainer.add_callback(phases)
    trainer.train()
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    setting = make_setting(profile, stage, on_this_gpu(), row=row, shared_prefix=False)
    samples = PROMPTS if stage == "grpo" else setting.rows
    steps = plan_work.steps_of(setting, samples)
    hours = [part for part in plan_work.hours(setting, samples) if part.name != "together"]
    update_h = sum(part.value for part in hours if not part.name.startswith("rollout"))
    parts = Plan(stage, setting, samples).parts
    log = [json.loads(line) for line in (scratch / "log.jsonl").read_text().splitlines()]
    last = [line for line in log if "loss" in line][-1]
    return {
        "model": model,
        "case": case,
        "tokens_of_a_pass": setting.tokens,
        "predicted_gib": {phase: total_bytes(parts, phase) / GIB for phase in ALL},
        "parts_gib": {part.name: part.bytes / GIB for part in parts},
        "measured_gib": {phase: (peak + context) / GIB for phase, peak in phases.peaks.items()},
        "context_gib": context / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        "step_s": [round(seconds, 3) for seconds in phases.seconds],
        "predicted_update_s": 3600 * update_h / steps,
        "packed": getattr(trainer, "packs", None),
        "log": {key: value for key, value in last.items() if key.startswith(("time/", "loss"))},
    }


def sft_case(profile, folder: Path, scratch: Path):
    """(profile, tokens of a row, trainer) of SFT."""
    options = replace(profile.sft, max_steps=STEPS, num_train_epochs=100.0)
    rows_a_step = options.per_device_train_batch_size * options.gradient_accumulation_steps
    config = sft.sft_config(options, scratch / "work", seed=0)
    model, processor = start(profile, folder)
    limit_pixels(processor, "qwen3-vl", options.max_pixels)
    samples = noise_samples(scratch, rows_a_step)
    rows = list(sft.answer_rows(samples, FAMILY, scratch, reasoning=True, label=False, grid=20))
    trainer = sft.make_sft_trainer(
        model,
        processor,
        rows,
        FAMILY,
        options,
        work=scratch / "work",
        log=scratch / "log.jsonl",
        seed=0,
        config=config,
    )
    return replace(profile, sft=options), row_tokens(processor, rows), trainer


def grpo_case(profile, folder: Path, scratch: Path, phases: Phases):
    """(profile, tokens of a row, trainer) of GRPO."""
    options = replace(
        profile.grpo,
        rollout="transformers",
        max_steps=STEPS,
        num_train_epochs=100.0,
        prompts_per_step=PROMPTS,
        max_completion_length=ANSWER_TOKENS,
    )
    config = grpo.grpo_config(options, scratch / "work", seed=0)
    model, processor = start(profile, folder)
    samples = noise_samples(scratch, 2 * PROMPTS)
    answers = sft.answer_rows(samples, FAMILY, scratch, reasoning=False, label=False, grid=20)
    row = row_tokens(processor, list(answers))
    trainer = grpo.make_grpo_trainer(
        model,
        processor,
        list(grpo.question_rows(samples, FAMILY, scratch)),
        FAMILY,
        options,
        work=scratch / "work",
        log=scratch / "log.jsonl",
        groups=scratch / "groups.jsonl",
        seed=0,
        reward=half_rewarded,
        config=config,
    )
    generate = trainer._generate

    def generate_and_mark(prompts):
        found = generate(prompts)
        phases.mark("rollout")
        return found

    trainer._generate = generate_and_mark
    row = replace(row, answer=ANSWER_TOKENS, longest=ANSWER_TOKENS)
    return replace(profile, grpo=options), row, trainer


def start(profile, folder: Path):
    """(model, processor), as the stages load them for full training."""
    return load_start(str(folder), replace(profile.models.small, path=str(folder)), "float32")


def on_this_gpu():
    """The plan's card for this GPU, with this GPU's memory."""
    found = torch.cuda.get_device_properties(0)
    name = next((name for name in ("h200", "h100", "a100") if name in found.name.lower()), "h100")
    return hardware(name, memory_gib=found.total_memory / GIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=PROFILES, help="these models alone")
    parser.add_argument("--case", action="append", choices=CASES, help="these cases alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--here", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        write_checkpoint(args.only[0], args.make)
    elif args.here:
        print(json.dumps(measure(args.case[0], args.only[0], args.here)))
    elif not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here, and a step of these sizes needs one.")
    else:
        run(args.only or list(PROFILES), args.case or CASES, args.out)


def run(models: list[str], cases, out: Path) -> None:
    """Every case in a process of its own; the file is written after each."""
    rows, name = [], torch.cuda.get_device_name(0)
    path = out / f"{name.lower().replace(' ', '-')}.json"
    for model in models:
        folder = Path(tempfile.mkdtemp()) / model
        command = [sys.executable, __file__, "--only", model]
        subprocess.run([*command, "--make", str(folder)], check=True)
        for case in cases:
            own = [*command[1:], "--case", case, "--here", str(folder)]
            if case.endswith("zero3"):
                launch = replace(load_profile(PROFILES[model]).launch, num_processes=1)
                words = launch_command(launch, own)
            else:
                words = [sys.executable, *own]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                row = {"model": model, "case": case, "not_run": f"status {done.returncode}"}
            else:
                row = json.loads(done.stdout.splitlines()[-1])
            rows.append(row)
            print(line(row), flush=True)
            record = {"device": name, "torch": torch.__version__, "rows": rows}
            record["transformers"] = transformers.__version__
            write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"{path} is written")


def line(row: dict) -> str:
    head = f"{row['model']} {row['case']:10}"
    if "not_run" in row:
        return f"{head} not run ({row['not_run']})"
    memory = ", ".join(
        f"{phase} {row['predicted_gib'][phase]:.1f} / {row['measured_gib'][phase]:.1f}"
        for phase in ALL
    )
    return (
        f"{head} GiB predicted / measured: {memory}; reserved {row['reserved_gib']:.1f}; "
        f"context {row['context_gib']:.2f}; step {row['step_s']} s, update predicted "
        f"{row['predicted_update_s']:.2f} s; packed {row['packed']}; {row['log']}"
    )


if __name__ == "__main__":
    main()
