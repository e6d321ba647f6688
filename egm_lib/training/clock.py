"""The clock of a training: its log, its checkpoints, and how long it may take.

If a profile sets `max_steps`, the training ends after so many steps, and the learning rate follows
the steps. `max_minutes` then only stops a training that takes too long. If `max_minutes` is set
alone, the training ends after so many minutes, and the learning rate follows the time.

A log is JSONL, one line a step. TensorBoard shows the same numbers:
`tensorboard --logdir data/runs`.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from egm_lib.files import json_line, read_jsonl, write_jsonl
from egm_lib.training import checkpoints, ranks
from egm_lib.training.checkpoints import require_file
from egm_lib.training.model_setup import TrainingError

SAVE_SECONDS = 30 * 60.0  # the default of a profile's save_minutes


class Clock(TrainerCallback):
    """Stops a training after max_minutes, saves every save_seconds, and logs each step as JSONL.

    Minutes add up over interruptions. The seconds between checkpoints count from the end of a save,
    so that a slow save is not followed by the next one at once. With several processes, rank 0
    keeps time, log and checkpoints, and decides for all.
    If TensorBoard is installed, the same numbers go into `tensorboard/<name of the log>` beside the
    log.
    """

    def __init__(
        self, log: Path, max_minutes: float | None = None, save_seconds: float = SAVE_SECONDS
    ):
        self.log, self.max_minutes, self.save_seconds = log, max_minutes, save_seconds
        self.before_s = 0.0  # of the training before it was interrupted
        self.board = None  # TensorBoard's writer
        self.began = self.saved = time.monotonic()
        self.now_s: float | None = None  # rank 0's time, if there are several processes

    @property
    def elapsed_s(self) -> float:
        """Seconds of training without interruptions; the same on every rank."""
        if self.now_s is not None:
            return self.now_s
        return self.before_s + time.monotonic() - self.began

    def progress(self, step: int, max_steps: int) -> float:
        """The share of the training that is done, 0 to 1, by steps or by time (the larger)."""
        by_steps = step / max_steps if max_steps > 0 else 0.0
        by_time = self.elapsed_s / (60 * self.max_minutes) if self.max_minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def on_train_begin(self, args, state, control, **kwargs):
        if ranks.is_main():
            self._open_log(state.global_step)
        (self.before_s,) = ranks.agreed(self.before_s, device=args.device)
        self.now_s = self.before_s if ranks.several() else None
        self.began = self.saved = time.monotonic()

    def _open_log(self, step: int) -> None:
        """Keeps the lines up to the step from which training continues."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_log(self.log) if row["step"] <= step] if step else []
        self.before_s = rows[-1]["elapsed_s"] if rows else 0.0
        write_jsonl(self.log, rows)
        if importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            folder = self.log.parent / "tensorboard" / self.log.stem
            if not step:  # the folder may hold curves of an earlier training
                shutil.rmtree(folder, ignore_errors=True)
            self.board = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=20)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        elapsed_s = self.before_s + now - self.began
        over = bool(self.max_minutes) and elapsed_s >= 60 * self.max_minutes
        save = not over and now - self.saved >= self.save_seconds
        if save and ranks.is_main():
            save = checkpoints.make_room(Path(args.output_dir), kwargs["model"])
            if not save:
                self.saved = now
        elapsed_s, over, save = ranks.agreed(elapsed_s, over, save, device=args.device)
        if ranks.several():
            self.now_s = elapsed_s
        if over:
            control.should_training_stop = True
        if save:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        ranks.barrier()  # every rank has written its part
        if ranks.is_main():
            checkpoints.mark_complete(Path(args.output_dir), state.global_step)
        self.saved = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "elapsed_s": round(self.elapsed_s, 2), **(logs or {})}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json_line(line))
        for name, value in line.items():
            if self.board and isinstance(value, int | float):
                self.board.add_scalar(name, value, state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self.board:
            self.board.close()


class TimedSchedule:
    """A trainer whose learning rate follows the clock if only minutes limit the training."""

    clock: Clock

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if not self.clock.max_minutes or self.args.max_steps > 0:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup = self.args.warmup_steps  # below 1: a share of the training
        shape = str(getattr(self.args.lr_scheduler_type, "value", self.args.lr_scheduler_type))
        shapes = {
            "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
            "linear": lambda done: 1.0 - done,
            "constant": lambda done: 1.0,
            "constant_with_warmup": lambda done: 1.0,
        }
        if shape not in shapes:
            raise TrainingError(
                f"schedule {shape!r} cannot follow max_minutes: use cosine, linear or constant"
            )

        def scale(step: int) -> float:
            done = self.clock.progress(step, num_training_steps)
            if warmup < 1 and done < warmup:
                return max(done, 1e-3) / warmup
            if step < warmup >= 1:
                return (step + 1) / (warmup + 1)
            return shapes[shape](done)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, scale)
        return self.lr_scheduler


def read_log(log: Path) -> list[dict]:
    """The lines of a training log that state a step and a time; others are left out."""
    if not log.exists():
        return []
    stated = [
        row
        for row in read_jsonl(log)
        if isinstance(row.get("step"), int) and isinstance(row.get("elapsed_s"), int | float)
    ]
    return stated


def logged_minutes(log: Path) -> float:
    """Minutes that a finished training took, according to its log."""
    rows = read_log(require_file(log, "the stage that writes it"))
    return max((row["elapsed_s"] for row in rows), default=0.0) / 60


def logged_tokens(log: Path) -> int | None:
    """Tokens of prompts and answers that a finished training processed, according to its log.

    In GRPO each completion counts with its prompt (TRL's `num_tokens`). None if the log does not
    state them.
    """
    rows = read_log(require_file(log, "the stage that writes it"))
    counts = [row["num_tokens"] for row in rows if isinstance(row.get("num_tokens"), int | float)]
    return int(max(counts)) if counts else None
