"""Checkpoints: where a training continues after an interruption, and where its model ends up.

A checkpoint counts when all of it is written: a file named `complete` comes last. A training that
is killed while it saves continues from the checkpoint before.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from egm_lib.files import write_text
from egm_lib.inference.loading import save_processor, video_half
from egm_lib.inference.model_folder import ADAPTER, check_whole, find_checkpoint
from egm_lib.run import Run
from egm_lib.training import ranks
from egm_lib.training.model_setup import TrainingError

COMPLETE = "complete"  # the file that is written last
CONTINUES = "The training continues from"  # in the log of one that was interrupted
# Bytes a trained parameter: weights in half precision, float32 weights and Adam's two moments.
# In float32 it is 12, so that 14 is enough for both.
STATE_BYTES = 14
WEIGHT_BYTES = 4  # of a frozen parameter


def work_folder(out: Path) -> Path:
    """Where checkpoints are kept during the training: beside the finished model."""
    return out.with_name(f"{out.name}.unfinished")


def is_finished(out: Path) -> bool:
    return (out / "config.json").is_file()


def checkpoint_bytes(model) -> int:
    """Size of a checkpoint of a model with its optimizer.

    Under ZeRO-3 an attribute of the parameters counts what is divided among the processes.
    """
    sizes = [
        (getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad)
        for parameter in model.parameters()
    ]
    return sum(size * (STATE_BYTES if trained else WEIGHT_BYTES) for size, trained in sizes)


def last_complete(work: Path) -> Path | None:
    """The newest whole checkpoint of a folder; None without one. Unfinished ones are removed."""
    ranks.barrier()
    folders = [Path(folder) for folder in sort_checkpoints(str(work))] if work.is_dir() else []
    whole = [folder for folder in folders if (folder / COMPLETE).is_file()]
    ranks.barrier()  # every rank has looked before one of them removes
    if ranks.is_main():
        for folder in folders:
            if folder not in whole:
                print(f"{folder} was not written to its end, and is removed.")
                shutil.rmtree(folder)
    ranks.barrier()
    return whole[-1] if whole else None


def mark_complete(work: Path, step: int) -> None:
    """Marks the checkpoint of a step as whole, then removes the older ones."""
    newest = work / f"checkpoint-{step}"
    write_text(newest / COMPLETE, "")
    for folder in map(Path, sort_checkpoints(str(work))):
        if folder != newest:
            shutil.rmtree(folder)


def make_room(work: Path, model) -> bool:
    """Whether the disk takes one more checkpoint.

    The one before stays until the next is whole, if there is room for both; where the disk is
    short, it goes first. Where not even one fits, nothing is removed.
    """
    work.mkdir(parents=True, exist_ok=True)
    needed, free = checkpoint_bytes(model), shutil.disk_usage(work).free
    if needed <= free:
        return True
    folders = [Path(folder) for folder in sort_checkpoints(str(work))]
    held = sum(
        file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file()
    )
    if needed > free + held:
        print(
            f"No checkpoint is saved: it takes {needed / 1e9:.1f} GB, and {work} has "
            f"{(free + held) / 1e9:.1f} GB. Training continues; free some space."
        )
        return False
    print(f"{work} has no room for two checkpoints: the older one goes before the next is saved.")
    for folder in folders:
        shutil.rmtree(folder)
    return True


def train_to(trainer, processor, out: Path) -> Path:
    """Trains, from the last whole checkpoint if there is one, and puts the model into `out`.

    The folder appears whole or not at all, with `processor` beside the weights.
    """
    work, origin = work_folder(out), trainer.model.name_or_path
    resume = last_complete(work)
    if resume is not None and ranks.is_main():
        print(f"{CONTINUES} {resume}")
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    finished = work / "finished"
    if hasattr(trainer.model, "merge_and_unload"):  # LoRA: later stages want a whole model
        if ranks.is_main():
            model = trainer.accelerator.unwrap_model(trainer.model)
            model.merge_and_unload().save_pretrained(str(finished))
    else:
        trainer.save_model(str(finished))
    ranks.barrier()
    if ranks.is_main():
        save_processor(processor, finished, video_half(origin))
        # A pickle: nobody should have to trust it
        (finished / "training_args.bin").unlink(missing_ok=True)
        if out.exists():
            shutil.rmtree(out)
        os.replace(finished, out)
        shutil.rmtree(work)
    ranks.barrier()  # a rank that ends earlier makes the launcher end the job
    return out


def require_file(path: Path, made_by: str) -> Path:
    if not path.is_file():
        raise TrainingError(f"{path} is missing: run {made_by} first.")
    return path


def require_checkpoint(run: Run, task: str, model: str, made_by: str) -> Path:
    path = run.checkpoint(task, model)
    if (path / ADAPTER).is_file():  # TRL and vLLM read the folder themselves
        check_whole(find_checkpoint(path), "a training that starts from it")
    if not is_finished(path):
        raise TrainingError(f"{path} holds no finished model: run {made_by} first.")
    return path
