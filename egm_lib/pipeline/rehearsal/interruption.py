"""A training whose processes are killed at its first checkpoint, as on a machine that fails."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from egm_lib.files import project_root
from egm_lib.pipeline.jobs import training_job
from egm_lib.pipeline.rehearsal.checks import RehearsalError
from egm_lib.run import Run
from egm_lib.training.checkpoints import COMPLETE, is_finished, work_folder

POLL_S = 0.02


def kill_sft(run: Run) -> None:
    """Starts SFT of the first task, and kills it at its first whole checkpoint.

    Nothing is done where SFT has a whole checkpoint or a model already. Raises RehearsalError if it
    ends by itself before.
    """
    task = run.profile.tasks[0]
    out = run.checkpoint(task, "small-sft")
    work, sft = work_folder(out), training_job(run, "sft", "--task", task)

    def checkpoints() -> list[Path]:
        return list(work.glob(f"checkpoint-*/{COMPLETE}"))

    if is_finished(out) or checkpoints():
        return
    sft.log.parent.mkdir(parents=True, exist_ok=True)
    with open(sft.log, "ab") as log:
        process = subprocess.Popen(
            sft.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=project_root(),
        )
    try:
        while not checkpoints():
            if process.poll() is not None:
                raise RehearsalError(
                    f"{sft.name} ended with code {process.returncode} before its first "
                    f"checkpoint; its log: {sft.log}"
                )
            time.sleep(POLL_S)
    finally:
        _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Kills the launcher, and each process that it started, without a chance to tidy up."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for child in family:
        child.kill()
    process.wait()
    psutil.wait_procs(family)
