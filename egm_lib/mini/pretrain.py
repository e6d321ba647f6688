"""Stages A and Base of the miniature's pretraining: alignment, then direct answers.

A: the tower's blocks are frozen; merger and embeddings learn to spell each cell's thing (colour,
shape, boxes, centre) in the language model's own embeddings, through throw-away square adapters.
`small` and `large` both start from these.
Base: some fifteen questions a picture, packed so that each question sees the picture and itself
only: descriptions, detection lists, ordered lists of places, naming, plain and complex expressions,
full boxes. Every answer is direct. Both sizes see the same pictures and questions in the same order
with the same schedule.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from egm_lib.mini.language import (
    AXES,
    MAX_CANDIDATES,
    ORDINALS,
    Kind,
    Query,
    clear_order,
    grid_length,
    place,
    sample_query,
    sort_value,
)
from egm_lib.mini.models import CELLS, WIDTH, build, encode_pictures, patchify, save
from egm_lib.mini.scenes import SIZE_PX, Scene, Thing
from egm_lib.mini.tokens import build_tokenizer
from egm_lib.mini.vision import GRID_1000, cell_of, level, optimizers, rate_factor, scene_batch
from egm_lib.profile import project_root
from egm_lib.prompts import FAMILIES

EASY_STEPS = 850  # describing and finding come before selecting; without, selection is never learnt
# From here on places are also asked for, and told, in words, as reasoning will need it
WORDED_STEPS = 6000
TRUNK_STEPS = 2000  # then `large` is grown out of `small`
OCCLUSION = 0.25  # chance of a thing to be partly hidden: enough hidden ones to ask for full boxes
FAMILY = FAMILIES["qwen3-vl"]
IMAGE_WH = (SIZE_PX, SIZE_PX)
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
    """The words and numbers, spelt as in prompts, traces and answers, that a thing's cell must be
    able to say.
    """
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
        scenes, pictures = scene_batch(args.seed + 1, step, args.batch)
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
            cells = encode_pictures(visual, patchify(pictures))[0].flatten(0, 1)[rows]
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


def box_text(box_px) -> str:
    """`[120, 300, 260, 420]` on the answer grid."""
    return "[" + ", ".join(str(level(v) * GRID_1000) for v in box_px) + "]"


def ordered_list(scene: Scene, kind: Kind, axis: str) -> str | None:
    """`first at 120 300, second at ...`: all of a kind in order, or None where the order is
    unclear.
    """
    things = sorted(
        (scene.things[i] for i in kind.members(scene)), key=lambda t: sort_value(t, axis)
    )
    if (
        not things
        or len(things) > len(ORDINALS)
        or not clear_order([sort_value(t, axis) for t in things], axis, 9)
    ):
        return None
    size = axis in ("largest", "smallest")
    return (
        ", ".join(
            f"{ORDINALS[n]} {place(t)}" + (f" size {grid_length(t.side_px)}" if size else "")
            for n, t in enumerate(things)
        )
        + "."
    )


def description(scene: Scene, axis: str) -> str:
    """`red circle at 120 300, blue star at 200 480, ...`: everything there is, in order."""
    seen = sorted(
        (t for t in scene.things if t.visible_box_px is not None), key=lambda t: sort_value(t, axis)
    )
    return ", ".join(f"{Kind(t.colour, t.shape).name()} {place(t)}" for t in seen) + "."


def locate(
    query: Query, scene: Scene, index: int, rng: Random, task: str = "vanilla"
) -> tuple[str, str]:
    """(prompt, direct answer) for an expression."""
    thing = scene.things[index]
    box = thing.full_box_px if task == "amodal" else thing.visible_box_px
    return FAMILY.prompt(query.words(rng), task), FAMILY.answer(
        box, IMAGE_WH, None, None, grid=GRID_1000
    )


def worded(scene: Scene, rng: Random) -> list[tuple[str, str, str]]:
    """(group, prompt, answer): where a thing is, what is at a place and the box of what is
    there.
    """
    found = []
    for drawn in (sample_query(rng, scene, 0), sample_query(rng, scene, 0)):
        if drawn:
            found.append(
                (
                    "where",
                    f"Describe the {drawn[0].kind.name()}.",
                    "</think>\n\n" + drawn[0].steps(scene),
                )
            )
    seen = [t for t in scene.things if t.visible_box_px is not None]
    for thing in rng.sample(seen, min(2, len(seen))):
        answer = FAMILY.answer(thing.visible_box_px, IMAGE_WH, None, None, grid=GRID_1000)
        found.append(("place", FAMILY.prompt(f"thing {place(thing)}", "vanilla"), answer))
    thing = rng.choice(seen)
    found.append(
        (
            "name",
            f"What is {place(thing)}?",
            f"</think>\n\n{Kind(thing.colour, thing.shape).name()}.",
        )
    )
    return found


def questions(scene: Scene, rng: Random, step: int) -> list[tuple[str, str, str]]:
    """(group, prompt, answer) for one picture, in random order, as they are asked at a step of the
    training.
    """
    easy, in_words = step < EASY_STEPS, step >= WORDED_STEPS
    found: list[tuple[str, str, str]] = []
    kinds = [Kind(*key) for key, members in scene.members.items() if len(members) <= MAX_CANDIDATES]
    crowded = [k for k in kinds if len(k.members(scene)) > 1] or kinds
    for side in rng.sample(("left", "right", "top", "bottom"), 3 if easy else 1):
        found.append(
            (
                "describe",
                f"Describe the picture from the {side}.",
                "</think>\n\n" + description(scene, side),
            )
        )
    for number in range(2):
        kind = rng.choice(crowded if number else kinds)
        boxes = '},\n\t{"bbox_2d": '.join(
            box_text(scene.things[i].visible_box_px) for i in kind.members(scene)
        )
        prompt = (
            f"Detect all {kind.name(plural=True)}, output their bbox coordinates using JSON format."
        )
        found.append(
            ("detect", prompt, f'</think>\n\n```json\n[\n\t{{"bbox_2d": {boxes}}}\n]\n```')
        )
    for _ in range(1 if easy else 3):
        kind, axis = rng.choice(crowded), rng.choice(AXES)
        answer = ordered_list(scene, kind, axis)
        if answer:
            heading = f"{kind.name(plural=True)} from the {axis}"
            told = f"{heading}: {answer}" if in_words else answer
            found.append(("list", f"List all {heading}.", "</think>\n\n" + told))
    seen = [i for i, t in enumerate(scene.things) if t.visible_box_px is not None]
    thing = scene.things[rng.choice(seen)]
    name = Kind(thing.colour, thing.shape).name()
    found.append(
        ("name", f"What is in {box_text(thing.visible_box_px)}?", "</think>\n\n" + name + ".")
    )
    for hops in (0, 0, 0) if easy else (0, 0, 1, 1, 1, 2, 2, 3):
        drawn = sample_query(rng, scene, hops)
        if drawn:
            found.append((drawn[0].prompt_kind, *locate(*drawn[:1], scene, drawn[1], rng)))
    found += worded(scene, rng) if in_words else []
    hidden = [i for i in seen if scene.things[i].visible_share < 0.98]
    for _ in range(0 if easy else 2):
        drawn = sample_query(rng, scene, rng.randrange(3), tries=30)
        if drawn and (not hidden or drawn[1] in hidden or rng.random() < 0.3):
            found.append(("amodal", *locate(*drawn[:1], scene, drawn[1], rng, "amodal")))
    rng.shuffle(found)
    return found


@dataclass(frozen=True)
class Packed:
    """Pictures and their questions as one ragged row of N tokens, and which tokens belong together.

    prefix_B_P indexes each picture's prefix; each bucket is (picture of question, token index Q_L,
    valid Q_L). labels_N is -100 outside answers; segments_N numbers the questions, -1 in prefixes.
    """

    ids_N: Tensor
    labels_N: Tensor
    segments_N: Tensor
    positions_3_N: Tensor
    prefix_B_P: Tensor
    buckets: list[tuple[Tensor, Tensor, Tensor]]


def pack(prompts_answers: list[list[tuple[str, str]]], tokenizer, buckets: int = 4) -> Packed:
    """Tokenise each picture's (prompt, answer) pairs; positions restart after the picture for every
    question.
    """
    ids = tokenizer.convert_tokens_to_ids
    opening = ids(["<|im_start|>", "user\n", "<|vision_start|>"])
    prefix = opening + [ids("<|image_pad|>")] * CELLS**2 + ids(["<|vision_end|>"])
    start, cells = len(opening), torch.arange(CELLS**2)
    image = torch.stack([torch.zeros_like(cells), cells // CELLS, cells % CELLS]) + start
    lead, after = torch.arange(start).expand(3, -1), torch.full((3, 1), start + CELLS)
    turn = ids(["<|im_end|>", "\n", "<|im_start|>", "assistant\n", "<think>", "\n"])
    encoded = iter(
        tokenizer([t for pairs in prompts_answers for pair in pairs for t in pair]).input_ids
    )
    tokens, labels, segments, positions, prefixes, spans = [], [], [], [], [], []
    for number, pairs in enumerate(prompts_answers):
        prefixes.append(range(len(tokens), len(tokens) + len(prefix)))
        tokens += prefix
        labels += [-100] * len(prefix)
        segments += [-1] * len(prefix)
        positions.append(torch.cat([lead, image, after], dim=1))
        for _ in pairs:
            question, answer = next(encoded) + turn, next(encoded) + ids(["<|im_end|>"])
            length = len(question) + len(answer)
            segments += [len(spans)] * length
            spans.append((number, len(tokens), length))
            tokens += question + answer
            labels += [-100] * len(question) + answer
            positions.append((torch.arange(length) + start + CELLS + 1).expand(3, -1))
    by_length = sorted(spans, key=lambda span: span[2])
    chunks = [
        by_length[i * len(spans) // buckets : (i + 1) * len(spans) // buckets]
        for i in range(buckets)
    ]
    return Packed(
        torch.tensor(tokens),
        torch.tensor(labels),
        torch.tensor(segments),
        torch.cat(positions, dim=1),
        torch.tensor([list(p) for p in prefixes]),
        [_bucket(chunk) for chunk in chunks if chunk],
    )


def _bucket(spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    owner, begin, length = torch.tensor(spans).T
    offset = torch.arange(int(length.max()))
    valid = offset < length[:, None]
    return owner, torch.where(valid, begin[:, None] + offset, begin[:, None]), valid


def _attend(q, k, v, scaling: float) -> Tensor:
    """Causal attention, the last query at the last key; plain matrices beat the fused CPU kernel
    here.
    """
    length, seen = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden = torch.ones(length, seen, dtype=torch.bool).triu(seen - length + 1)
    scores = ((q * scaling) @ k.transpose(-1, -2)).masked_fill(hidden, -1e4)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def packed_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, *, packed: Packed, **kwargs
):
    """Attention in which each question sees its picture's prefix and itself; query 1 x heads x N x
    d.
    """
    groups = query.shape[1] // key.shape[1]
    # N x heads x d
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    prefix_k, prefix_v = k[packed.prefix_B_P], v[packed.prefix_B_P]
    outputs = [_attend(q[packed.prefix_B_P], prefix_k, prefix_v, scaling).flatten(0, 1)]
    indices = [packed.prefix_B_P.flatten()]
    for owner, index_Q_L, valid_Q_L in packed.buckets:
        keys = torch.cat([prefix_k[owner], k[index_Q_L]], dim=1)
        values = torch.cat([prefix_v[owner], v[index_Q_L]], dim=1)
        outputs.append(_attend(q[index_Q_L], keys, values, scaling)[valid_Q_L])
        indices.append(index_Q_L[valid_Q_L])
    return torch.cat(outputs)[torch.cat(indices).argsort()][None], None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


def packed_loss(
    model, packed: Packed, merged_B_64_W: Tensor, deepstack: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens, and the scores at those tokens (M x vocabulary,
    float32).
    """
    lm = model.model.language_model
    lm.config._attn_implementation = "packed"
    image = packed.ids_N == model.config.image_token_id
    x = lm.embed_tokens(packed.ids_N)
    x = x.masked_scatter(image[:, None], merged_B_64_W.to(x.dtype).reshape(-1, x.shape[-1]))
    hidden = lm(
        inputs_embeds=x[None],
        position_ids=packed.positions_3_N[:, None],
        visual_pos_masks=image[None],
        attention_mask=torch.ones(1, 1, 1, 1),
        packed=packed,
        use_cache=False,
        deepstack_visual_embeds=[d.to(x.dtype).flatten(0, 1) for d in deepstack],
    ).last_hidden_state[0]
    wanted = packed.labels_N[1:]
    scores = model.lm_head(hidden[:-1][wanted != -100]).float()
    return F.cross_entropy(scores, wanted[wanted != -100]), scores


