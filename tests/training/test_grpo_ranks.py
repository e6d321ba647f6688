"""GRPO on two processes (gloo, on a CPU): a step has the profile's size, and all ranks do the same.

Each rank writes what it saw as JSON; the test compares the two.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from ports import use_free_port
from torch import multiprocessing
from training_world import grpo_options, make_samples, moved_names, store_model, stored
from transformers import TrainerCallback

from egm_lib.grpo import make_grpo_trainer, question_rows
from egm_lib.profile import Lora
from egm_lib.prompts import FAMILIES
from egm_lib.training import grpo_trl, ranks
from egm_lib.training.checkpoints import train_to, work_folder
from egm_lib.training.model_setup import TrainingError

FAMILY = FAMILIES["qwen3-vl"]


class Weights(TrainerCallback):
    """The sum of all weights after each step: equal weights have equal sums."""

    def __init__(self):
        self.sums: list[float] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.sums.append(sum(p.double().sum().item() for p in model.parameters()))


def _compare(trainer, gap: float) -> str:
    """What comparing trainer and sampler says on this rank, where they differ by `gap`."""
    logps = torch.zeros(2, 3)
    batch = {
        "completion_mask": torch.ones(2, 3),
        "old_per_token_logps": logps,
        "sampling_per_token_logps": logps - gap,
    }
    trainer.checked = False
    try:
        trainer._compare_policies(batch)
    except TrainingError as error:
        return str(error).partition("mean difference ")[2][:6]
    return "same policy"


def _train(rank: int, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    torch.set_num_threads(1)
    root = Path(folder)
    samples = [
        {**sample, "expression": "square" + " red" * (4 * number)}
        for number, sample in enumerate(json.loads((root / "samples.json").read_text()))
    ]
    scored: list[str] = []

    def alternating(completions, sample, **kwargs) -> list[float]:
        scored.extend(row["sample_id"] for row in sample)
        return [float(number % 2) for number in range(len(completions))]

    trainer = make_grpo_trainer(
        *stored(root / "model"),
        question_rows(samples, FAMILY, root),
        FAMILY,
        # 16 completions a step on 2 processes: 2 accumulation steps of 4 rows each
        grpo_options(per_device_train_batch_size=4, micro_batch_tokens=300),
        work=work_folder(root / "out"),
        log=root / "log.jsonl",
        groups=root / "groups.jsonl",
        seed=0,
        reward=alternating,
    )
    weights = Weights()
    trainer.add_callback(weights)
    train_to(trainer, trainer.processing_class, root / "out")
    told = [_compare(trainer, gap) for gap in (0.0, (0.0, 0.1)[rank])]
    seen = {"scored": scored, "sums": weights.sums, "policy": told}
    (root / f"{rank}.json").write_text(json.dumps(seen))
    ranks.leave()


def test_two_processes_divide_a_step_and_keep_the_same_weights(tmp_path, monkeypatch):
    store_model(tmp_path / "model")
    (tmp_path / "samples.json").write_text(json.dumps(make_samples(tmp_path, per_image=1)))
    use_free_port(monkeypatch)
    multiprocessing.spawn(_train, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    # Two steps of 4 prompts x 4 completions, half of them on each rank
    assert len(first["scored"]) == len(second["scored"]) == 16
    for step in (slice(8), slice(8, 16)):
        scored = first["scored"][step] + second["scored"][step]
        assert sorted(scored) == sorted(f"{number}-0" for number in range(4) for _ in range(4))
    assert first["sums"] == second["sums"] and len(first["sums"]) == 2
    assert first["sums"][0] != first["sums"][1]
    assert moved_names(tmp_path / "model", tmp_path / "out")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in log[:2]] == [0.5, 0.5]
    # The sampler of one rank alone has other weights: both stop, with the same number
    assert first["policy"] == second["policy"] == ["same policy", "0.0500"]


class Gradients(TrainerCallback):
    """The gradient of the first update, before the optimizer takes it."""

    def __init__(self):
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            self.first = {
                name.removeprefix("module."): weight.grad.clone()
                for name, weight in model.named_parameters()
                if weight.grad is not None
            }


def _packed_update(rank: int, folder: str, size: int, family: str, changes: dict) -> None:
    """One update of packed groups, whose completions depend on the prompt alone."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    root = Path(folder)
    samples = [
        {**sample, "expression": "square" + " red" * (4 * number)}
        for number, sample in enumerate(json.loads((root / "samples.json").read_text()))
    ]

    def one_mixed_group(completions, sample, **kwargs) -> list[float]:
        """Of two ranks, one has no group to learn from."""
        rows = enumerate(sample)
        return [float(row["sample_id"] == "0-0" and number % 2 == 0) for number, row in rows]

    def single_turn(prompt_ids, *args, **kwargs):
        lengths = [2 + (sum(ids) + row % 4) % 7 for row, ids in enumerate(prompt_ids)]
        return [[40 + length] * length for length in lengths], None

    passes: list[int] = []
    plain = grpo_trl.packed_logps

    def counted(model, bare, batch):
        passes.append(len(batch["prompt_ids"]))
        return plain(model, bare, batch)

    grpo_trl.packed_logps = counted
    trainer = make_grpo_trainer(
        *stored(root / "model", family),
        question_rows(samples, FAMILIES[family], root),
        FAMILIES[family],
        grpo_options(
            per_device_train_batch_size=8 // size,
            micro_batch_tokens=60,
            max_steps=1,
            **changes,
        ),
        work=work_folder(root / f"out-{size}"),
        log=root / f"log-{size}.jsonl",
        groups=root / f"groups-{size}.jsonl",
        seed=0,
        shared_prefix=False,
        reward=one_mixed_group,
    )
    trainer._generate_single_turn = single_turn
    if trainer.ref_model is not None:  # with LoRA the reference is the model without its adapter
        with torch.no_grad():  # a reference that differs: the KL is not zero
            trainer.ref_model.model.language_model.norm.weight.mul_(1.05)
    gradients, weights = Gradients(), Weights()
    trainer.add_callback(gradients)
    trainer.add_callback(weights)
    trainer.train()
    assert trainer.packs
    seen = {"gradients": gradients.first, "sums": weights.sums, "passes": passes}
    torch.save(seen, root / f"{size}-{rank}.pt")
    ranks.leave()


