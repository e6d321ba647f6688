"""Stages A and Base of the miniature's pretraining: alignment, then direct answers.

A: the tower's blocks are frozen. Merger and embeddings learn to spell the thing in each cell
(colour, shape, boxes, centre) in the language model's embeddings, through temporary square
adapters. `small` and `large` both start from these weights.
Base: about fifteen questions for each image, packed so that a question sees only the image and
itself: descriptions, detection lists, ordered lists of places, naming, plain and complex
expressions, full boxes. All answers are direct. Both sizes see the same images and questions in the
same order with the same schedule.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration

from egm_lib.cli import ends
from egm_lib.files import project_root
from egm_lib.mini.grid import GRID_1000, grid_length, level
from egm_lib.mini.models import CELLS, LANGUAGE, WIDTH, build, encode_images, patchify, save
from egm_lib.mini.pretraining.packing import pack, packed_loss
from egm_lib.mini.pretraining.questions import questions
from egm_lib.mini.pretraining.vision import cell_of, optimizers, rate_factor, scene_batch
from egm_lib.mini.scenes import Thing
from egm_lib.mini.tokens import build_tokenizer

TRUNK_STEPS = 2000  # then `large` is grown out of `small`
LARGE_STEPS = 10_000  # then `huge` is grown out of `large`
OCCLUSION = 0.25  # chance of a thing to be partly hidden; gives enough questions about full boxes
SHIPPED = project_root() / "data" / "mini"
SPELLED = {
    "colour": " {}",
    "shape": " {}",
    **{
        f"{box}_{c}": "{}" if c == "x1" else ", {}"
        for box in ("visible", "full")
        for c in ("x1", "y1", "x2", "y2")
    },
    "centre_x": " at {}",
    "centre_y": " {}",
    "size": " {}",
}


def spelled_tokens(thing: Thing) -> list[str]:
    """The words and numbers that a thing's cell learns, spelt as in prompts, traces and answers."""
    numbers = [
        level(v) * GRID_1000 for v in (*thing.visible_box_px, *thing.full_box_px, *thing.centre_px)
    ]
    values = [thing.colour, thing.shape, *numbers, grid_length(thing.side_px)]
    return [form.format(value) for form, value in zip(SPELLED.values(), values, strict=True)]


def align(args: argparse.Namespace) -> None:
    """Stage A: writes aligned.safetensors (tower, mergers, embeddings)."""
    tokenizer = build_tokenizer()
    model = build("small", tokenizer, args.seed).model
    visual, embed = model.visual, model.language_model.embed_tokens
    state = load_file(args.out / "vision.safetensors")
    visual.load_state_dict({k: v for k, v in state.items() if "deepstack" not in k}, strict=False)
    visual.requires_grad_(False)
    visual.merger.requires_grad_(True)
    torch.manual_seed(args.seed)
    adapters = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in SPELLED])
    named = [
        ("embed", embed.weight),
        *visual.merger.named_parameters(),
        *adapters.named_parameters(),
    ]
    opts, start = optimizers(named, args.rate), time.time()
    for step in range(args.steps):
        scenes, images = scene_batch(args.seed + 1, step, args.batch)
        rows, wanted = [], []
        for number, scene in enumerate(scenes):
            for thing in scene.things:
                if thing.visible_box_px is not None:
                    rows.append(number * CELLS**2 + cell_of(thing))
                    wanted.append(tokenizer.convert_tokens_to_ids(spelled_tokens(thing)))
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * rate_factor(step, args.steps, 40)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cells = encode_images(visual, patchify(images))[0].flatten(0, 1)[rows]
            cells = F.rms_norm(cells.float(), (WIDTH,))
            losses, hits = [], []
            for adapter, target in zip(adapters, torch.tensor(wanted).T, strict=True):
                logits = F.linear(adapter(cells), embed.weight).float()
                losses.append(F.cross_entropy(logits, target))
                hits.append((logits.argmax(-1) == target).float().mean().item())
        loss = torch.stack(losses).sum()
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 20 == 0 or step + 1 == args.steps:
            row = {"step": step, "loss": loss.item(), "minutes": (time.time() - start) / 60}
            row |= dict(zip(SPELLED, hits, strict=True))
            print(json.dumps({k: round(v, 3) for k, v in row.items()}), flush=True)
    tensors = {f"visual.{k}": v for k, v in visual.state_dict().items()}
    tensors["embed_tokens.weight"] = embed.weight.detach()
    save_file({k: v.contiguous() for k, v in tensors.items()}, args.out / "aligned.safetensors")


