"""Where a model is trained and where it stands when finished; how a training resumes and ends."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from egm_lib.inference.loading import save_processor, video_half
from egm_lib.run import Run
from egm_lib.training.model_setup import TrainingError


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


def require_file(path: Path, made_by: str) -> Path:
    if not path.is_file():
        raise TrainingError(f"{path} is missing: run {made_by} first.")
    return path


def require_checkpoint(run: Run, task: str, model: str, made_by: str) -> Path:
    path = run.checkpoint(task, model)
    if not is_finished(path):
        raise TrainingError(f"{path} holds no finished model: run {made_by} first.")
    return path
