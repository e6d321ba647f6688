"""Notebooks 04-06 of a profile without a screen: through SLURM, or on this machine.

    python -m egm_lib.pipeline.submit --profile paper-qwen3vl-8b [--hours 24] [--launcher local]

The SLURM script is written into the run's folder from pipeline/configs/slurm.sh.template, to be
read and changed.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.errors import InputError
from egm_lib.files import project_root, write_text
from egm_lib.pipeline import reproduce
from egm_lib.run import Run

TEMPLATE = Path(__file__).parent / "configs" / "slurm.sh.template"


def render(run: Run, hours: int) -> str:
    """The job script of a run. Raises InputError if the template asks for an unknown value."""
    values = {
        "profile": run.profile.name,
        "seed": run.seed,
        "gpus": run.profile.launch.num_processes,
        "hours": hours,
        # sbatch reads %j and the like in a file name, and takes it in quotes.
        "output": str(run.root / "logs").replace("%", "%%").replace('"', r"\""),
        "project": shlex.quote(str(project_root())),
    }
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{...}}", "placeholders")
    if unknown := set(re.findall(r"\{\{(.*?)\}\}", text)) - set(values):
        known = ", ".join(values)
        raise InputError(f"{TEMPLATE.name} asks for {', '.join(sorted(unknown))}; known: {known}.")
    return re.sub(r"\{\{(.*?)\}\}", lambda match: str(values[match[1]]), text)


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.submit", "Notebooks 04-06 on a GPU node.")
    parser.add_argument(
        "--hours", type=int, default=24, help="of one job; it is queued again when they run out"
    )
    parser.add_argument("--launcher", choices=("slurm", "local"), default="slurm")
    args = parser.parse_args(argv)
    return ends(lambda: _submit(args))


def _submit(args: argparse.Namespace) -> int:
    run = run_of(args)
    if args.launcher == "local":
        options = ["--profile", run.profile.name, "--seed", str(run.seed)]
        return reproduce.main([*options, "--first", "04", "--last", "06"])
    script = run.root / "submit.sh"
    write_text(script, render(run, args.hours))
    (run.root / "logs").mkdir(parents=True, exist_ok=True)
    if shutil.which("sbatch") is None:
        raise InputError(
            f"{script} is written, but this machine has no sbatch; --launcher local runs the same."
        )
    return subprocess.run(["sbatch", str(script)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
