"""The SLURM script: every placeholder filled in, and a clear word where there is no SLURM."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from roots import use_root

from egm_lib.grpo import grpo_options
from egm_lib.pipeline import submit
from egm_lib.profile import load_profile
from egm_lib.run import Run


def test_the_template_is_filled_in():
    text = submit.render(Run(load_profile("paper-qwen3vl-8b"), 42), hours=12)
    assert "{{" not in text
    for words in (
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--requeue",
        "--first 04 --last 06",
        "paper-qwen3vl-8b-42",
    ):
        assert words in text


def test_an_unknown_placeholder_is_named(tmp_path, monkeypatch):
    (tmp_path / submit.TRAINING).write_text("#SBATCH --account={{account}}")
    monkeypatch.setattr(submit, "CONFIGS", tmp_path)
    with pytest.raises(ValueError, match="asks for account"):
        submit.render(Run(load_profile("mini"), 0), hours=1)


def checked(script: str) -> str:
    """The script, if a shell can read it."""
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "{{" not in script.replace("{{hours}}", "")  # which the folder's own name holds
    return script


@pytest.fixture
def odd_root(tmp_path, monkeypatch):
    """A project in a folder whose name a shell could misread."""
    root = tmp_path / "a 'project' of $HOME; \"x\" {y} {{hours}} `w` & \\"
    root.mkdir()
    use_root(monkeypatch, root)
    return root


def on_nodes(nodes: int, rollout: str, tensor_parallel: int = 1) -> Run:
    profile = load_profile("paper-qwen3vl-8b")
    launch = replace(profile.launch, nodes=nodes, num_processes=8 * nodes)
    grpo = replace(profile.grpo, rollout=rollout, per_device_train_batch_size=16)
    models = replace(
        profile.models, small=replace(profile.models.small, tensor_parallel=tensor_parallel)
    )
    return Run(replace(profile, launch=launch, grpo=grpo, models=models), 42)


def test_a_server_for_rollouts_has_a_node_of_its_own(odd_root):
    alone, served = (
        checked(submit.render(on_nodes(2, rollout), hours=1))
        for rollout in ("vllm-colocate", "vllm-server")
    )
    assert "--nodes=2\n" in alone and "vllm-serve" not in alone
    assert "--nodes=3\n" in served and "--gpus-per-node=8" in served
    [start] = [line for line in served.splitlines() if "vllm-serve" in line]
    assert start.startswith("srun --relative=2 --nodes=1 ") and start.endswith("&")
    assert "Qwen/Qwen3-VL-8B-Thinking" in start and "--dtype float16" in start
    [host] = [line for line in served.splitlines() if line.startswith("export EGM_VLLM_SERVER=")]
    assert host.endswith("| sed -n 3p)")
    assert "--tensor-parallel-size 1 " in start
    wide = submit.render(on_nodes(1, "vllm-server", tensor_parallel=4), hours=1)
    assert "--tensor-parallel-size 4 " in wide


def test_grpo_asks_the_server_that_the_script_names(monkeypatch, tmp_path):
    options = on_nodes(1, "vllm-server").profile.grpo
    assert grpo_options(options, tmp_path, 0)["vllm_server_host"] == "localhost"
    monkeypatch.setenv("EGM_VLLM_SERVER", "node7")
    assert grpo_options(options, tmp_path, 0)["vllm_server_host"] == "node7"


@pytest.fixture
def python(odd_root, monkeypatch) -> Path:
    """Where the scripts shall find Python: beside what submits them."""
    place = odd_root / "an environment" / "bin" / "python"
    monkeypatch.setattr(submit.sys, "executable", str(place))
    return place


def run_script(script: str, folder: Path, python: Path, **environment: str) -> list[str]:
    """The arguments that the script gives to Python, which only writes them down."""
    log = folder / "arguments"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > arguments\n')
    python.chmod(0o755)
    subprocess.run(["bash"], input=script, text=True, check=True, env=os.environ | environment)
    return log.read_text().splitlines()


def test_the_training_script_runs_the_notebooks(odd_root, python):
    script = checked(submit.render(on_nodes(1, "vllm-colocate"), hours=1))
    assert run_script(script, odd_root, python)[:2] == ["-m", "egm_lib.pipeline.reproduce"]


def test_an_array_of_jobs_answers_all_shards(odd_root, python):
    run = Run(load_profile("paper-qwen3vl-8b"), 42)
    script = checked(submit.render_prediction(run, "small-egm@majority-8", shards=16, hours=2))
    assert "--array=1-16" in script and "--gpus-per-node=1\n" in script
    arguments = run_script(script, odd_root, python, SLURM_ARRAY_TASK_ID="3")
    assert arguments[-4:] == ["--model", "small-egm@majority-8", "--shard", "3/16"]
    large = submit.render_prediction(run, "large-base", shards=2, hours=2)
    assert "--gpus-per-node=8\n" in large  # one copy takes eight


def test_predictions_are_submitted_too(tmp_path, monkeypatch, capsys):
    use_root(monkeypatch, tmp_path)
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    assert submit.main(["--profile", "mini", "--predict", "small-egm", "--shards", "3"]) == 2
    assert "make evaluate" in capsys.readouterr().err
    assert "--array=1-3" in (tmp_path / "data/runs/mini-0/predict-small-egm.sh").read_text()


def test_without_slurm_the_script_is_written_and_another_way_is_named(
    tmp_path, monkeypatch, capsys
):
    use_root(monkeypatch, tmp_path)
    monkeypatch.setattr(submit.shutil, "which", lambda name: None)
    assert submit.main(["--profile", "mini"]) == 2
    assert "--launcher local" in capsys.readouterr().err
    assert (tmp_path / "data/runs/mini-0/submit.sh").read_text().startswith("#!/bin/bash")
