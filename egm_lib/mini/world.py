"""Writes the miniature world to disk in the record format of real data.

`python -m egm_lib.mini.world --out data/raw/mini --profile mini` writes images/*.png, train.jsonl,
train_amodal.jsonl, selection.jsonl, selection_amodal.jsonl, eval/<dataset>_<split>.jsonl, and
teacher.jsonl with what the teacher knows. Splits differ by seed, and no image is in two of them. A
known small share of labels is wrong, of expressions ambiguous, and of targets tiny.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from random import Random

import numpy as np

from egm_lib.boxes import Box, iou
from egm_lib.cli import ends
from egm_lib.data import AMODAL_SPLITS, EVAL_SPLITS, write_samples
from egm_lib.files import read_json
from egm_lib.mini.language import TINY_PX, Kind, Query, amodal_steps, num_lookalikes, sample_query
from egm_lib.mini.scenes import SIZE_PX, Scene, render, sample_scene
from egm_lib.profile import Data, ProfileError, load_profile

VERSION = 3  # of what the recipes draw; a world of another version is written again
GT_ERROR_SHARE, AMBIGUOUS_SHARE, UNVERIFIED_SHARE = 0.02, 0.02, 0.04
TINY_SHARE_OF_THINGS = 0.02
EDITION = 1000  # from the streams of some test scenes to those of the next
# As people / objects
SHAPES_OF_SPLIT = {"testA": ("circle", "ring", "star"), "testB": ("square", "triangle", "cross")}


@dataclass(frozen=True)
class Recipe:
    """What a split is made of.

    stream: the split's random seed. hops: weights of 0, 1, 2 and 3 serial selections.
    """

    dataset: str
    split: str
    stream: int
    hops: tuple[float, float, float, float]
    location: bool = True
    amodal: bool = False
    per_image: int = 3


def recipes(test_scenes: int = 0) -> dict[str, Recipe]:
    """Every file of the world, by its path below the root.

    test_scenes: which scenes the test splits have. Each number gives other scenes of
    the same recipes; training, selection and validation stay as they are.
    """
    tests = EDITION * test_scenes
    found = {
        "train.jsonl": Recipe("refcoco", "train", 101, (0.12, 0.38, 0.33, 0.17), per_image=6),
        "train_amodal.jsonl": Recipe(
            "coco_amodal", "train", 102, (0.35, 0.4, 0.25, 0.0), amodal=True
        ),
        "selection.jsonl": Recipe("refcoco", "selection", 103, (0.05, 0.35, 0.4, 0.2)),
        "selection_amodal.jsonl": Recipe(
            "coco_amodal", "selection", 104, (0.35, 0.4, 0.25, 0.0), amodal=True
        ),
        "validation.jsonl": Recipe("refcoco", "validation", 105, (0.12, 0.38, 0.33, 0.17)),
    }
    mixes = {
        "refcoco": (0.15, 0.5, 0.35, 0.0),
        "refcoco+": (0.2, 0.45, 0.35, 0.0),
        "refcocog": (0.0, 0.2, 0.45, 0.35),
    }
    for number, (dataset, split) in enumerate(EVAL_SPLITS):
        found[f"eval/{dataset}_{split}.jsonl"] = Recipe(
            dataset,
            split,
            tests + 201 + number,
            mixes[dataset],
            location=dataset != "refcoco+",
            per_image=2,
        )
    for number, (dataset, split) in enumerate(AMODAL_SPLITS):
        found[f"eval/{dataset}_{split}.jsonl"] = Recipe(
            dataset, split, tests + 221 + number, (0.35, 0.4, 0.25, 0.0), amodal=True, per_image=2
        )
    return found


def _drawn(recipe: Recipe, scene: Scene, rng: Random) -> tuple[Query, int] | None:
    """An expression of the recipe's mix for a thing that the split may ask for."""
    hops = rng.choices(range(4), recipe.hops)[0]
    shapes = SHAPES_OF_SPLIT.get(recipe.split)
    for _ in range(12):
        drawn = sample_query(rng, scene, hops, location=recipe.location)
        if drawn is None:
            return None
        thing = scene.things[drawn[1]]
        if recipe.amodal and not 0.2 <= iou(thing.visible_box_px, thing.full_box_px) <= 0.85:
            continue
        if shapes is None or thing.shape in shapes:
            return drawn
    return None


