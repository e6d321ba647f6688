"""Packed groups under DeepSpeed ZeRO-3: two processes on a CPU, against TRL's own path.

ZeRO-3 divides every weight among the processes, and each forward pass gathers them: a process that
makes one pass more or less than the other would hang both.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from ports import use_free_port
from torch import multiprocessing
from training_world import grpo_options, make_samples, store_model, stored
from trl import GRPOConfig
from zero3_ranks import ZERO_3

from egm_lib import grpo
from egm_lib.pipeline.rehearsal.cpu_ranks import use_gloo
from egm_lib.prompts import FAMILIES
from egm_lib.training import grpo_trl, ranks
from egm_lib.training.checkpoints import work_folder

pytestmark = pytest.mark.zero3

LONGEST = 8  # tokens of a completion: it is then truncated, without an end


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: make test-vllm")


def _one_mixed_group(completions, sample, **kwargs) -> list[float]:
    """Of two ranks, one has no group to learn from."""
    return [
        float(row["sample_id"] == "0-0" and number % 2 == 0) for number, row in enumerate(sample)
    ]


def _update(rank: int, folder: str, family: str, mode: str) -> None:
    """One update; writes losses, gradients and the rows of each forward pass of packed groups."""
    import deepspeed
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.utils import safe_get_full_grad

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    use_gloo()
    root = Path(folder)
    samples = [
        {**sample, "expression": "square" + " red" * (4 * number)}
        for number, sample in enumerate(json.loads((root / "samples.json").read_text()))
    ]
    options = grpo_options(
        per_device_train_batch_size=4,
        micro_batch_tokens=100,
        max_steps=1,
        max_completion_length=LONGEST,
        mask_truncated_completions=True,
        freeze_vision=False,
        freeze_merger=False,
        shared_prefix=mode,
    )
    work = work_folder(root / f"out-{mode}")
    # Before the model: its weights are then divided while they are loaded
    config = GRPOConfig(**grpo.grpo_options(options, work, 0, 2) | {"use_cpu": False})
    trainer = grpo.make_grpo_trainer(
        *stored(root / "model", family),
        grpo.question_rows(samples, FAMILIES[family], root),
        FAMILIES[family],
        options,
        work=work,
        log=root / f"log-{mode}.jsonl",
        groups=root / f"groups-{mode}.jsonl",
        seed=0,
        shared_prefix=False,
        reward=_one_mixed_group,
        config=config,
    )
    end = trainer.processing_class.tokenizer.eos_token_id

    def single_turn(prompt_ids, *args, **kwargs):
        """2 to 8 tokens, which depend on the prompt alone."""
        lengths = [2 + (sum(ids) + row % 4) % 7 for row, ids in enumerate(prompt_ids)]
        return [[40 + n] * (n - 1) + [end if n < LONGEST else 41] for n in lengths], None

    trainer._generate_single_turn = single_turn
    norm = trainer.ref_model.model.language_model.norm.weight
    with deepspeed.zero.GatheredParameters(norm, modifier_rank=0), torch.no_grad():
        norm.mul_(1.05)  # a reference that differs: the KL is not zero

    seen: dict = {"losses": [], "passes": [], "gradients": {}, "masked": 0}
    plain_logps, plain_training_step = grpo_trl.packed_logps, trainer.training_step
    plain_step = DeepSpeedEngine.step

    def counted(model, bare, batch):
        seen["passes"].append(len(batch["prompt_ids"]))
        seen["masked"] += int((batch["completion_mask"].sum(dim=1) == 0).sum())
        return plain_logps(model, bare, batch)

    def training_step(*args, **kwargs):
        loss = plain_training_step(*args, **kwargs)
        seen["losses"].append(loss.item())
        return loss

    def step(engine, *args, **kwargs):
        for name, weight in engine.module.named_parameters():
            gradient = safe_get_full_grad(weight) if weight.requires_grad else None
            if gradient is not None:
                seen["gradients"][name] = gradient.clone()
        return plain_step(engine, *args, **kwargs)

    grpo_trl.packed_logps, trainer.training_step = counted, training_step
    DeepSpeedEngine.step = step
    trainer.train()
    assert trainer.is_deepspeed_enabled
    assert all(hasattr(weight, "ds_id") for weight in trainer.model.parameters())  # divided
    assert trainer.packs == (mode == "auto")
    torch.save(seen, root / f"{mode}-{rank}.pt")
    ranks.leave()


@pytest.mark.parametrize("family", ["qwen3-vl", "internvl-3"])
def test_packed_groups_equal_trl_s_path_under_zero_3(tmp_path, monkeypatch, family):
    """Float32, the tower trained, a KL, ragged lengths, truncated completions, and a rank whose
    groups are all alike.
    """
    store_model(tmp_path / "model", family)
    (tmp_path / "samples.json").write_text(json.dumps(make_samples(tmp_path, per_image=1)))
    for name, value in ZERO_3.items():
        monkeypatch.setenv(name, value)
    for mode in ("off", "auto"):
        use_free_port(monkeypatch)
        multiprocessing.spawn(_update, (str(tmp_path), family, mode), nprocs=2)
    trl, packed = (
        [torch.load(tmp_path / f"{mode}-{rank}.pt") for rank in (0, 1)] for mode in ("off", "auto")
    )
    assert packed[0]["passes"] == packed[1]["passes"] and len(packed[0]["passes"]) > 4
    assert packed[0]["masked"] + packed[1]["masked"] > 0
    # TRL shuffles rows among the accumulation steps of a rank: their sum is what is trained on
    for ours, theirs in zip(packed, trl, strict=True):
        assert sum(ours["losses"]) == pytest.approx(sum(theirs["losses"]), abs=1e-6)
    expected = trl[0]["gradients"]
    assert any("visual" in name or "vision_tower" in name for name in expected)
    assert any(gradient.any() for gradient in expected.values())
    for rank in packed:
        assert rank["gradients"].keys() == expected.keys()
        for name, gradient in expected.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                rank["gradients"][name], gradient, atol=1e-5 * scale + 1e-8, rtol=0, msg=name
            )