def load_aligned(size: str, out: Path, seed: int, tokenizer):
    """A new language model on the aligned tower and embeddings."""
    model = build(size, tokenizer, seed)
    state = load_file(out / "aligned.safetensors")
    model.model.visual.load_state_dict(
        {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
    )
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.copy_(state["embed_tokens.weight"])
    return model


def base_batch(seed: int, index: int, size: int, tokenizer, step: int):
    """Batch `index` of the base stage: packed tensors, images, and the group of each question.

    step: decides which questions are asked.
    """
    scenes, images = scene_batch(seed, index, size, OCCLUSION)
    asked = [
        questions(scene, Random(f"{seed}-{index}-{n}"), step) for n, scene in enumerate(scenes)
    ]
    batch = pack([[(p, a) for _, p, a in qs] for qs in asked], tokenizer)
    return batch, images, [group for qs in asked for group, _, _ in qs]


def first_coordinate_hits(
    batch, scores: Tensor, groups: list[str], tokenizer
) -> dict[str, list[float]]:
    """By question group: is the first coordinate of the first box within two grid steps?

    That tells whether the right thing was found.
    """
    opener = tokenizer.convert_tokens_to_ids('```json\n[\n\t{"bbox_2d": [')
    numbers = {tokenizer.convert_tokens_to_ids(str(n)): n for n in range(0, 1001, GRID_1000)}
    hits: dict[str, list[float]] = {}
    wanted = batch.labels_N[1:]
    answer = wanted != -100
    rows = zip(
        wanted[answer].tolist(),
        scores.argmax(-1).tolist(),
        batch.segments_N[1:][answer].tolist(),
        strict=True,
    )
    previous, counted = None, set()
    for truth, guess, segment in rows:
        if previous == opener and segment not in counted:
            counted.add(segment)
            gap = abs(numbers.get(guess, 9999) - numbers[truth])
            hits.setdefault(groups[segment], []).append(float(gap <= 2 * GRID_1000))
        previous = truth
    return hits


def grow(small: dict[str, Tensor], large) -> None:
    """Loads a model's weights into one of twice its layers, which then computes the same function.

    As LLaMA Pro and Net2Net do. Every second layer is new and adds nothing, since its output
    projections are zero; nor do the new units of the other layers.
    """
    state = large.state_dict()
    for name, value in state.items():
        parts = name.split(".")
        if "layers" not in parts:
            state[name] = small[name]
            continue
        at = parts.index("layers") + 1
        number, fresh = divmod(int(parts[at]), 2)
        old = small[".".join([*parts[:at], str(number), *parts[at + 1 :]])]
        if fresh:
            state[name] = torch.zeros_like(value) if parts[-2] in ("o_proj", "down_proj") else value
        elif parts[-2] == "down_proj":
            state[name] = torch.cat(
                [old, torch.zeros(len(old), value.shape[1] - old.shape[1])], dim=1
            )
        elif parts[-2] in ("gate_proj", "up_proj"):
            state[name] = torch.cat([old, value[len(old) :]])
        else:
            state[name] = old
    large.load_state_dict(state)


def base(args: argparse.Namespace) -> None:
    """Stage Base for one size: writes <size>/state.pt, from which a stopped run continues.

    The first TRUNK_STEPS are common to both sizes: `large` is grown out of the state that `small`
    leaves in trunk.pt. Trained from nothing, `large` did not find plain things yet after as many
    images as `small` had needed. `huge` is grown out of the shipped `large`, and has a schedule of
    its own from LARGE_STEPS on.
    """
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    if args.size == "huge":  # takes everything from `large`
        model = build("huge", tokenizer, args.seed)
    else:
        model = load_aligned(args.size, args.out, args.seed, tokenizer)
    model.model.visual.requires_grad_(False)  # so that both sizes have the same tower
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opts = optimizers(named, args.rate)
    folder = args.out / args.size
    folder.mkdir(parents=True, exist_ok=True)
    state_file, first, spent = folder / "state.pt", 0, 0.0
    trunk = args.out / "trunk.pt"
    if args.size == "large" and not state_file.exists():
        if not trunk.exists():
            raise SystemExit(
                f"{trunk} is missing: run `base --size small` first, the large model grows out of "
                "it"
            )
        state = torch.load(trunk, weights_only=True)
        grow(state["model"], model)
        first = state["step"]
    elif args.size == "huge" and not state_file.exists():
        large = Qwen3VLForConditionalGeneration.from_pretrained(
            SHIPPED / "large", dtype=torch.float32
        )
        grow(large.state_dict(), model)
        first = LARGE_STEPS
    elif state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first, spent = state["step"], state["minutes"]
    start, scheduled = time.time() - spent * 60, LARGE_STEPS if args.size == "huge" else 0
    held_out = [
        base_batch(990_001, i, args.batch, tokenizer, args.steps) for i in range(args.held_out)
    ]
    for step in range(first, args.steps):
        batch, images, _ = base_batch(args.seed + 2, step, args.batch, tokenizer, step)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * rate_factor(step - scheduled, args.steps - scheduled, 100)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not args.float32):
            with torch.no_grad():
                merged, deepstack = encode_images(model.model.visual, patchify(images))
            loss, _ = packed_loss(model, batch, merged, deepstack)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        if step % 25 == 0:
            row = {
                "step": step,
                "loss": loss.item(),
                "norm": norm.item(),
                "minutes": (time.time() - start) / 60,
            }
            print(json.dumps({k: round(v, 3) for k, v in row.items()}), flush=True)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            print(
                json.dumps({"step": step + 1, "held_out": evaluate(model, held_out, tokenizer)}),
                flush=True,
            )
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in opts],
                "step": step + 1,
                "minutes": (time.time() - start) / 60,
            }
            torch.save(state, folder / "state.pt.new")
            (folder / "state.pt.new").replace(state_file)
            if args.size == "small" and not trunk.exists() and step + 1 >= TRUNK_STEPS:
                shutil.copy(state_file, trunk)