def _scene(recipe: Recipe, number: int) -> Scene:
    return sample_scene(
        np.random.default_rng([recipe.stream, number]),
        occlusion=0.5 if recipe.amodal else 0.06,
        tiny=TINY_SHARE_OF_THINGS,
    )


def samples(recipe: Recipe, count: int) -> Iterator[tuple[Scene, str, list[dict], list[dict]]]:
    """(scene, image id, samples, what the teacher knows), image by image, for `count` samples."""
    made, number = 0, 0
    while made < count:
        scene = _scene(recipe, number)
        rng = Random(f"{recipe.stream}-{number}")
        image_id = f"{recipe.dataset}_{recipe.split}_{number:06d}"
        number += 1
        rows, truths, asked = [], [], set()
        for _ in range(recipe.per_image):
            drawn = _drawn(recipe, scene, rng)
            if drawn is None or drawn in asked or made + len(rows) == count:
                continue
            asked.add(drawn)
            row, truth = _sample(recipe, scene, *drawn, rng)
            name = f"{image_id}_{len(rows)}"
            rows.append(
                {"sample_id": name, "image": f"images/{image_id}.png", "image_id": image_id, **row}
            )
            truths.append({"sample_id": name, **truth})
        made += len(rows)
        if rows:
            yield scene, image_id, rows, truths


def _sample(
    recipe: Recipe, scene: Scene, query: Query, index: int, rng: Random
) -> tuple[dict, dict]:
    """One sample (without its ids) and what the teacher knows of it, with the planted faults."""
    thing, words = scene.things[index], query.words(rng)
    box = list(thing.full_box_px if recipe.amodal else thing.visible_box_px)
    others = [scene.things[i] for i in query.kind.members(scene) if i != index]
    kind = Kind(thing.colour, thing.shape)
    crowd = len(kind.members(scene)) > 1
    cause, verified, fault = (
        "SMALL-OBJECT" if thing.side_px < TINY_PX else None,
        "YES",
        rng.random(),
    )
    amodal_expression = words if recipe.amodal else None
    if not recipe.amodal and fault < GT_ERROR_SHARE and others:
        box, cause = list(rng.choice(others).visible_box_px), "GT-ERROR"
    elif not recipe.amodal and fault > 1 - AMBIGUOUS_SHARE and crowd:
        words, cause = kind.name(), "AMBIGUOUS-IMAGE"
    elif recipe.amodal and fault < UNVERIFIED_SHARE and crowd:
        amodal_expression, verified = kind.name(), "NO"
    # COCO-Amodal has names, not expressions; in training the teacher writes the expressions
    expression = kind.name() if recipe.split in ("train", "selection") and recipe.amodal else words
    row = {
        "dataset": recipe.dataset,
        "split": recipe.split,
        "task": "amodal" if recipe.amodal else "vanilla",
        "width": SIZE_PX,
        "height": SIZE_PX,
        "expression": expression,
        "gt_box": box,
        "modal_box": list(thing.visible_box_px) if recipe.amodal else None,
        "ann_id": str(index),
        "ref_id": None,
        "flipped": False,
        "prompt_kind": query.prompt_kind,
        "num_lookalikes": num_lookalikes(query, scene, index),
    }
    truth = {
        "reasoning": query.steps(scene),
        "amodal_expression": amodal_expression,
        "amodal_reasoning": amodal_steps(query, scene, index) if recipe.amodal else None,
        "verify": verified,
        "planted_cause": cause,
        "gt_box": box,
        "lookalike_boxes_px": [
            list(o.full_box_px if recipe.amodal else o.visible_box_px) for o in others
        ],
    }
    return row, truth


