"""Long work in separate processes, so that it survives the death of a notebook's kernel.

Every process sees only the GPUs that its job takes. A kernel sees none, because a library that
looks for GPUs must not find those on which another process trains.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from egm_lib.errors import EgmError
from egm_lib.files import project_root
from egm_lib.pipeline.launch import launch_command
from egm_lib.profile import Generation, generation_of
from egm_lib.run import Run

POLL_S = 0.5
REPORT_S = 30.0  # a line of progress for each process
STOP_S = 45.0  # torch's elastic launcher gives its own processes 30 s to stop
LAST_LINES = 15
VISIBLE, KEPT = "CUDA_VISIBLE_DEVICES", "EGM_VISIBLE_DEVICES"


class JobFailed(EgmError, RuntimeError):
    """A process ended with an error; the message holds the last lines of its log."""


@dataclass(frozen=True)
class Job:
    """A command, and the file that takes what it prints. The log is appended to by a rerun.

    gpus: how many GPUs it takes on a machine that has some.
    shard: it shares its work with others, which run at the same time.
    """

    name: str
    command: Sequence[str]
    log: Path
    gpus: int = 1
    shard: bool = False


def job(run: Run, module: str, *arguments: str, gpus: int = 1) -> Job:
    """`python -m egm_lib.<module> --profile .. --seed .. <arguments>`.

    Its log is logs/<last part of the module>-<values of the arguments>.txt.
    """
    values = [text for text in arguments if not text.startswith("--")]
    name = "-".join([module.rpartition(".")[2], *values])
    options = ["--profile", run.profile.name, "--seed", str(run.seed), *arguments]
    command = [sys.executable, "-m", f"egm_lib.{module}", *options]
    return Job(name, command, run.log(f"{name}.txt"), gpus)


def prediction_jobs(run: Run, models: Sequence[str], *arguments: str) -> list[Job]:
    """`egm_lib.inference.predict` for several models, each by as many processes as the machine has
    room for (`shard_jobs`).

    Where models would answer one after the other anyway, one process answers for all that run on
    transformers, so that it loads its libraries once. vLLM has a process for each.
    """
    engines = {model: _generation(run, model).engine for model in models}
    served = [model for model in models if engines[model] == "openai"]
    in_turn = len(visible_gpus()) < 2
    together = [model for model in models if in_turn and engines[model] == "transformers"]
    alone = [model for model in models if model not in (*served, *together)]
    groups = [[model] for model in alone] + ([together] if together else [])
    return [
        job
        for group in (*([model] for model in served), *groups)
        for job in shard_jobs(
            run,
            group,
            "inference.predict",
            *(word for model in group for word in ("--model", model)),
            *arguments,
        )
    ]


def shard_jobs(run: Run, models: Sequence[str], module: str, *arguments: str) -> list[Job]:
    """`job` for work with models that takes `--shard I/N`: N processes, one for each copy of the
    models that the machine has room for.

    That is the number of GPUs, divided by the models' tensor_parallel; without GPUs
    `launch.prediction_workers`. A server is asked by one process, which keeps it busy alone.
    """
    gpus, total = max(gpus_of(run, model) for model in models), len(visible_gpus())
    if gpus == 0:
        count = 1
    elif total:
        count = max(1, total // gpus)
    else:
        count = run.profile.launch.prediction_workers
    jobs = []
    for number in range(1, count + 1):
        shard = ["--shard", f"{number}/{count}"] if count > 1 else []
        name = "-".join([module.rpartition(".")[2], *models, *shard[1:]]).replace("/", "-of-")
        command = job(run, module, *arguments, *shard).command
        jobs.append(Job(name, command, run.log(f"{name}.txt"), gpus, shard=count > 1))
    return jobs


def latency_job(run: Run, models: Sequence[str]) -> Job:
    """One process that measures the latency of several models, one after the other."""
    options = [word for model in models for word in ("--model", model)]
    gpus = max(gpus_of(run, model) for model in models)
    return job(run, "inference.predict", "--latency", *options, gpus=gpus)


def _generation(run: Run, model: str) -> Generation:
    models = run.profile.models
    return generation_of(run.profile, models.named(model) or models.small)


def gpus_of(run: Run, model: str) -> int:
    """GPUs that one copy of a model takes in a process of its own."""
    generation = _generation(run, model)
    return {"openai": 0, "transformers": 1, "vllm": generation.tensor_parallel}[generation.engine]


def training_job(run: Run, module: str, *arguments: str) -> Job:
    """As `job`, through `accelerate launch` where the profile names a configuration for it.

    gpus: those of one node.
    """
    launch = run.profile.launch
    plain = job(run, module, *arguments, gpus=launch.num_processes // launch.nodes)
    if launch.accelerate_config is None:
        return plain
    return replace(plain, command=launch_command(launch, plain.command[1:]))


def data_job(run: Run) -> Job:
    """Makes the profile's data root where it is not made: the miniature world, or real data."""
    root = str(run.profile.data.path)
    if run.profile.data.source == "mini":
        arguments = ["egm_lib.mini.world", "--out", root, "--profile", run.profile.name]
    else:
        tasks = [f"--task={task}" for task in run.profile.tasks]
        arguments = ["egm_lib.data", "prepare", "--root", root, *tasks]
    return Job("data", [sys.executable, "-m", *arguments], run.log("data.txt"), gpus=0)


