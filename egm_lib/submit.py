"""Notebooks 04-06 of a profile without a screen: through SLURM, or here.

    python -m egm_lib.submit --profile paper-qwen3vl-8b [--hours 24] [--launcher local]

The SLURM script is rendered from egm_lib/configs/slurm.sh.template into the run's folder, to be
read and changed.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

from egm_lib import reproduce
from egm_lib.data.records import atomic_open
from egm_lib.profile import ProfileError, Run, load_profile, project_root

TEMPLATE = Path(__file__).parent / "configs" / "slurm.sh.template"


def render(run: Run, hours: int) -> str:
    """The job script of a run. Raises ValueError where the template asks for a value that we do not
    have.
    """
    values = {
        "profile": run.profile.name,
        "seed": run.seed,
        "gpus": run.profile.launch.num_processes,
        "hours": hours,
        "root": run.root,
        "project": project_root(),
    }
    text = TEMPLATE.read_text(encoding="utf-8").replace("{{...}}", "placeholders")
    if unknown := set(re.findall(r"\{\{(.*?)\}\}", text)) - set(values):
        raise ValueError(
            f"{TEMPLATE.name} asks for {', '.join(sorted(unknown))}; there are {', '.join(values)}"
        )
    return re.sub(r"\{\{(.*?)\}\}", lambda match: str(values[match[1]]), text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.submit", description="Notebooks 04-06 on a GPU node."
    )
    parser.add_argument("--profile", required=True)
    parser.add_argument("--seed", type=int, help="default: the profile's first")
    parser.add_argument(
        "--hours", type=int, default=24, help="of a job; one that runs out of time is queued again"
    )
    parser.add_argument("--launcher", choices=("slurm", "local"), default="slurm")
    args = parser.parse_args(argv)
    try:
        profile = load_profile(args.profile)
        run = Run(profile, profile.seeds[0] if args.seed is None else args.seed)
        if args.launcher == "local":
            return reproduce.main(
                [
                    "--profile",
                    profile.name,
                    "--seed",
                    str(run.seed),
                    "--first",
                    "04",
                    "--last",
                    "06",
                ]
            )
        script = run.root / "submit.sh"
        with atomic_open(script) as file:
            file.write(render(run, args.hours))
        (run.root / "logs").mkdir(parents=True, exist_ok=True)
    except (ProfileError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    if shutil.which("sbatch") is None:
        print(
            f"{script} is written, but there is no sbatch here; --launcher local runs the same.",
            file=sys.stderr,
        )
        return 1
    return subprocess.run(["sbatch", str(script)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