def export(args: argparse.Namespace) -> None:
    """Writes the trained base of one size as a checkpoint in bfloat16, with its processor."""
    model = build(args.size, build_tokenizer(), args.seed)
    model.load_state_dict(torch.load(args.out / args.size / "state.pt", weights_only=True)["model"])
    save(model.to(torch.bfloat16), args.to / args.size)
    print(
        f"{args.size}: {sum(p.numel() for p in model.parameters()):,} parameters in "
        f"{args.to / args.size}"
    )


@torch.no_grad()
def evaluate(model, held_out, tokenizer) -> dict[str, float]:
    """Held-out loss and, by question group, how often the right thing is found."""
    losses, hits = [], {}
    for batch, images, groups in held_out:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged, deepstack = encode_images(model.model.visual, patchify(images))
            loss, scores = packed_loss(model, batch, merged, deepstack)
        losses.append(loss.item())
        for group, values in first_coordinate_hits(batch, scores, groups, tokenizer).items():
            hits.setdefault(group, []).extend(values)
    hops = [
        v
        for k, values in hits.items()
        if k not in ("plain", "place", "amodal", "detect")
        for v in values
    ]
    return {
        "loss": round(float(np.mean(losses)), 4),
        "complex": round(float(np.mean(hops)), 3),
        "n": len(hops),
        **{k: round(float(np.mean(v)), 3) for k, v in sorted(hits.items())},
    }


def main() -> int:
    """One stage: align, base or export, into --out, for --size small, large or huge."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=["align", "base", "export"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the work in progress")
    parser.add_argument(
        "--to", type=Path, default=SHIPPED, help="export: folder of the shipped checkpoints"
    )
    parser.add_argument("--size", choices=list(LANGUAGE), default="small")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=24, help="batches")
    parser.add_argument("--float32", action="store_true", help="base: for a CPU without bfloat16")
    args = parser.parse_args()
    defaults = {"align": (300, 32, 3e-3), "base": (10_000, 4, 2e-3), "export": (0, 0, 0.0)}[
        args.stage
    ]
    args.steps, args.batch, args.rate = (
        given if given is not None else default
        for given, default in zip((args.steps, args.batch, args.rate), defaults, strict=True)
    )
    torch.set_num_threads(args.threads)
    return ends(lambda: {"align": align, "base": base, "export": export}[args.stage](args))


if __name__ == "__main__":
    sys.exit(main())
