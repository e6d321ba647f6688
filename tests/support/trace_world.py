"""A drawn world of a few shapes with prediction rows, for tests of viewer, figures and gallery."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": "#c0392b", "blue": "#2c6fbb", "green": "#3a9d5d"}
BACKGROUND = (226, 222, 210)
PLACES = ("first", "second", "third")
SMALL, EGM, LARGE = "small-base", "small-egm", "large-base"


def draw_world(root: Path, count: int = 6, size: int = 128, seed: int = 0) -> list[dict]:
    """Samples of `count` images written under root/images: one of three squares of one colour."""
    rng = random.Random(seed)
    (root / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(count):
        colour = rng.choice(list(COLOURS))
        image = Image.new("RGB", (size, size), BACKGROUND)
        draw = ImageDraw.Draw(image)
        boxes = []
        for column in range(3):
            side = rng.randint(18, 28)
            x, y = 8 + column * 40 + rng.randint(0, 6), rng.randint(10, 90)
            boxes.append([float(x), float(y), float(x + side), float(y + side)])
            draw.rectangle(boxes[-1], fill=COLOURS[colour])
        other = rng.randint(0, 90)
        draw.ellipse(
            [other, 2, other + 8, 10], fill=COLOURS[rng.choice([c for c in COLOURS if c != colour])]
        )
        image.save(root / "images" / f"{number}.png")
        place, amodal = rng.randrange(3), number % 3 == 2
        modal = boxes[place]
        gt = [modal[0], modal[1], modal[2], modal[3] + 60] if amodal else modal
        samples.append(
            {
                "sample_id": f"s{number}",
                "dataset": "coco_amodal" if amodal else "refcoco",
                "split": "val" if amodal or number % 2 == 0 else "testA",
                "task": "amodal" if amodal else "vanilla",
                "image": f"images/{number}.png",
                "width": size,
                "height": size,
                "image_id": str(number),
                "expression": f"{PLACES[place]} {colour} square from the left",
                "gt_box": gt,
                "modal_box": modal if amodal else None,
                "ann_id": None,
                "ref_id": None,
                "flipped": False,
                "prompt_kind": "ordinal" if number % 2 else "relational",
                "num_lookalikes": 2 + number % 3,
                "boxes_all": boxes,
                "place": place,
            }
        )
    return samples


def answer_row(
    sample: dict, model: str, box: list[float] | None, reasoning: str | None, seed: int = 0
) -> dict:
    """A prediction row as the evaluation writes it."""
    scale = 1000 / sample["width"]
    shown = (
        ""
        if box is None
        else json.dumps([{"bbox_2d": [round(value * scale) for value in box], "label": "square"}])
    )
    fields = {key: value for key, value in sample.items() if key not in ("boxes_all", "place")}
    return fields | {
        "model": model,
        "revision": None,
        "profile": "toy",
        "seed": seed,
        "prompt": "Locate it.",
        "frame": "NORM_1000",
        "raw_answer": f"{reasoning or ''}</think>\n\n{shown}",
        "reasoning": reasoning,
        "boxes": [box] if box else [],
        "box": box,
        "status": "ok" if box else "no_box",
        "error": None,
        "prompt_tokens": 90,
        "reasoning_tokens": len((reasoning or "").split()),
        "answer_tokens": 10,
        "finish_reason": "stop",
        "latency_ms": None,
    }


def predictions_of(samples: list[dict], seed: int = 0) -> list[dict]:
    """Three models: the small one takes the first square, EGM is right, the large one has no box.

    EGM's trace counts the squares up to the one that is asked for.
    """
    rows = []
    for sample in samples:
        scale = 1000 / sample["width"]
        counted = [
            f"{word} at {round(scale * (x1 + x2) / 2)} {round(scale * (y1 + y2) / 2)}"
            for word, (x1, y1, x2, y2) in zip(PLACES, sample["boxes_all"], strict=True)
        ]
        trace = (
            "There are three squares of this colour. "
            f"From the left: {', '.join(counted[: sample['place'] + 1])}; the others do not count."
        )
        rows.append(answer_row(sample, SMALL, sample["boxes_all"][0], None, seed))
        rows.append(answer_row(sample, EGM, sample["gt_box"], trace, seed))
        rows.append(answer_row(sample, LARGE, None, None, seed))
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def group_of(sample: dict, count: int = 16, seed: int = 3) -> dict:
    """A GRPO group: half of the completions right, the others on another square."""
    rng = random.Random(seed)
    completions = []
    for number in range(count):
        box = (
            sample["gt_box"] if number % 2 == 0 else sample["boxes_all"][(sample["place"] + 1) % 3]
        )
        jitter = [round(value * 1000 / sample["width"] + rng.randint(-8, 8)) for value in box]
        completions.append(
            f'it is the square on the left side</think>\n\n[{{"bbox_2d": {jitter}}}]'
        )
    return sample | {"completions": completions, "step": 4}