def run_jobs(run: Run, jobs: Sequence[Job]) -> None:
    """Runs the jobs, as many at a time as the profile and the machine's GPUs allow."""
    cores = (os.cpu_count() or 1) if run.profile.launch.side_by_side else 1
    shards = sum(job.shard for job in jobs)
    run_side_by_side(jobs, max(cores, len(visible_gpus()) or shards))


def visible_gpus() -> list[str]:
    """The GPUs that this process may give to its jobs, named as in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get(KEPT, os.environ.get(VISIBLE))
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch  # counted by the driver's library, which initialises nothing on a GPU

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def without_gpus() -> Iterator[None]:
    """Within this context, new processes see no GPU, but their jobs still know which there are."""
    before = {name: os.environ.get(name) for name in (VISIBLE, KEPT)}
    os.environ[KEPT], os.environ[VISIBLE] = ",".join(visible_gpus()), ""
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def run_side_by_side(jobs: Sequence[Job], workers: int) -> None:
    """Runs at most `workers` jobs at a time, with a line of progress every half minute.

    Without GPUs, several workers are single-threaded: on a small machine two threads in one process
    are slower than two processes. Raises JobFailed at the first job that fails. That, and Ctrl-C,
    end the others, which continue when they are run again.
    """
    free = visible_gpus()
    total = len(free)
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            while waiting and len(running) < workers and len(free) >= min(waiting[0].gpus, total):
                first = waiting.pop(0)
                taken, free = free[: first.gpus], free[first.gpus :]
                running.append(_Process(first, _environment(workers, taken, total), taken))
            time.sleep(POLL_S)
            for process in list(running):
                if process.ended():
                    running.remove(process)
                    free += process.gpus
    finally:
        for process in running:
            process.stop()


def _environment(workers: int, gpus: Sequence[str], total: int) -> dict[str, str]:
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if total:
        environment |= {VISIBLE: ",".join(gpus), KEPT: ",".join(gpus)}
    elif workers > 1:
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false"}
    return environment


def _end_with_parent() -> None:
    """Has Linux end this process with its parent: no second run then trains beside an orphan."""
    pr_set_pdeathsig = 1  # <sys/prctl.h>
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


class _Process:
    def __init__(self, job: Job, environment: dict[str, str], gpus: Sequence[str]):
        self.job, self.gpus = job, list(gpus)
        self.began = self.reported = time.monotonic()
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
        """Whether the process has ended well. Raises JobFailed if it has ended in an error."""
        code = self.process.poll()
        if code is None:
            if time.monotonic() - self.reported >= REPORT_S:
                self.reported = time.monotonic()
                last = (self.lines() or ["..."])[-1][:120]
                print(f"{self.job.name}: {self.minutes()}, {last}", flush=True)
            return False
        if code:
            lines = "\n".join(self.lines()[-LAST_LINES:])
            raise JobFailed(
                f"{self.job.name} ended with code {code} after {self.minutes()}. The end of its "
                f"log, {self.job.log}:\n{lines}"
            )
        print(f"{self.job.name}: done in {self.minutes()}", flush=True)
        return True

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def minutes(self) -> str:
        seconds = round(time.monotonic() - self.began)
        return f"{seconds // 60} min {seconds % 60:02} s"

    def lines(self) -> list[str]:
        """What this process has printed; of a progress bar only its last state."""
        with open(self.job.log, "rb") as log:
            log.seek(max(self.start, self.job.log.stat().st_size - 20_000))
            text = log.read().decode("utf-8", errors="replace")
        return [line.rsplit("\r", 1)[-1].strip() for line in text.split("\n") if line.strip()]
