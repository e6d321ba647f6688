"""The clock that limits a run, its log and its learning-rate schedule.

A log is JSONL, one line a step, and the same for TensorBoard: `tensorboard --logdir data/runs`.
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
from egm_lib.training.checkpoints import require_file
from egm_lib.training.model_setup import TrainingError


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
        rows = read_jsonl(self.log) if state.global_step and self.log.exists() else []
        rows = [row for row in rows if row["step"] <= state.global_step]
        self.before_s = rows[-1]["elapsed_s"] if rows else 0.0
        write_jsonl(self.log, rows)
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
                file.write(json_line(line))
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


def logged_minutes(log: Path) -> float:
    """Minutes of training that a finished stage's log tells."""
    rows = read_jsonl(require_file(log, "the stage that writes it"))
    return max((row["elapsed_s"] for row in rows), default=0.0) / 60
