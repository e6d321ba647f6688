"""What a rehearsal must have shown when it ends, read from the files of its run."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import safe_open

from egm_lib.errors import EgmError
from egm_lib.files import read_jsonl
from egm_lib.run import Run
from egm_lib.training.checkpoints import CONTINUES
from egm_lib.training.groups import read_groups
from egm_lib.training.grpo_trainer import MAX_LOGP_GAP
from egm_lib.training.packing_check import SAME

GAP = "sampling/sampling_logp_difference/mean"  # TRL's name of it


class RehearsalError(EgmError, RuntimeError):
    """The notebooks ran, and something that they should have done did not happen."""


def check_run(run: Run) -> list[str]:
    """What the run has shown, a sentence each.

    Raises RehearsalError where a training has changed no weight, no group of GRPO had different
    rewards, a loss is no number, or a sample could not be answered.
    """
    shown = []
    for task in run.profile.tasks:
        shown.append(_check_training(run, task, "sft", Path(run.profile.models.small.path)))
        shown.append(_check_training(run, task, "grpo", run.checkpoint(task, "small-sft")))
        shown.append(_check_groups(run, task))
    return [*shown, _check_predictions(run)]


def check_full_run(run: Run) -> list[str]:
    """What a full rehearsal has shown beyond `check_run`, a sentence each.

    Raises RehearsalError where SFT, which was killed, did not continue from its checkpoint; where
    trainer and sampler were not compared at an update, or disagreed; and where packed groups were
    not compared with TRL's path, or differed.
    """
    return [
        _check_resumption(run),
        *(_check_gaps(run, task) for task in run.profile.tasks),
        *(_check_packing(run, task) for task in run.profile.tasks),
    ]


def _check_resumption(run: Run) -> str:
    task = run.profile.tasks[0]
    printed, log = run.log(f"sft-{task}.txt"), run.log(f"sft-{task}.jsonl")
    steps = [row["step"] for row in read_jsonl(log) if "loss" in row]
    if CONTINUES not in printed.read_text(encoding="utf-8"):
        raise RehearsalError(
            f"sft of {task} was killed, and did not continue from its checkpoint: {printed}"
        )
    if steps != list(range(1, len(steps) + 1)):
        raise RehearsalError(
            f"sft of {task} was killed and continued; {log} has the steps {steps}, not each once."
        )
    return f"sft of {task}: killed at a checkpoint, and continued there to step {steps[-1]}"


def _check_gaps(run: Run, task: str) -> str:
    log = run.log(f"grpo-{task}.jsonl")
    steps = [row for row in read_jsonl(log) if "loss" in row]
    gaps = [row[GAP] for row in steps if GAP in row]
    if len(gaps) < len(steps) or not all(gap <= MAX_LOGP_GAP for gap in gaps):
        raise RehearsalError(
            f"grpo of {task}: trainer and sampler were compared at {len(gaps)} of {len(steps)} "
            f"updates, with differences of {_listed(gaps)} nats (limit {MAX_LOGP_GAP}): {log}"
        )
    return (
        f"grpo of {task}: vLLM's log-probs differ from the trainer's by {_listed(gaps)} nats "
        f"(limit {MAX_LOGP_GAP})"
    )


def _listed(gaps: list[float]) -> str:
    return ", ".join(f"{gap:.4f}" for gap in gaps) or "none"


def _check_packing(run: Run, task: str) -> str:
    printed = run.log(f"grpo-{task}.txt")
    if SAME not in printed.read_text(encoding="utf-8"):
        raise RehearsalError(
            f"grpo of {task}: packed groups did not train, since they were not compared with "
            f"TRL's path, or differ from it: {printed}"
        )
    return f"grpo of {task}: packed groups give the log-probs and loss of TRL's path"


def _check_training(run: Run, task: str, stage: str, start: Path) -> str:
    log, out = run.log(f"{stage}-{task}.jsonl"), {"sft": "small-sft", "grpo": "small-egm"}[stage]
    steps = [row for row in read_jsonl(log) if "loss" in row]
    if not steps or not all(math.isfinite(row["loss"]) for row in steps):
        raise RehearsalError(
            f"{stage} of {task}: {log} has no step, or a loss that is not a number."
        )
    if not any(row["grad_norm"] > 0 for row in steps):
        raise RehearsalError(
            f"{stage} of {task} had no gradient in any of {len(steps)} steps: {log}"
        )
    changed, total = changed_weights(start, run.checkpoint(task, out))
    if not changed:
        raise RehearsalError(f"{stage} of {task} has changed no weight of {start}.")
    return f"{stage} of {task}: {len(steps)} steps, {changed} of {total} tensors changed"


def changed_weights(before: Path, after: Path) -> tuple[int, int]:
    """How many tensors of two checkpoints differ, and how many there are."""
    first, second = _weights(before), _weights(after)
    if first.keys() != second.keys():
        raise RehearsalError(f"{after} has other weights than {before}, which it was made from.")
    differing = [
        name
        for name, tensor in first.items()
        if not torch.equal(tensor.float(), second[name].float())
    ]
    return len(differing), len(first)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return weights


def _check_groups(run: Run, task: str) -> str:
    groups = read_groups(run.groups(task))
    spread = [group for group in groups if max(group["rewards"]) > min(group["rewards"])]
    if not spread:
        raise RehearsalError(
            f"grpo of {task}: all completions of a group had equal rewards in each of "
            f"{len(groups)} groups, so that nothing was learnt from rewards: {run.groups(task)}"
        )
    return f"grpo of {task}: rewards differ within {len(spread)} of {len(groups)} groups"


def _check_predictions(run: Run) -> str:
    files = sorted((run.root / "predictions").rglob("*.jsonl"))
    rows = [row for file in files for row in read_jsonl(file)]
    failed = [row for row in rows if row["status"] == "error"]
    if failed or not rows:
        reason = failed[0]["error"] if failed else "there is none"
        raise RehearsalError(
            f"{len(failed)} of {len(rows)} predictions failed; the first: {reason}"
        )
    boxes = sum(row["box"] is not None for row in rows)
    return (
        f"predictions: {len(rows)} answers in {len(files)} files, {boxes} with a box, none failed"
    )
