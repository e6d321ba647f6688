"""A profile without a screen: through SLURM, or on this machine.

    python -m egm_lib.pipeline.submit --profile paper-qwen3vl-8b [--hours 24] [--launcher local]
    python -m egm_lib.pipeline.submit --profile paper-qwen3vl-8b --predict small-egm --shards 16

The first submits notebooks 04-06, on as many nodes as `launch.nodes` says. The second submits the
predictions of a model as an array, a task for each shard. The SLURM script is written into the
run's folder from a template of pipeline/configs, to be read and changed.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from egm_lib.cli import ends, run_of, run_parser
from egm_lib.errors import InputError
from egm_lib.files import project_root, write_text
from egm_lib.grpo import SERVER_VARIABLE, server_command
from egm_lib.pipeline import reproduce
from egm_lib.pipeline.jobs import gpus_of
from egm_lib.profile import generation_of
from egm_lib.run import Run

CONFIGS = Path(__file__).parent / "configs"
TRAINING, PREDICTION = "slurm.sh.template", "predict.sh.template"


def render(run: Run, hours: int) -> str:
    """The job script of a run's trainings."""
    launch, on_server = run.profile.launch, run.profile.grpo.rollout == "vllm-server"
    values = {
        "gpus": launch.num_processes // launch.nodes,
        "nodes": launch.nodes + on_server,
        "server": _server(run) if on_server else "",
    }
    return _fill(TRAINING, run, hours, values)


def render_prediction(run: Run, model: str, shards: int, hours: int) -> str:
    """The script of an array of jobs, each of which answers a shard for a model."""
    values = {"model": model, "shards": shards, "gpus": gpus_of(run, model)}
    return _fill(PREDICTION, run, hours, values)


def _server(run: Run) -> str:
    """Lines that start the vLLM server of GRPO's rollouts on the node after those that train.

    It begins with the weights of the small model; TRL sends it those that it trains.
    """
    launch, small = run.profile.launch, run.profile.models.small
    gpus, model = generation_of(run.profile, small).tensor_parallel, shlex.quote(small.location)
    programs = shlex.quote(str(Path(sys.executable).parent))
    command = f"exec {programs}/{server_command(model, run.profile.grpo, gpus)}"
    log = shlex.quote(str(run.log("vllm-server.txt")))
    host = f"sed -n {launch.nodes + 1}p"
    return (
        f'export {SERVER_VARIABLE}=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | {host})\n'
        f"srun --relative={launch.nodes} --nodes=1 --ntasks=1 bash -c {shlex.quote(command)} "
        f">> {log} 2>&1 &"
    )


def _fill(template: str, run: Run, hours: int, values: Mapping[str, object]) -> str:
    """A template with its placeholders filled in. Raises InputError where one is unknown."""
    values = {
        "profile": run.profile.name,
        "seed": run.seed,
        "hours": hours,
        # sbatch reads %j and the like in a file name, and takes it in quotes.
        "output": str(run.root / "logs").replace("%", "%%").replace('"', r"\""),
        "project": shlex.quote(str(project_root())),
        "python": shlex.quote(sys.executable),  # the environment that submits is that which runs
        **values,
    }
    text = (CONFIGS / template).read_text(encoding="utf-8").replace("{{...}}", "placeholders")
    if unknown := set(re.findall(r"\{\{(.*?)\}\}", text)) - set(values):
        known = ", ".join(values)
        raise InputError(f"{template} asks for {', '.join(sorted(unknown))}; known: {known}.")
    return re.sub(r"\{\{(.*?)\}\}", lambda match: str(values[match[1]]), text)


def main(argv: list[str] | None = None) -> int:
    parser = run_parser("pipeline.submit", "Notebooks 04-06, or predictions, on GPU nodes.")
    parser.add_argument(
        "--hours", type=int, default=24, help="of one job; it is queued again when they run out"
    )
    parser.add_argument("--launcher", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--predict", metavar="MODEL", help="predictions of this model instead")
    parser.add_argument("--shards", type=int, default=8, help="tasks of --predict")
    args = parser.parse_args(argv)
    if args.shards < 1:
        parser.error("--shards: at least one is needed")
    if args.predict and args.launcher == "local":
        parser.error("--predict goes through SLURM; `make evaluate` uses this machine's GPUs")
    return ends(lambda: _submit(args))


def _submit(args: argparse.Namespace) -> int:
    run = run_of(args)
    if args.launcher == "local":
        options = ["--profile", run.profile.name, "--seed", str(run.seed)]
        return reproduce.main([*options, "--first", "04", "--last", "06"])
    if args.predict:
        script = run.root / f"predict-{args.predict}.sh"
        write_text(script, render_prediction(run, args.predict, args.shards, args.hours))
    else:
        script = run.root / "submit.sh"
        write_text(script, render(run, args.hours))
    (run.root / "logs").mkdir(parents=True, exist_ok=True)
    if shutil.which("sbatch") is None:
        here = "`make evaluate`" if args.predict else "--launcher local"
        raise InputError(
            f"{script} is written, but this machine has no sbatch; {here} runs the same."
        )
    return subprocess.run(["sbatch", str(script)], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
