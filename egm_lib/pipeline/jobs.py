"""Long work in processes of its own: a notebook's kernel may die, a training may not."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from egm_lib.errors import EgmError
from egm_lib.files import project_root
from egm_lib.run import Run

POLL_S = 0.5
REPORT_S = 30.0  # one line of progress a process
LAST_LINES = 15


class JobFailed(EgmError, RuntimeError):
    """A process ended with an error; the message holds the last lines of its log."""


@dataclass(frozen=True)
class Job:
    """A command, and the file that takes what it prints (appended: a job that is run again goes
    on).
    """

    name: str
    command: Sequence[str]
    log: Path


def job(run: Run, module: str, *arguments: str) -> Job:
    """`python -m egm_lib.<module> --profile .. --seed .. <arguments>`, logged to
    logs/<module>-<arguments>.txt.
    """
    last = module.rpartition(".")[2]
    name = "-".join([last, *(text for text in arguments if not text.startswith("--"))])
    options = ["--profile", run.profile.name, "--seed", str(run.seed), *arguments]
    return Job(name, [sys.executable, "-m", f"egm_lib.{module}", *options], run.log(f"{name}.txt"))


def prediction_jobs(run: Run, models: Sequence[str]) -> list[Job]:
    """`egm_lib.inference.predict` for several models, dealt out to one job a worker: a process loads its
    libraries once.
    """
    count = min(_workers(run), len(models))
    jobs = []
    for number in range(count):
        options = [word for model in models[number::count] for word in ("--model", model)]
        name = f"predict-{number}"
        command = job(run, "inference.predict", *options).command
        jobs.append(Job(name, command, run.log(f"{name}.txt")))
    return jobs


def training_job(run: Run, module: str, *arguments: str) -> Job:
    """As `job`, through `accelerate launch` where the profile has a configuration of several
    processes.
    """
    plain, launch = job(run, module, *arguments), run.profile.launch
    if launch.accelerate_config is None:
        return plain
    config = Path(__file__).parent / "configs" / f"{launch.accelerate_config}.yaml"
    prefix = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    prefix += ["--num_processes", str(launch.num_processes)]
    return Job(plain.name, [*prefix, *plain.command[1:]], plain.log)


def data_job(run: Run) -> Job:
    """Makes the data root of the profile where it is not made: the miniature world, or files of
    real data.
    """
    root = str(run.profile.data.path)
    arguments = {
        "mini": ["egm_lib.mini.world", "--out", root, "--profile", run.profile.name],
        "refcoco": [
            "egm_lib.data",
            "prepare",
            "--root",
            root,
            *(f"--task={task}" for task in run.profile.tasks),
        ],
    }[run.profile.data.source]
    return Job("data", [sys.executable, "-m", *arguments], run.log("data.txt"))


def run_jobs(run: Run, jobs: Sequence[Job]) -> None:
    """Runs the jobs: side by side on one thread each where the profile says so, else one after
    another.
    """
    run_side_by_side(jobs, _workers(run))


def _workers(run: Run) -> int:
    return (os.cpu_count() or 1) if run.profile.launch.side_by_side else 1


def run_side_by_side(jobs: Sequence[Job], workers: int) -> None:
    """Runs at most `workers` jobs at a time, with a line of progress every half minute.

    Several workers are single-threaded: on a small machine two threads in one process are slower
    than two processes.
    Raises JobFailed at the first that fails; it and Ctrl-C end the others, which go on when they
    are run again.
    """
    single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (single if workers > 1 else {})
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_Process(waiting.pop(0), environment))
            time.sleep(POLL_S)
            for process in list(running):
                if process.ended():
                    running.remove(process)
    finally:
        for process in running:
            process.stop()


def _end_with_parent() -> None:
    """A kernel that is killed takes its processes along; else a second run would train beside an
    orphan.
    """
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class _Process:
    def __init__(self, job: Job, environment: dict[str, str]):
        self.job, self.began, self.reported = job, time.monotonic(), time.monotonic()
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with open(job.log, "ab") as log:
            self.start = log.tell()
            self.process = subprocess.Popen(
                job.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=project_root(),
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        print(f"{job.name}: started", flush=True)

    def ended(self) -> bool:
        """Whether the process has ended well; raises JobFailed where it has not ended well."""
        code = self.process.poll()
        if code is None:
            if time.monotonic() - self.reported >= REPORT_S:
                self.reported = time.monotonic()
                print(
                    f"{self.job.name}: {self.minutes()}, {(self.lines() or ['...'])[-1][:120]}",
                    flush=True,
                )
            return False
        if code:
            lines = "\n".join(self.lines()[-LAST_LINES:])
            raise JobFailed(
                f"{self.job.name} ended with code {code} after {self.minutes()} ({self.job.log}):\n{lines}"
            )
        print(f"{self.job.name}: done in {self.minutes()}", flush=True)
        return True

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def minutes(self) -> str:
        seconds = round(time.monotonic() - self.began)
        return f"{seconds // 60} min {seconds % 60:02} s"

    def lines(self) -> list[str]:
        """What this process has printed; of a progress bar the last state."""
        with open(self.job.log, "rb") as log:
            log.seek(max(self.start, self.job.log.stat().st_size - 20_000))
            text = log.read().decode("utf-8", errors="replace")
        return [line.rsplit("\r", 1)[-1].strip() for line in text.splitlines() if line.strip()]