def objects_in(sample: Mapping, data: Data) -> list[Box] | None:
    """Full boxes (xyxy px) of every object that can be seen in a sample's image.

    The scene is drawn again from its seed, in about a millisecond. None where the objects are not
    known: for other data than the miniature's, for a flipped image, and for a sample whose box is
    none of the scene's, which another version of the world has drawn.
    """
    if data.source != "mini" or sample.get("flipped"):
        return None
    split = sample.get("dataset"), sample.get("split")
    number = str(sample.get("image_id")).rpartition("_")[2]
    for recipe in recipes(data.test_scenes).values():
        if (recipe.dataset, recipe.split) == split and number.isdecimal():
            things = [thing for thing in _scene(recipe, int(number)).things if thing.visible_box_px]
            boxes = {box for thing in things for box in (thing.full_box_px, thing.visible_box_px)}
            known = tuple(sample.get("gt_box") or ()) in boxes
            return [thing.full_box_px for thing in things] if known else None
    return None


def counts(data: Data) -> dict[str, int]:
    """How many samples each file gets under a profile."""
    limits = {
        "train.jsonl": data.train_limit,
        "train_amodal.jsonl": data.train_amodal_limit,
        "selection.jsonl": data.selection_limit,
        "selection_amodal.jsonl": data.selection_amodal_limit,
        "validation.jsonl": data.eval_limit and 5 * data.eval_limit,
    }
    wanted = {name: limits.get(name, data.eval_limit) for name in recipes()}
    if missing := [name for name, count in wanted.items() if count is None]:
        raise ProfileError(
            f"the miniature world has no end: the profile's `data` needs a limit for {missing[0]}"
        )
    return wanted


def write_split(folder: Path, name: str, count: int, test_scenes: int = 0) -> dict[bytes, str]:
    """Writes images, samples and what the teacher knows; returns {digest: image id}."""
    digests: dict[bytes, str] = {}
    rows: list[dict] = []
    with open(_truths(folder, name), "w", encoding="utf-8") as truths_file:
        for scene, image_id, found, truths in samples(recipes(test_scenes)[name], count):
            image = render(scene)
            digests[hashlib.blake2b(image.tobytes(), digest_size=16).digest()] = image_id
            image.save(folder / "images" / f"{image_id}.png", compress_level=1)
            rows += found
            truths_file.writelines(json.dumps(truth) + "\n" for truth in truths)
    write_samples(folder / name, rows)
    return digests


def _truths(folder: Path, name: str) -> Path:
    return folder / f"teacher-{name.replace('/', '-')}"


def write_world(out: Path, wanted: dict[str, int], test_scenes: int = 0) -> dict[str, int]:
    """Writes the world, unless it is there with the same sizes and test scenes; returns the samples
    of each file.

    The folder appears whole or not at all: it is written beside its place, one process for each
    file, and then moved there.
    """
    done, made = out / "world.json", {"version": VERSION, "samples": wanted}
    made |= {"test_scenes": test_scenes} if test_scenes else {}
    if read_json(done, f"delete {out} to write it again") == made:
        return wanted
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
    try:
        (scratch / "images").mkdir()
        (scratch / "eval").mkdir()
        seen: dict[bytes, str] = {}
        with ProcessPoolExecutor() as pool:
            sizes = wanted.values()
            parts = pool.map(write_split, repeat(scratch), wanted, sizes, repeat(test_scenes))
            for digests in parts:
                if twice := seen.keys() & digests.keys():
                    pair = {(seen[digest], digests[digest]) for digest in twice}
                    raise RuntimeError(
                        f"the same image under two names, change a stream: {sorted(pair)[0]}"
                    )
                seen |= digests
        with open(scratch / "teacher.jsonl", "wb") as teacher:
            for name in wanted:
                part = _truths(scratch, name)
                teacher.write(part.read_bytes())
                part.unlink()
        (scratch / "world.json").write_text(json.dumps(made, indent=1))
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wanted


def main(argv: list[str] | None = None) -> int:
    """Writes the world of a profile."""
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.mini.world", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--profile", default="mini")
    args = parser.parse_args(argv)
    return ends(lambda: _write(args))


def _write(args: argparse.Namespace) -> None:
    data = load_profile(args.profile).data
    made = write_world(args.out, counts(data), data.test_scenes)
    print(f"{sum(made.values())} samples in {len(made)} files under {args.out}")


if __name__ == "__main__":
    sys.exit(main())