ALL_TRAINED = {"freeze_vision": False, "freeze_merger": False}


@pytest.mark.parametrize(
    ("family", "changes", "trained"),
    [
        ("qwen3-vl", ALL_TRAINED, "visual"),
        ("internvl-3", ALL_TRAINED, "vision_tower"),
        ("qwen3-vl", {"lora": Lora(r=2, alpha=4)}, "lora_B"),
    ],
    ids=["qwen3-vl", "internvl-3", "lora"],
)
def test_packed_groups_on_two_processes_equal_those_on_one(
    tmp_path, monkeypatch, family, changes, trained
):
    """As many forward passes on each rank, also where one has only groups that are all alike."""
    store_model(tmp_path / "model", family)
    (tmp_path / "samples.json").write_text(json.dumps(make_samples(tmp_path, per_image=1)))
    for size in (1, 2):
        use_free_port(monkeypatch)
        multiprocessing.spawn(_packed_update, (str(tmp_path), size, family, changes), nprocs=size)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    # After the comparison, groups are divided by the budget: as on the rank of the longest ones
    assert first["passes"] == second["passes"] and len(first["passes"]) > 4
    assert first["sums"] == second["sums"]
    assert first["gradients"].keys() == alone["gradients"].keys()
    assert any(gradient.any() for name, gradient in alone["gradients"].items() if trained in name)
    for name, gradient in alone["gradients"].items():
        scale = gradient.abs().max().item()
        for rank in (first, second):
            torch.testing.assert_close(
                rank["gradients"][name], gradient, atol=1e-5 * scale + 1e-7, rtol=0, msg=name
            )
