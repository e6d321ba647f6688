"""Weights that a ZeRO-3 training saves are named as those that it started from.

vLLM knows the names of the published checkpoints and no others.
"""

import os
from pathlib import Path

import pytest
import torch
from ports import use_free_port
from safetensors import safe_open
from torch import multiprocessing
from training_world import store_model
from zero3_ranks import ZERO_3

from egm_lib.pipeline.rehearsal.cpu_ranks import use_gloo

pytestmark = pytest.mark.zero3


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-vllm")


def _names(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return sorted(file.keys())


def _load_and_save(rank: int, folder: str, family: str) -> None:
    from trl import SFTConfig

    from egm_lib.inference.loading import load_model

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    use_gloo()
    root = Path(folder)
    config = SFTConfig(output_dir=str(root / "work"), use_cpu=False, bf16=False)
    assert config.deepspeed_plugin.zero_stage == 3
    model = load_model(root / "model", family=family)
    assert all(hasattr(weight, "ds_id") for weight in model.parameters())  # divided
    whole = {name: torch.zeros(1) for name, _ in model.named_parameters()}
    model.save_pretrained(root / "saved", state_dict=whole)


@pytest.mark.parametrize("family", ["qwen3-vl", "internvl-3"])
def test_names_survive_zero_3(tmp_path, monkeypatch, family):
    store_model(tmp_path / "model", family)
    for name, value in ZERO_3.items():
        monkeypatch.setenv(name, value)
    use_free_port(monkeypatch)
    multiprocessing.spawn(_load_and_save, (str(tmp_path), family), nprocs=1)
    assert _names(tmp_path / "saved") == _names(tmp_path / "model")