def load_aligned(size: str, out: Path, seed: int, tokenizer):
    """A fresh language model on the aligned tower and embeddings."""
    model = build(size, tokenizer, seed)
    state = load_file(out / "aligned.safetensors")
    model.model.visual.load_state_dict(
        {k[7:]: v for k, v in state.items() if k.startswith("visual.")}
    )
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight.copy_(state["embed_tokens.weight"])
    return model


def base_batch(seed: int, index: int, size: int, tokenizer, step: int):
    """Batch `index` of the base stage as asked at a step: packed tensors, pictures, each answer's
    question group.
    """
    scenes, pictures = scene_batch(seed, index, size, OCCLUSION)
    asked = [
        questions(scene, Random(f"{seed}-{index}-{n}"), step) for n, scene in enumerate(scenes)
    ]
    batch = pack([[(p, a) for _, p, a in qs] for qs in asked], tokenizer)
    return batch, pictures, [group for qs in asked for group, _, _ in qs]


def first_coordinate_hits(
    batch, scores: Tensor, groups: list[str], tokenizer
) -> dict[str, list[float]]:
    """Per question group, whether the first box's first coordinate is within two grid steps: the
    right thing or not.
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
    """Load a small model's weights into the large one so that it computes the same function (LLaMA
    Pro, Net2Net).

    Every second layer is new and adds nothing (its output projections are zero), as do the new
    units of the others.
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
    """Stage Base for one size: writes <size>/state.pt, from which a stopped run goes on.

    The first TRUNK_STEPS are common: `small` leaves its state there in trunk.pt, from which `large`
    is grown. Trained from nothing, `large` did not find plain things yet after as many pictures as
    `small` needed for it.
    """
    torch.set_num_threads(args.threads)
    tokenizer = build_tokenizer()
    model = load_aligned(args.size, args.out, args.seed, tokenizer)
    model.model.visual.requires_grad_(False)  # so that both sizes look through the very same eyes
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    opts = optimizers(named, args.rate)
    folder = args.out / args.size
    folder.mkdir(parents=True, exist_ok=True)
    state_file, first, spent = folder / "state.pt", 0, 0.0
    trunk = args.out / "trunk.pt"
    if args.size == "large" and not state_file.exists():
        if not trunk.exists():
            raise SystemExit(
                f"{trunk} is missing: run `base --size small` first, the large model grows out of it"
            )
        state = torch.load(trunk, weights_only=True)
        grow(state["model"], model)
        first = state["step"]
    elif state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        first, spent = state["step"], state["minutes"]
    start = time.time() - spent * 60
    held_out = [
        base_batch(990_001, i, args.batch, tokenizer, args.steps) for i in range(args.held_out)
    ]
    for step in range(first, args.steps):
        batch, pictures, _ = base_batch(args.seed + 2, step, args.batch, tokenizer, step)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = args.rate * rate_factor(step, args.steps, 100)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                merged, deepstack = encode_pictures(model.model.visual, patchify(pictures))
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
    """Write the trained base of one size as a checkpoint (bfloat16, tokenizer and processor beside
    it).
    """
    model = build(args.size, build_tokenizer(), args.seed)
    model.load_state_dict(torch.load(args.out / args.size / "state.pt", weights_only=True)["model"])
    save(model.to(torch.bfloat16), args.to / args.size)
    print(
        f"{args.size}: {sum(p.numel() for p in model.parameters()):,} parameters in {args.to / args.size}"
    )


