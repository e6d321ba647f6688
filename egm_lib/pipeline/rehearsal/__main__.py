"""A paper profile from its first notebook to its last on stand-ins, before anybody rents a GPU.

    python -m egm_lib.pipeline.rehearsal --profile paper-qwen3vl-8b

The same notebooks, trainers and tables; tiny random checkpoints with the real tokenizers, drawn
images in the real annotation formats, a local server in place of the paid services. Started again,
it continues.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from egm_lib.cli import ends
from egm_lib.curation.stages import BUDGET_VARIABLE
from egm_lib.files import project_root
from egm_lib.pipeline.manifest import open_manifest
from egm_lib.pipeline.rehearsal.checks import check_run
from egm_lib.pipeline.rehearsal.overlay import (
    PREFIX,
    build_standins,
    rehearsal_profile,
    rehearsed_port,
)
from egm_lib.pipeline.rehearsal.services import ENVIRONMENT, running
from egm_lib.pipeline.reproduce import reproduce
from egm_lib.profile import PROFILES_VARIABLE, load_profile
from egm_lib.run import Run

# Stand-ins are so small that several threads wait for each other longer than they work.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}

SHOWN = """
Rehearsed: the profile's notebooks, the annotation formats, tokenizers and chat templates, the form
of requests to teachers and judges, both trainings, selection, predictions and tables."""
NOT_SHOWN = """
Not rehearsed: several processes and ZeRO-3, vLLM, half precision, memory and speed at real sizes,
weights that know anything, downloads."""


def rehearse(name: str, folder: Path, *, full: bool, fresh: bool = False) -> Run:
    """Runs the rehearsal of a profile, and checks what it left behind; returns the run.

    fresh: without the files of an earlier rehearsal, which it removes. Prints the time of each
    stage. Every process has one thread. The local server takes a free port; a rehearsal that
    continues needs the same one again. Raises what `reproduce` and `check_run` raise, and OSError
    where that port is taken.
    """
    began = time.monotonic()
    os.environ |= ONE_THREAD  # for the processes to come
    torch.set_num_threads(1)
    build_standins(name, folder)
    print(f"Stand-ins in {folder}: {time.monotonic() - began:.0f} s", flush=True)
    port = None if fresh else rehearsed_port(name, folder)
    with running(port or 0) as services:
        path = rehearsal_profile(name, folder, full=full, services_url=services.root_url)
        os.environ |= ENVIRONMENT | {PROFILES_VARIABLE: str(path.parent), BUDGET_VARIABLE: "1000"}
        profile = load_profile(PREFIX + name)
        run = Run(profile, profile.seeds[0])
        if fresh:
            shutil.rmtree(run.root, ignore_errors=True)
        reproduce(run)
    print("\nSeconds of each stage, earlier attempts included:")
    for stage, seconds in open_manifest(run)["wall_seconds"].items():
        print(f"  {stage:30} {seconds:6.0f}")
    print(f"  {'all, with stand-ins':30} {time.monotonic() - began:6.0f}")
    used = sum(os.times()[:4])  # user and system; this process and those that it started
    print(f"  {'of processor time':30} {used:6.0f}\n")
    print(*check_run(run), sep="\n")
    refused = sum(number for (*_, status), number in services.counts.items() if status != 200)
    print(f"stand-in services: {services.counts.total()} requests, {refused} refused")
    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.pipeline.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", default="paper-qwen3vl-8b", help="default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, help="of the stand-ins; default: data/raw/rehearsal/PROFILE"
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew, not where it stopped")
    args = parser.parse_args(argv)
    folder = args.folder or project_root() / "data" / "raw" / "rehearsal" / args.profile

    def work() -> None:
        run = rehearse(args.profile, folder, full=False, fresh=args.fresh)
        print(f"{SHOWN}\n{NOT_SHOWN}\n\n{run.root}")

    return ends(work)


if __name__ == "__main__":
    sys.exit(main())
