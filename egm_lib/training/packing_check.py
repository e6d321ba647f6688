"""Packed groups against TRL's own path, on rows of the first batch, before anything is trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from accelerate import DistributedType
from torch import Tensor

from egm_lib.training.micro_batches import micro_batches

# Rows that are compared, and share a prompt: more would show nothing else, and would need the
# memory that packing saves
COMPARED_ROWS = 2
# Limits of (log-prob, nats a token; loss; gradient norm, relative). Ours: tiny models give up to
# 1e-6, 1e-7 and 1e-6 in float32
FLOAT32_LIMITS = (1e-4, 1e-4, 1e-3)
# Half precision rounds each path in its own way
HALF_LIMITS = (0.02, 0.02, 0.1)
SAME = "Reading a group's prompt once gives the numbers of TRL's own path."


def check_packing(trainer, loss_of: Callable, model, inputs: dict) -> bool:
    """Whether packed groups give TRL's log-probs, loss and gradient norm; prints the differences.

    All ranks give the same answer. loss_of: TRL's `_compute_loss`. inputs: a batch of whole groups.
    """
    part = _first_rows(trainer, inputs)
    before, trainer._metrics["train"] = trainer._metrics["train"], defaultdict(list)
    found = []
    for trainer.packs in (False, True):
        logps_B_T = _logps(trainer, model, part)
        part.setdefault("old_per_token_logps", logps_B_T)  # TRL's: the loss of both depends on them
        found.append((logps_B_T, *_loss_and_norm(trainer, loss_of, model, part)))
    trainer.packs, trainer._metrics["train"] = False, before
    (trl_logps, trl_loss, trl_norm), (logps, loss, norm) = found
    mask = part["completion_mask"].bool()
    gaps = [
        (logps - trl_logps)[mask].abs().mean(),
        (loss - trl_loss).abs(),
        (norm - trl_norm).abs() / trl_norm.clamp(min=1e-12),
    ]
    gaps = trainer.accelerator.gather(torch.stack(gaps)[None]).amax(dim=0).tolist()
    half = trainer.accelerator.mixed_precision != "no" or trl_logps.dtype != torch.float32
    limits = HALF_LIMITS if half else FLOAT32_LIMITS
    same = all(gap <= limit for gap, limit in zip(gaps, limits, strict=True))
    if trainer.accelerator.is_main_process:
        names = ("log-probs", "loss", *(() if _divided(trainer) else ("gradient norm",)))
        told = ", ".join(
            f"{name} {gap:.2g} (limit {limit:g})"
            for name, gap, limit in zip(names, gaps, limits, strict=False)
        )
        print(
            f"{SAME} Differences: {told}."
            if same
            else "Reading a group's prompt once gives other numbers than TRL's own path, which is "
            f"used instead. Differences: {told}. Set grpo.shared_prefix to off to skip the "
            "comparison."
        )
    return same


def _first_rows(trainer, inputs: dict) -> dict:
    """COMPARED_ROWS of the first group. Their advantages are +1 and -1: those of the group may all
    be zero.
    """
    part = micro_batches(inputs, list(range(COMPARED_ROWS)), [COMPARED_ROWS])[0]
    part.pop("old_per_token_logps", None)
    sign = torch.arange(COMPARED_ROWS, device=part["advantages"].device) % 2
    part["advantages"] = 1.0 - 2.0 * sign.to(part["advantages"].dtype)
    part["num_items_in_batch"] = part["completion_mask"].sum() * trainer.accelerator.num_processes
    return part


@torch.no_grad()
def _logps(trainer, model, part: dict) -> Tensor:
    names = ("pixel_values", "image_grid_thw", "num_images", "num_tiles", "mm_token_type_ids")
    return trainer._get_per_token_logps_and_entropies(
        model,
        torch.cat([part["prompt_ids"], part["completion_ids"]], dim=1),
        torch.cat([part["prompt_mask"], part["completion_mask"]], dim=1),
        part["completion_ids"].shape[1],
        **{name: part.get(name) for name in names},
    )[0]


def _divided(trainer) -> bool:
    return trainer.accelerator.distributed_type == DistributedType.DEEPSPEED


def _loss_and_norm(trainer, loss_of: Callable, model, part: dict) -> tuple[Tensor, Tensor]:
    """The loss and the norm of its gradient, which is not kept; without one (zero) under DeepSpeed,
    whose divided weights have no gradient apart from a step.
    """
    if _divided(trainer):
        with torch.no_grad():
            return loss_of(model, part), torch.zeros((), device=trainer.args.device)
    model = trainer.accelerator.unwrap_model(model)
    loss = loss_of(model, part)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return loss.detach(), torch.stack(squares).sum().sqrt()
