"""A paper profile from its first notebook to its last on stand-ins, before anybody rents a GPU.

    python -m egm_lib.pipeline.rehearsal --profile paper-qwen3vl-8b [--full]

The same notebooks, trainers and tables; tiny random checkpoints with the real tokenizers, drawn
images in the real annotation formats, a local server in place of the paid services. Started again,
it continues. A full rehearsal has two processes with ZeRO-3, and vLLM; on a machine without GPUs it
uses vLLM's and DeepSpeed's CPU builds (`make rehearse FULL=1` installs them).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

from egm_lib.cli import ends
from egm_lib.curation.stages import BUDGET_VARIABLE
from egm_lib.files import project_root
from egm_lib.pipeline.manifest import open_manifest
from egm_lib.pipeline.rehearsal.checks import RehearsalError, check_full_run, check_run
from egm_lib.pipeline.rehearsal.interruption import kill_sft
from egm_lib.pipeline.rehearsal.overlay import (
    build_standins,
    rehearsal_name,
    rehearsal_profile,
    rehearsed_port,
)
from egm_lib.pipeline.rehearsal.services import ENVIRONMENT, running
from egm_lib.pipeline.reproduce import reproduce
from egm_lib.profile import PROFILES_VARIABLE, load_profile
from egm_lib.run import Run

# Stand-ins are so small that several threads wait for each other longer than they work.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# What vLLM and DeepSpeed need where there is no GPU: a first folder of Python's path, which
# `make rehearse FULL=1` sets, and these variables
CPU_SITE = str(Path(__file__).parent / "cpu_site")
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1"}

SHOWN = """
Rehearsed: the profile's notebooks, the annotation formats, tokenizers and chat templates, the form
of requests to teachers and judges, both trainings, selection, predictions and tables."""
SHOWN_IF_FULL = """
Also ZeRO-3 on {processes}, SFT that is killed and continues, rollouts by vLLM compared with the
trainer at each update, predictions by vLLM, and half precision, on {device}."""
NOT_SHOWN = """
Not rehearsed: several processes and ZeRO-3, vLLM, half precision, memory and speed at real sizes,
weights that know anything, downloads."""
NOT_SHOWN_IF_FULL = """
Not rehearsed: {processes}, memory and speed at real sizes, weights that know anything,
downloads{devices}."""


def rehearse(name: str, folder: Path, *, full: bool, fresh: bool = False) -> Run:
    """Runs the rehearsal of a profile, and checks what it left behind; returns the run.

    full: SFT is killed once on the way. fresh: without the files of an earlier rehearsal, which it
    removes. Prints the time of each stage. Every process has one thread. The local server takes a
    free port; a rehearsal that continues needs the same one again. Raises what `reproduce` and the
    checks raise, RehearsalError where a full one lacks a library, and OSError where the port is
    taken.
    """
    began = time.monotonic()
    if full:
        _prepare_full()
    os.environ |= ONE_THREAD  # for the processes to come
    torch.set_num_threads(1)
    build_standins(name, folder)
    print(f"Stand-ins in {folder}: {time.monotonic() - began:.0f} s", flush=True)
    port = None if fresh else rehearsed_port(name, folder, full=full)
    with running(port or 0) as services:
        path = rehearsal_profile(name, folder, full=full, services_url=services.root_url)
        os.environ |= ENVIRONMENT | {PROFILES_VARIABLE: str(path.parent), BUDGET_VARIABLE: "1000"}
        profile = load_profile(rehearsal_name(name, full=full))
        run = Run(profile, profile.seeds[0])
        if fresh:
            shutil.rmtree(run.root, ignore_errors=True)
        if full:
            reproduce(run, last=3)
            kill_sft(run)
        reproduce(run)
    print("\nSeconds of each stage, earlier attempts included:")
    for stage, seconds in open_manifest(run)["wall_seconds"].items():
        print(f"  {stage:30} {seconds:6.0f}")
    print(f"  {'all, with stand-ins':30} {time.monotonic() - began:6.0f}")
    used = sum(os.times()[:4])  # user and system; this process and those that it started
    print(f"  {'of processor time':30} {used:6.0f}\n")
    print(*check_run(run), *(check_full_run(run) if full else ()), sep="\n")
    refused = sum(number for (*_, status), number in services.counts.items() if status != 200)
    print(f"stand-in services: {services.counts.total()} requests, {refused} refused")
    return run


def _prepare_full() -> None:
    """Sets what the processes of a full rehearsal need.

    Raises RehearsalError for a library that is missing, and on a machine without GPUs where Python
    was started without cpu_site.
    """
    advice = "start it with `make rehearse FULL=1`, which makes and uses an environment for it."
    for name in ("vllm", "deepspeed"):
        if importlib.util.find_spec(name) is None:
            raise RehearsalError(f"a full rehearsal needs {name}: {advice}")
    if torch.cuda.is_available():
        return
    if CPU_SITE not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        raise RehearsalError(
            f"a full rehearsal without GPUs needs {CPU_SITE} on PYTHONPATH: {advice}"
        )
    os.environ |= ON_A_CPU


def _told(full: bool, num_processes: int) -> str:
    """What a rehearsal shows, and what it does not. num_processes: of a training."""
    if not full:
        return SHOWN + "\n" + NOT_SHOWN
    gpus, several = torch.cuda.is_available(), num_processes > 1
    shown = SHOWN_IF_FULL.format(
        processes=f"{num_processes} processes" if several else "one process",
        device="GPUs" if gpus else "a CPU",
    )
    not_shown = NOT_SHOWN_IF_FULL.format(
        processes="more than two processes" if several else "several processes",
        devices="" if gpus else ", GPUs",
    )
    return f"{SHOWN}{shown}\n{not_shown}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.pipeline.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", default="paper-qwen3vl-8b", help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="of the stand-ins; default: data/raw/rehearsal/PROFILE"
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="two processes with ZeRO-3, and vLLM; minutes to an hour",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, not where it stopped")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    folder = args.folder or project_root() / "data" / "raw" / "rehearsal" / args.profile

    def work() -> None:
        run = rehearse(args.profile, folder, full=args.full, fresh=args.fresh)
        print(f"{_told(args.full, run.profile.launch.num_processes)}\n\n{run.root}")

    return ends(work)


if __name__ == "__main__":
    sys.exit(main())
