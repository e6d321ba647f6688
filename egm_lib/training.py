"""What SFT and GRPO share: the clock that limits a run, its log, its schedule, and finishing
without leaving halves.

A log is JSONL, one line a step, and the same for TensorBoard: `tensorboard --logdir data/runs`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from egm_lib import plan
from egm_lib.models import load_model, load_processor, save_processor, video_half
from egm_lib.profile import Lora, Model, Profile, ProfileError, Run, load_profile
from egm_lib.prompts import Family


class TrainingError(RuntimeError):
    """A training that cannot start or must not go on; the message says why and how to mend it."""


class Clock(TrainerCallback):
    """Stops a run after max_minutes of training (of all its sittings), saves every save_seconds,
    logs as JSONL.

    Where TensorBoard is installed, the same numbers go to the folder tensorboard/<name of the log>
    beside the log.
    """

    def __init__(self, log: Path, max_minutes: float | None = None, save_seconds: float = 60.0):
        self.log, self.max_minutes, self.save_seconds = log, max_minutes, save_seconds
        self.before_s = 0.0  # of earlier sittings
        self.board = None  # TensorBoard's writer
        self.began = self.saved = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        return self.before_s + time.monotonic() - self.began

    def progress(self, step: int, max_steps: int) -> float:
        """How much of the run is over, 0 to 1, by steps or by minutes, whichever is more."""
        by_steps = step / max_steps if max_steps > 0 else 0.0
        by_time = self.elapsed_s / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = self.saved = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        lines = self.log.read_text().splitlines() if state.global_step and self.log.exists() else []
        lines = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self.before_s = json.loads(lines[-1])["elapsed_s"] if lines else 0.0
        write_text(self.log, "".join(line + "\n" for line in lines))
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = self.log.parent / "tensorboard" / self.log.stem
            if not state.global_step:  # curves of a run that is begun anew
                shutil.rmtree(folder, ignore_errors=True)
            self.board = SummaryWriter(str(folder), purge_step=state.global_step + 1, flush_secs=20)

    def on_step_end(self, args, state, control, **kwargs):
        if self.max_minutes and self.elapsed_s >= 60 * self.max_minutes:
            control.should_training_stop = True
        elif time.monotonic() - self.saved >= self.save_seconds:
            control.should_save, self.saved = True, time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            line = {
                "step": state.global_step,
                "elapsed_s": round(self.elapsed_s, 2),
                **(logs or {}),
            }
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if self.board and isinstance(value, int | float):
                    self.board.add_scalar(name, value, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.board:
            self.board.close()


class TimedSchedule:
    """A trainer whose learning rate follows its clock where that limits the run: a cosine ends with
    the minutes.
    """

    clock: Clock

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if not self.clock.max_minutes:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.warmup_steps
        shape = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))

        def scale(step: int) -> float:
            done = self.clock.progress(step, num_training_steps)
            if warmup < 1 and done < warmup:
                return max(done, 1e-3) / warmup
            if step < warmup >= 1:
                return (step + 1) / (warmup + 1)
            return {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1.0 - done}.get(
                shape, 1.0
            )

        if shape not in ("cosine", "linear", "constant", "constant_with_warmup"):
            raise TrainingError(
                f"schedule {shape!r} cannot follow max_minutes: use cosine, linear or constant"
            )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, scale)
        return self.lr_scheduler


def common_options(work: Path, seed: int, dtype: str) -> dict:
    """Options of TRL's trainers that no profile chooses; saving is the clock's."""
    return {
        "output_dir": str(work),
        "seed": seed,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": torch.cuda.is_available(),
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": [],
        "logging_steps": 1,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def lora_config(lora: Lora | None):
    """peft's configuration for a profile's `lora`: all linear layers of the language model."""
    if lora is None:
        return None
    from peft import LoraConfig

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets
    )


def work_folder(out: Path) -> Path:
    """Where a model's checkpoints stand while it is trained: beside the finished one."""
    return out.with_name(f"{out.name}.unfinished")


def is_finished(out: Path) -> bool:
    return (out / "config.json").is_file()


def train_to(trainer, processor, out: Path) -> Path:
    """Trains (going on from the last checkpoint, if any) and puts model and processor into `out`,
    at once and whole.
    """
    work, origin = work_folder(out), trainer.model.name_or_path
    resume = get_last_checkpoint(str(work)) if work.is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    finished = work / "finished"
    if hasattr(trainer.model, "merge_and_unload"):  # LoRA: later stages want a whole model
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(
            str(finished)
        )
    else:
        trainer.save_model(str(finished))
    if not trainer.accelerator.is_main_process:
        return out
    save_processor(processor, finished, video_half(origin))
    # A pickle: nobody should have to trust it
    (finished / "training_args.bin").unlink(missing_ok=True)
    if out.exists():
        shutil.rmtree(out)
    os.replace(finished, out)
    shutil.rmtree(work)
    return out


