"""How a training of several processes starts: `accelerate launch`, on one machine or several.

Nodes share the project's folder. Within a SLURM job `srun` starts the launcher once on each node;
the first node runs the notebooks too.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from egm_lib.errors import InputError
from egm_lib.profile import Launch

CONFIGS = Path(__file__).parent / "configs"
OWN_RANK = '"$SLURM_PROCID"'  # of a node, for its shell to fill in


def launch_command(launch: Launch, arguments: Sequence[str]) -> list[str]:
    """What starts `python <arguments>` in all processes of a training.

    arguments: such as `-m egm_lib.sft --profile ...`.
    Raises InputError for several nodes outside a SLURM job, with the command of each node.
    """
    if launch.nodes == 1:
        return _accelerate(launch, arguments)
    head = socket.gethostname()
    if shutil.which("srun") is None:
        nodes = (node_command(launch, arguments, rank, head) for rank in range(launch.nodes))
        raise InputError(
            f"launch.nodes is {launch.nodes}, and this machine has no srun to start the others: "
            "use `make submit`, or start one of these on each node:\n"
            + "\n".join(shlex.join(command) for command in nodes)
        )
    words = node_command(launch, arguments, OWN_RANK, head)
    each = " ".join(word if word == OWN_RANK else shlex.quote(word) for word in words)
    steps = ["srun", "--relative=0", f"--nodes={launch.nodes}", f"--ntasks={launch.nodes}"]
    steps += ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    return [*steps, "bash", "-c", f"exec {each}"]


def node_command(launch: Launch, arguments: Sequence[str], rank: int | str, head: str) -> list[str]:
    """What node `rank` of several runs. head: the host name or address of node 0."""
    place = ["--num_machines", str(launch.nodes), "--machine_rank", str(rank)]
    meeting = ["--main_process_ip", head, "--main_process_port", str(launch.main_process_port)]
    return _accelerate(launch, [*place, *meeting, *arguments])


def _accelerate(launch: Launch, arguments: Sequence[str]) -> list[str]:
    config = CONFIGS / f"{launch.accelerate_config}.yaml"
    prefix = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*prefix, "--num_processes", str(launch.num_processes), *arguments]