@torch.no_grad()
def evaluate(model, held_out, tokenizer) -> dict[str, float]:
    """Held-out loss and, per question group, the share whose first coordinate points at the right
    thing.
    """
    losses, hits = [], {}
    for batch, pictures, groups in held_out:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            merged, deepstack = encode_pictures(model.model.visual, patchify(pictures))
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


def main() -> None:
    """`python -m egm_lib.mini.pretrain align|base|export --out FOLDER [--size small|large]`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("stage", choices=["align", "base", "export"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the work in progress")
    parser.add_argument(
        "--to", type=Path, default=SHIPPED, help="export: folder of the shipped checkpoints"
    )
    parser.add_argument("--size", choices=["small", "large"], default="small")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None)
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=400)
    parser.add_argument("--held-out", type=int, default=24, help="batches")
    args = parser.parse_args()
    defaults = {"align": (300, 32, 3e-3), "base": (10_000, 4, 2e-3), "export": (0, 0, 0.0)}[
        args.stage
    ]
    args.steps, args.batch, args.rate = (
        given if given is not None else default
        for given, default in zip((args.steps, args.batch, args.rate), defaults, strict=True)
    )
    torch.set_num_threads(args.threads)
    {"align": align, "base": base, "export": export}[args.stage](args)


if __name__ == "__main__":
    main()
