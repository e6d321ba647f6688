"""The two locked sets, as far as can be told without an index; `make test-lock` resolves them."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
BASE = [*PROJECT["dependencies"], *EXTRAS["dev"]]
CPU, GPU = "requirements.txt", "requirements-gpu.txt"


def pins(name: str) -> dict[str, str]:
    """The version of every package of a set. Each line must pin one."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==(\S+)", line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(match[1]): match[2] for match in found}


@pytest.mark.parametrize(("name", "wanted"), [(CPU, BASE), (GPU, [*BASE, *EXTRAS["gpu"]])])
def test_a_set_pins_what_the_project_asks_for(name, wanted):
    """Another transformers than the tested one may give weights other names."""
    pinned = pins(name)
    for requirement in map(Requirement, wanted):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version and version in requirement.specifier, f"{requirement}: {version}"


def test_both_sets_train_and_answer_with_the_same_libraries():
    """What the tests prove on a CPU is to hold on a GPU."""
    cpu, gpu = pins(CPU), pins(GPU)
    for name in ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "safetensors"):
        assert cpu[name] == gpu[name]
    assert "vllm" in gpu and "deepspeed" in gpu and "vllm" not in cpu


def dry_run(folder: Path, *words: str) -> str:
    """What `make` would run in a folder that has the project's Makefile."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", CPU, GPU):
        shutil.copy(ROOT / name, folder)
    command = ["make", "--dry-run", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("words", "name"), [(["GPU=1"], GPU), ([], CPU)])
def test_setup_installs_the_set_that_was_asked_for(tmp_path, words, name):
    installed = re.findall(r"-r (\S+)", dry_run(tmp_path, "setup", *words))
    assert installed == [name]


def test_a_target_keeps_the_gpu_set_that_is_there(tmp_path):
    """Else `make reproduce` on a GPU machine would put the CPU set in its place."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/.ready-requirements-gpu").touch()
    assert "install" not in dry_run(tmp_path, "reproduce", "PROFILE=smoke")
    assert "-m egm_lib.pipeline.reproduce" in dry_run(tmp_path, "reproduce", "PROFILE=smoke")


def test_an_active_conda_environment_of_the_project_is_used(tmp_path, monkeypatch):
    """Else its packages, perhaps those for GPUs, would lie unused beside a new CPU set."""
    named = re.search(r"^name: (\S+)", (ROOT / "environment.yml").read_text(), re.MULTILINE)[1]
    monkeypatch.setenv("CONDA_DEFAULT_ENV", named)
    assert dry_run(tmp_path, "reproduce").split()[0] == "python"
    monkeypatch.setenv("CONDA_DEFAULT_ENV", "base")
    assert "-m venv .venv" in dry_run(tmp_path, "reproduce")
