"""Stage V of the miniature's pretraining: the shared vision tower learns shapes, colours and boxes.

A temporary head on the merged 2 x 2 cells names the thing whose visible centre lies in the cell:
its colour, its shape, and its visible and full box. Each coordinate is a class of GRID_1000,
because classes are learned faster than regression here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from egm_lib.cli import ends
from egm_lib.mini.grid import GRID_1000, LEVELS, level
from egm_lib.mini.models import CELLS, WIDTH, build, encode_images, patchify
from egm_lib.mini.scenes import COLOURS, SHAPES, SIZE_PX, Scene, Thing, render, sample_scene
from egm_lib.mini.tokens import build_tokenizer

SLOTS = {
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    **{f"{box}_{c}": LEVELS for box in ("visible", "full") for c in ("x1", "y1", "x2", "y2")},
}


def cell_of(thing: Thing) -> int:
    """Index of the merged cell that holds the visible centre."""
    x, y = thing.centre_px
    step = SIZE_PX / CELLS
    return min(int(y / step), CELLS - 1) * CELLS + min(int(x / step), CELLS - 1)


def cell_targets(scene: Scene) -> np.ndarray:
    """targets_64_S: the class of each slot in each cell; -100 if no thing has its centre there.

    Of two things in a cell, the upper one counts.
    """
    targets = np.full((CELLS * CELLS, len(SLOTS)), -100, dtype=np.int64)
    for thing in scene.things:
        if thing.visible_box_px is None:
            continue
        boxes = [level(v) for v in (*thing.visible_box_px, *thing.full_box_px)]
        targets[cell_of(thing)] = [
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            *boxes,
        ]
    return targets


class CellHead(nn.Module):
    """Objectness and a classifier for each slot, on merged cells."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256), nn.GELU())
        self.out = nn.Linear(256, 1 + sum(SLOTS.values()))

    def forward(self, cells_B_64_W: Tensor) -> tuple[Tensor, list[Tensor]]:
        scores = self.out(self.hidden(cells_B_64_W)).float()
        return scores[..., 0], list(scores[..., 1:].split(list(SLOTS.values()), dim=-1))


def head_loss(
    objectness: Tensor, slots: list[Tensor], targets_B_64_S: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the objectness and slot losses, and accuracies for the log."""
    present = targets_B_64_S[..., 0] >= 0
    loss = 3 * F.binary_cross_entropy_with_logits(objectness, present.float())
    log = {}
    for number, (name, scores) in enumerate(zip(SLOTS, slots, strict=True)):
        wanted = targets_B_64_S[..., number][present]
        chosen = scores[present]
        loss = loss + F.cross_entropy(chosen, wanted) / (1 if number < 2 else 4)
        miss = chosen.argmax(-1) - wanted
        log[name] = (
            (miss == 0).float().mean().item()
            if number < 2
            else miss.float().abs().mean().item() * GRID_1000
        )
    log["objects_found"] = ((objectness > 0) == present).all(-1).float().mean().item()
    return loss, log


def optimizers(named_parameters, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices; AdamW for embeddings, convolutions and vectors."""
    matrices, rest = [], []
    for name, p in named_parameters:
        (matrices if p.ndim == 2 and "embed" not in name else rest).append(p)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int, warmup: int, hold: float = 0.5) -> float:
    """Linear warm-up, constant until `hold` of the run, then cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    if step < hold * steps:
        return 1.0
    return 0.5 * (1 + float(np.cos(np.pi * (step - hold * steps) / ((1 - hold) * steps))))


def scene_batch(
    seed: int, index: int, size: int, occlusion: float = 0.15
) -> tuple[list[Scene], np.ndarray]:
    """Batch number `index`: its scenes and images_B_H_W_3, a pure function of (seed, index)."""
    rng = np.random.default_rng([seed, index])
    scenes = [sample_scene(rng, occlusion=occlusion) for _ in range(size)]
    return scenes, np.stack([np.asarray(render(scene)) for scene in scenes])


def average_gradients(parameters: list[Tensor], world: int) -> None:
    """Averages the gradients over the processes, in one message."""
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, part in zip(
        parameters, flat.div_(world).split([p.numel() for p in parameters]), strict=True
    ):
        p.grad.copy_(part.view_as(p))


def train(rank: int, world: int, args: argparse.Namespace) -> None:
    """One process of stage V."""
    torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)

    visual = build("small", build_tokenizer(), args.seed).model.visual
    torch.manual_seed(args.seed)
    head = CellHead()
    named = [
        (n, p)
        for n, p in [*visual.named_parameters(), *head.named_parameters()]
        if "deepstack" not in n
    ]
    parameters = [p for _, p in named]
    opts = optimizers(named, args.rate)
    start = time.time()
    for step in range(args.steps):
        scenes, images = scene_batch(args.seed, step * world + rank, args.batch)
        targets = torch.from_numpy(np.stack([cell_targets(s) for s in scenes]))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * rate_factor(step, args.steps, 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objectness, slots = head(encode_images(visual, patchify(images))[0])
        loss, log = head_loss(objectness.float(), slots, targets)
        loss.backward()
        average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if rank == 0 and step % 20 == 0:
            minutes = (time.time() - start) / 60
            row = {"step": step, "loss": loss.item(), "minutes": minutes, **log}
            print(json.dumps({k: round(v, 3) for k, v in row.items()}), flush=True)
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == args.steps):
            args.out.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.contiguous() for k, v in visual.state_dict().items()},
                args.out / "vision.safetensors",
            )


def main() -> int:
    """Train the tower: `python -m egm_lib.mini.pretraining.vision --out data/runs/pretrain`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=32, help="images a step and process")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()
    return ends(lambda: _train_all(args))


def _train_all(args: argparse.Namespace) -> None:
    if args.workers == 1:
        train(0, 1, args)
    else:
        torch.multiprocessing.spawn(train, args=(args.workers, args), nprocs=args.workers)


if __name__ == "__main__":
    sys.exit(main())
