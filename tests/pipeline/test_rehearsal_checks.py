"""A rehearsal in which a training has done nothing must not be called a success."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from egm_lib.pipeline.rehearsal.checks import (
    GAP,
    RehearsalError,
    changed_weights,
    check_full_run,
    check_run,
)
from egm_lib.run import Run
from egm_lib.training.checkpoints import CONTINUES
from egm_lib.training.packing_check import SAME


def write_rows(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_weights(folder, bias, name="bias"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"weight": torch.ones(2, 2), name: torch.tensor([bias])}, folder / "model.safetensors"
    )


def group(*rewards):
    return {
        "step": 1,
        "completions": [""] * len(rewards),
        "rewards": rewards,
        "advantages": [0.0] * len(rewards),
    }


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A rehearsal of one task that has done all that it should."""
    monkeypatch.setattr(Run, "root", tmp_path / "run")
    write_weights(tmp_path / "base", 0.0)
    small = SimpleNamespace(path=str(tmp_path / "base"))
    profile = SimpleNamespace(tasks=("vanilla",), models=SimpleNamespace(small=small))
    run = Run(profile, 0)
    for number, stage in enumerate(("sft", "grpo"), start=1):
        write_rows(run.log(f"{stage}-vanilla.jsonl"), {"loss": 0.5, "grad_norm": 1.0})
        write_weights(run.checkpoint("vanilla", ("small-sft", "small-egm")[number - 1]), number)
    write_rows(run.groups("vanilla"), group(0.0, 0.0), group(0.0, 0.2))
    row = {"status": "ok", "box": [1, 2, 3, 4], "error": None}
    write_rows(run.root / "predictions" / "small-egm" / "refcoco_val.jsonl", row)
    return run


def test_says_what_was_shown(run):
    assert check_run(run) == [
        "sft of vanilla: 1 steps, 1 of 2 tensors changed",
        "grpo of vanilla: 1 steps, 1 of 2 tensors changed",
        "grpo of vanilla: rewards differ within 1 of 2 groups",
        "predictions: 1 answers in 1 files, 1 with a box, none failed",
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            lambda run: write_weights(run.checkpoint("vanilla", "small-egm"), 1.0),
            "changed no weight",
        ),
        (lambda run: write_rows(run.groups("vanilla"), group(0.2, 0.2)), "had equal rewards"),
        (lambda run: write_rows(run.groups("vanilla")), "in each of 0 groups"),
        (lambda run: write_rows(run.log("grpo-vanilla.jsonl")), "has no step"),
        (
            lambda run: write_rows(
                run.log("sft-vanilla.jsonl"), {"loss": float("nan"), "grad_norm": 1.0}
            ),
            "not a number",
        ),
        (
            lambda run: write_rows(run.log("grpo-vanilla.jsonl"), {"loss": 0.0, "grad_norm": 0.0}),
            "no gradient",
        ),
        (
            lambda run: write_rows(
                run.root / "predictions" / "a" / "b.jsonl",
                {"status": "error", "box": None, "error": "out of memory"},
            ),
            "out of memory",
        ),
    ],
)
def test_names_what_did_not_happen(run, spoil, message):
    spoil(run)
    with pytest.raises(RehearsalError, match=message):
        check_run(run)


@pytest.fixture
def full_run(run):
    """A full rehearsal of one task that has done all that it should."""
    sft = [{"step": step, "loss": 0.5, "grad_norm": 1.0} for step in (1, 2, 3)]
    write_rows(run.log("sft-vanilla.jsonl"), *sft)
    write_rows(run.log("grpo-vanilla.jsonl"), *({"loss": 0.1, GAP: 0.005} for _ in range(3)))
    run.log("sft-vanilla.txt").write_text(f"{CONTINUES} checkpoint-1\n")
    run.log("grpo-vanilla.txt").write_text(f"{SAME}\n")
    return run


def test_says_what_a_full_rehearsal_has_shown(full_run):
    assert check_full_run(full_run) == [
        "sft of vanilla: killed at a checkpoint, and continued there to step 3",
        "grpo of vanilla: vLLM's log-probs differ from the trainer's by 0.0050, 0.0050, 0.0050 "
        "nats (limit 0.02)",
        "grpo of vanilla: packed groups give the log-probs and loss of TRL's path",
    ]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda run: run.log("sft-vanilla.txt").write_text("step 3\n"), "did not continue"),
        (
            lambda run: write_rows(
                run.log("sft-vanilla.jsonl"), *({"step": n, "loss": 0.5} for n in (1, 2, 2, 3))
            ),
            "not each once",
        ),
        (
            lambda run: write_rows(
                run.log("grpo-vanilla.jsonl"), {"loss": 0.1, GAP: 0.005}, {"loss": 0.1}
            ),
            "compared at 1 of 2",
        ),
        (
            lambda run: write_rows(run.log("grpo-vanilla.jsonl"), {"loss": 0.1, GAP: 0.03}),
            "0.0300 nats",
        ),
        (lambda run: run.log("grpo-vanilla.txt").write_text("\n"), "packed groups did not train"),
    ],
)
def test_names_what_a_full_rehearsal_did_not_show(full_run, spoil, message):
    spoil(full_run)
    with pytest.raises(RehearsalError, match=message):
        check_full_run(full_run)


def test_a_checkpoint_with_other_weights_is_refused(tmp_path):
    write_weights(tmp_path / "a", 0.0)
    write_weights(tmp_path / "b", 0.0, name="scale")
    with pytest.raises(RehearsalError, match="other weights"):
        changed_weights(tmp_path / "a", tmp_path / "b")
