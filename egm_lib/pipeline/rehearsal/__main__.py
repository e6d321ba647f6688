"""A paper profile from its first notebook to its last on stand-ins, before anybody rents a GPU.

    python -m egm_lib.pipeline.rehearsal --profile paper-qwen3vl-8b

The same notebooks, trainers and tables; tiny random checkpoints with the real tokenizers, drawn
images in the real annotation formats, a local server in place of the paid services. Started again,
it continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

from egm_lib.cli import ends
from egm_lib.curation.stages import BUDGET_VARIABLE
from egm_lib.files import project_root
from egm_lib.pipeline.rehearsal.overlay import (
    PREFIX,
    SERVICES_URL,
    build_standins,
    rehearsal_profile,
)
from egm_lib.pipeline.rehearsal.services import ENVIRONMENT, running
from egm_lib.pipeline.reproduce import reproduce
from egm_lib.profile import PROFILES_VARIABLE, load_profile
from egm_lib.run import Run

PROVED = """
Rehearsed: every notebook, the annotation formats, tokenizers and chat templates, what teachers and
judges are asked and refuse, the trainers on one process, selection, predictions and tables.
Not rehearsed here: weights that know anything, several processes and ZeRO-3, vLLM, half precision,
memory and speed at real sizes, downloads."""


def rehearse(name: str, folder: Path, *, full: bool) -> Path:
    """Runs the rehearsal of a profile; returns the run's folder.

    Raises what `reproduce` raises, and OSError where the local server's port is taken.
    """
    build_standins(name, folder)
    path = rehearsal_profile(name, folder, full=full)
    os.environ |= ENVIRONMENT | {PROFILES_VARIABLE: str(path.parent), BUDGET_VARIABLE: "1000"}
    profile = load_profile(PREFIX + name)
    run = Run(profile, profile.seeds[0])
    with running(urlsplit(SERVICES_URL).port):
        reproduce(run)
    return run.root


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.pipeline.rehearsal", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--profile", default="paper-qwen3vl-8b", help="default: %(default)s")
    parser.add_argument("--folder", type=Path, help="of the stand-ins; default: data/raw/rehearsal")
    args = parser.parse_args(argv)
    folder = args.folder or project_root() / "data" / "raw" / "rehearsal"

    def work() -> None:
        print(rehearse(args.profile, folder, full=False))
        print(PROVED)

    return ends(work)


if __name__ == "__main__":
    sys.exit(main())