def chat_text(processor, prompt: list[dict]) -> str:
    """A row's prompt as the chat template writes it, the assistant's turn begun."""
    content = [{"type": "image"}, {"type": "text", "text": prompt[0]["content"]}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )


def freeze_tower(model, family: Family, *, tower: bool, merger: bool) -> None:
    """Freezes the vision tower and, apart from it, the mergers that turn its outputs into the
    language model's.
    """
    part = {"qwen3-vl": "visual", "internvl-3": "vision_tower"}[family.name]
    for name, parameter in model.model.named_parameters():
        is_merger = "merger" in name or name.startswith("multi_modal_projector")
        if is_merger or name.startswith(part):
            parameter.requires_grad_(not (merger if is_merger else tower))


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def require_file(path: Path, made_by: str) -> Path:
    if not path.is_file():
        raise TrainingError(f"{path} is missing: run {made_by} first.")
    return path


def require_checkpoint(run: Run, task: str, model: str, made_by: str) -> Path:
    path = run.checkpoint(task, model)
    if not is_finished(path):
        raise TrainingError(f"{path} holds no finished model: run {made_by} first.")
    return path


def check_device(dtype: str, section: str) -> None:
    """Raises TrainingError, before anything long starts, where half precision is asked for and
    there is no GPU.
    """
    if dtype != "float32" and not torch.cuda.is_available():
        raise TrainingError(
            f"{section}.dtype is {dtype!r}, and PyTorch sees no GPU here: run it on a GPU machine, "
            f"or set {section}.dtype to float32."
        )


def check_memory(profile: Profile, stage: str, place: str) -> None:
    """Raises TrainingError, before anything is loaded, where not even weights and optimizer state
    fit into a GPU.

    These are exact; that the rest fits too, nobody can promise (egm_lib.plan estimates it).
    """
    if not torch.cuda.is_available():
        return
    try:
        config = AutoConfig.from_pretrained(place)
    except OSError:
        return  # load_start says it
    # Of accelerate's processes, which divide these among them
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    memory_gib = torch.cuda.get_device_properties(0).total_memory / plan.GIB
    hardware = plan.Hardware(gpus, memory_gib, tflops=1.0)
    parts = plan.estimate(profile, config, stage, hardware, samples=1)
    needed_gib = parts.weights_gib + parts.gradients_gib + parts.optimizer_gib + parts.reference_gib
    if needed_gib > memory_gib:
        raise TrainingError(
            f"{stage} of {place} holds {needed_gib:.0f} GiB of weights, gradients and optimizer on each of {gpus} "
            f"GPUs, and one has {memory_gib:.0f}: take more GPUs (launch.num_processes) or train with lora; "
            f"`python -m egm_lib.plan --profile {profile.name}` says what would do."
        )
    share_gib = profile.grpo.vllm_gpu_memory_utilization * memory_gib
    if parts.rollout_weights_gib > share_gib:
        raise TrainingError(
            f"vLLM holds {parts.rollout_weights_gib:.0f} GiB of weights of {place} on each GPU, and its share is "
            f"{share_gib:.0f} of {memory_gib:.0f}: raise grpo.vllm_gpu_memory_utilization, or set grpo.rollout to "
            "vllm-server or transformers."
        )


def load_start(place: str, start: Model, dtype: str):
    """(model, processor) that a training starts from. Raises TrainingError for what cannot be had,
    gated or offline.
    """
    try:
        return load_model(place, dtype=dtype), load_processor(place, start.family, start.max_pixels)
    except FileNotFoundError:
        raise  # says it in one sentence
    except OSError as error:  # transformers' word for "gated", "no such model" and "no network"
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{place} cannot be loaded: {reason} If it is gated, accept its licence on its page and run "
            "`hf auth login`; without a network, set HF_HOME to a folder that holds it."
        ) from error


def logged_minutes(log: Path) -> float:
    """Minutes of training that a finished stage's log tells."""
    lines = require_file(log, "the stage that writes it").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line)["elapsed_s"] for line in lines) / 60


def stage_command(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    act: Callable[[Run, argparse.Namespace], object],
) -> int:
    """Runs a stage from the command line: adds --profile, --seed, --task, --plan; prints what
    act(run, args) returns.

    Returns the exit code: 2, with one sentence on stderr, where the stage cannot start or go on.
    """
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--seed", type=int, help="the profile's first one where it is not given")
    parser.add_argument("--task", choices=("vanilla", "amodal"), default="vanilla")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="will it fit: `python -m egm_lib.plan`, 8 GPUs of 80 GiB",
    )
    args = parser.parse_args(argv)
    if args.plan:
        return plan.main(["--profile", args.profile])
    try:
        profile = load_profile(args.profile)
        print(act(Run(profile, profile.seeds[0] if args.seed is None else args.seed), args))
    except (ProfileError, TrainingError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"Too little GPU memory: {str(error).splitlines()[0]} Make per_device_train_batch_size smaller, train with "
            f"lora, or take more GPUs; `python -m egm_lib.plan --profile {args.profile}` says what it needs.",
            file=sys.stderr,
        )
        return 2
    return 0
