"""How trainings start on several nodes: tried with two launchers on the loopback interface."""

import json
import shlex
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from accelerate.commands import launch as accelerate_launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from training_world import make_samples, moved_names, store_model

from egm_lib.errors import InputError
from egm_lib.pipeline import launch
from egm_lib.pipeline.jobs import training_job
from egm_lib.pipeline.launch import launch_command, node_command
from egm_lib.profile import Launch, load_profile
from egm_lib.run import Run

TWO = Launch(accelerate_config="deepspeed_zero3", num_processes=16, nodes=2)
WORK = ["-m", "egm_lib.sft", "--profile", "a b"]


def test_one_node_needs_no_srun():
    command = launch_command(replace(TWO, nodes=1), WORK)
    assert command[:3] == [sys.executable, "-m", "accelerate.commands.launch"]
    assert command[-4:] == WORK and "--machine_rank" not in command


def test_a_job_of_several_nodes_takes_the_gpus_of_one(monkeypatch):
    profile = load_profile("paper-qwen3vl-8b")
    monkeypatch.setattr(launch.shutil, "which", lambda name: "/usr/bin/srun")
    job = training_job(Run(replace(profile, launch=TWO), 0), "sft", "--task", "vanilla")
    assert job.gpus == 8 and job.command[0] == "srun"


def test_srun_starts_the_launcher_once_on_each_node(monkeypatch, tmp_path):
    """A stand-in for srun, and for the launcher, which writes down what it was given."""
    python = tmp_path / "a python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > "$OUT-$SLURM_PROCID"\n')
    python.chmod(0o755)
    monkeypatch.setattr(launch.shutil, "which", lambda name: "/usr/bin/srun")
    monkeypatch.setattr(launch.sys, "executable", str(python))
    command = launch_command(TWO, WORK)
    assert command[:5] == ["srun", "--relative=0", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    for rank in (0, 1):
        environment = {"SLURM_PROCID": str(rank), "OUT": str(tmp_path / "given")}
        subprocess.run(command[command.index("bash") :], env=environment, check=True)
        given = (tmp_path / f"given-{rank}").read_text().splitlines()
        assert given == node_command(TWO, WORK, rank, socket.gethostname())[1:]


def test_without_srun_the_command_of_each_node_is_said(monkeypatch):
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="no srun") as error:
        launch_command(TWO, WORK)
    lines = str(error.value).splitlines()[1:]
    head = socket.gethostname()
    assert [shlex.split(line) for line in lines] == [
        node_command(TWO, WORK, rank, head) for rank in (0, 1)
    ]


TRAIN = """
import json, sys
from pathlib import Path
from training_world import sft_options, stored
from egm_lib.prompts import FAMILIES
from egm_lib.sft import answer_rows, make_sft_trainer
from egm_lib.training import ranks
from egm_lib.training.checkpoints import train_to, work_folder

root = Path(sys.argv[1])
traces = json.loads((root / "samples.json").read_text())
family = FAMILIES["qwen3-vl"]
rows = list(answer_rows(traces, family, root, reasoning=True, grid=1, label=True))
options = sft_options(per_device_train_batch_size=2)
trainer = make_sft_trainer(*stored(root / "model"), rows, family, options,
                           work=work_folder(root / "out"), log=root / "log.jsonl", seed=0)
train_to(trainer, trainer.processing_class, root / "out")
rank, size = trainer.args.process_index, trainer.args.world_size
total = sum(float(weight.detach().double().sum()) for weight in trainer.model.parameters())
seen = {"size": size, "steps": trainer.state.global_step, "sum": total}
(root / f"rank-{rank}.json").write_text(json.dumps(seen))
ranks.leave()
"""
CPU_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
mixed_precision: 'no'
machine_rank: 0
num_machines: 1
num_processes: 1
main_training_function: main
use_cpu: false
"""


@pytest.mark.slow
def test_two_nodes_train_one_model(tmp_path, monkeypatch):
    """Two launchers, as on two machines; gloo instead of NCCL, since there is no GPU."""
    store_model(tmp_path / "model")
    (tmp_path / "samples.json").write_text(json.dumps(make_samples(tmp_path)))
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "cpu.yaml").write_text(CPU_CONFIG)
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    two = Launch(accelerate_config="cpu", num_processes=2, nodes=2, main_process_port=port)
    work = [str(tmp_path / "train.py"), str(tmp_path)]
    nodes = []
    for rank in (0, 1):
        command = node_command(two, work, rank, "127.0.0.1")
        with open(tmp_path / f"node-{rank}.txt", "w") as log:
            nodes.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        codes = [node.wait(timeout=400) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    said = "".join((tmp_path / f"node-{rank}.txt").read_text()[-3000:] for rank in (0, 1))
    assert codes == [0, 0], said
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["size"] == 2 and first["steps"] == 2
    assert moved_names(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("rank", [0, 1])
def test_accelerate_starts_its_share_of_the_processes_on_each_node(rank, monkeypatch):
    """accelerate's own reading of the shipped configuration: torchrun on each node, no ssh."""
    command = node_command(TWO, WORK, rank, "node0")
    calls = []
    monkeypatch.setattr(accelerate_launch, "deepspeed_launcher", calls.append)
    parser = accelerate_launch.launch_command_parser()
    accelerate_launch.launch_command(parser.parse_args(command[3:]))
    (args,) = calls
    other_launcher, _ = prepare_deepspeed_cmd_env(args)
    assert other_launcher is None  # it would need a host file and ssh
    assert (args.nnodes, args.nproc_per_node, int(args.node_rank)) == ("2", "8", rank)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "node0:29500")
    assert args.module and [args.training_script, *args.training_script_args] == WORK[1:]
