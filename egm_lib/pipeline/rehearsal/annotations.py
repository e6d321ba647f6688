"""Drawn images, annotated in the formats of RefCOCO, COCO-Amodal and TAO-Amodal.

They lie where `python -m egm_lib.data fetch` leaves the real ones, below a data root:

    images/{train2014,val2014}/COCO_*.jpg    images/tao/train/YFCC100M/<video>/<frame>.jpg
    refcoco/refs(unc).p    refcoco+/refs(unc).p    refcocog/refs(umd).p    each with instances.json
    coco_amodal/annotations/COCO_amodal_{train,val,test}2014.json    tao_amodal/train.json

`prepare` continues from there. All boxes and polygons are in pixels of the image.
"""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

WIDTH, HEIGHT = 320, 240  # half of what COCO's images have: a quarter of the image tokens
COLOURS = {
    "red": (205, 50, 45),
    "blue": (50, 90, 200),
    "green": (60, 150, 70),
    "yellow": (225, 195, 60),
    "purple": (130, 70, 160),
    "orange": (230, 130, 40),
}
KINDS = ("circle", "square", "triangle")
REFCOCO_SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
}
# Image numbers are COCO's ids: equal numbers in two data sets are the same image.
_TRAIN_IDS = range(1, 9)
_AMODAL_TRAIN_IDS = range(101, 107)
_LEAKED_ID = 8  # trained on everywhere, tested on in RefCOCO+: `prepare` has to leave it out


@dataclass(frozen=True)
class Shape:
    """A drawn thing, which later shapes of its scene hide. corners: xy px; may leave the image."""

    kind: str
    colour: str
    corners: tuple[tuple[float, float], ...]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        xs, ys = zip(*self.corners, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    @property
    def mask_H_W(self) -> np.ndarray:
        """Which pixels of the image it would cover if nothing hid it, bool."""
        canvas = Image.new("1", (WIDTH, HEIGHT))
        ImageDraw.Draw(canvas).polygon(self.corners, fill=1)
        return np.asarray(canvas)


def write_downloads(root: str | Path, *, seed: int = 0) -> Path:
    """Writes all that `prepare` reads; the same seed gives the same files. Returns root."""
    root = Path(root)
    _write_refcoco(root, seed)
    _write_coco_amodal(root, seed)
    _write_tao_amodal(root, seed)
    return root


def scene(key: str, *, overlapping: bool) -> list[Shape]:
    """Four shapes, drawn by chance from a key.

    overlapping: two pairs, of which the second hides one side of the first; else side by side.
    """
    chance = random.Random(key)
    colours = chance.sample(list(COLOURS), 4)
    if not overlapping:
        return [
            _shape(
                chance.choice(KINDS),
                colour,
                40 + 80 * place,
                120 + chance.randint(-60, 60),
                chance,
            )
            for place, colour in enumerate(colours)
        ]
    shapes = []
    for place in (0, 2):
        x, y = 90 + 70 * place, 120 + chance.randint(-15, 15)
        dx, dy = chance.choice(((-45, 0), (45, 0), (0, -45), (0, 45)))
        shapes.append(_shape(chance.choice(KINDS), colours[place], x, y, chance))
        shapes.append(_shape("square", colours[place + 1], x + dx, y + dy, chance, radius=37))
    return shapes


def _shape(
    kind: str, colour: str, x: float, y: float, chance: random.Random, radius: int = 27
) -> Shape:
    return Shape(
        kind, colour, _outline(kind, x + chance.randint(-2, 2), y, radius + chance.randint(-2, 2))
    )


def _outline(kind: str, x: float, y: float, radius: float) -> tuple[tuple[float, float], ...]:
    if kind == "circle":
        angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return tuple(
            (round(x + radius * np.cos(a), 2), round(y + radius * np.sin(a), 2)) for a in angles
        )
    if kind == "square":
        left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
        return ((left, top), (right, top), (right, bottom), (left, bottom))
    return ((x, y - radius), (x + radius, y + radius), (x - radius, y + radius))


def draw(shapes: Iterable[Shape]) -> Image.Image:
    """An image of a scene, WIDTH x HEIGHT px."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (215, 220, 222))
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, HEIGHT * 2 // 3, WIDTH, HEIGHT), fill=(180, 170, 150))
    for shape in shapes:
        pen.polygon(shape.corners, fill=COLOURS[shape.colour], outline=(40, 40, 40))
    return image


def _draw(shapes: Iterable[Shape], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(shapes).save(path, quality=90)


# --- RefCOCO, RefCOCO+ and RefCOCOg ---


def _write_refcoco(root: Path, seed: int) -> None:
    for (dataset, split_by), splits in REFCOCO_SPLITS.items():
        first_tested = 20 + 10 * list(REFCOCO_SPLITS).index((dataset, split_by))
        by_split = {"train": list(_TRAIN_IDS)}
        for place, split in enumerate(splits[1:]):
            by_split[split] = [first_tested + 2 * place, first_tested + 2 * place + 1]
        if dataset == "refcoco+":
            by_split["val"].append(_LEAKED_ID)
        refs, images, annotations = [], {}, []
        for split, image_ids in by_split.items():
            for image_id in image_ids:
                shapes = scene(f"{seed}:{image_id}", overlapping=False)
                _draw(shapes, root / "images" / "train2014" / _train_name(image_id))
                images[image_id] = _coco_image(image_id, _train_name(image_id))
                for place, shape in enumerate(shapes):
                    ann_id = 10 * image_id + place
                    annotations.append(_instance(ann_id, image_id, shape))
                    refs.append(
                        _reference(len(refs), ann_id, image_id, split, shapes, place, dataset)
                    )
        if dataset == "refcoco+":  # the leaked image has its annotations from training already
            annotations = list({each["id"]: each for each in annotations}.values())
        folder = root / dataset
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"refs({split_by}).p", "wb") as file:
            pickle.dump(refs, file, protocol=2)  # as Python 2 wrote the real ones
        categories = [
            {"id": number, "name": kind, "supercategory": "shape"}
            for number, kind in enumerate(KINDS, 1)
        ]
        document = {
            "info": {},
            "licenses": [],
            "images": list(images.values()),
            "annotations": annotations,
        }
        (folder / "instances.json").write_text(json.dumps(document | {"categories": categories}))


def _train_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def _coco_image(image_id: int, name: str) -> dict:
    address = f"http://images.cocodataset.org/{name.split('_')[1]}/{name}"
    return {
        "id": image_id,
        "file_name": name,
        "width": WIDTH,
        "height": HEIGHT,
        "license": 1,
        "coco_url": address,
    }


def _instance(ann_id: int, image_id: int, shape: Shape) -> dict:
    x1, y1, x2, y2 = shape.xyxy
    polygon = [value for corner in shape.corners for value in corner]
    return {
        "id": ann_id,
        "image_id": image_id,
        "category_id": KINDS.index(shape.kind) + 1,
        "iscrowd": 0,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": float(shape.mask_H_W.sum()),
        "segmentation": [polygon],
    }


def _reference(
    ref_id: int,
    ann_id: int,
    image_id: int,
    split: str,
    shapes: list[Shape],
    place: int,
    dataset: str,
) -> dict:
    """As refer writes one: its file_name carries the annotation's number and is no image's name."""
    sentences = []
    for offset, text in enumerate(_expressions(shapes, place, dataset)):
        words = text.split()
        sentences.append(
            {
                "sent_id": 10 * ref_id + offset,
                "sent": text,
                "raw": text.capitalize(),
                "tokens": words,
            }
        )
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "category_id": KINDS.index(shapes[place].kind) + 1,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "sent_ids": [each["sent_id"] for each in sentences],
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
    }


def _expressions(shapes: list[Shape], place: int, dataset: str) -> list[str]:
    """Two sentences: RefCOCO+ forbids words of place, RefCOCOg has whole phrases."""
    shape, last = shapes[place], len(shapes) - 1
    if dataset == "refcoco+":
        return [shape.name, f"the {shape.name}"]
    if dataset == "refcocog":
        neighbour = shapes[place - 1 if place else 1]
        return [
            f"a {shape.name} that stands next to a {neighbour.name}",
            f"the {shape.colour} coloured {shape.kind}",
        ]
    where = {0: "far left", last: "far right"}.get(place, "in the middle")
    return [f"{shape.name} {where}", shape.name]


# --- COCO-Amodal and TAO-Amodal ---


def _write_coco_amodal(root: Path, seed: int) -> None:
    folder = root / "coco_amodal" / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    image_ids = {"train": _AMODAL_TRAIN_IDS, "val": (201, 202), "test": (211, 212)}
    for split, numbers in image_ids.items():
        images, annotations = [], []
        for image_id in numbers:
            shapes = scene(f"{seed}:{image_id}", overlapping=True)
            source = (
                "train2014" if split == "train" else "val2014"
            )  # val and test share COCO's val2014
            name = f"COCO_{source}_{image_id:012d}.jpg"
            _draw(shapes, root / "images" / source / name)
            images.append(_coco_image(image_id, name))
            regions = [_region(shapes, place) for place in range(len(shapes))]
            ground = {
                "name": "ground",
                "isStuff": 1,
                "occlude_rate": 0.3,
                "order": len(regions) + 1,
            }
            ground["segmentation"] = [
                0,
                HEIGHT * 2 // 3,
                WIDTH,
                HEIGHT * 2 // 3,
                WIDTH,
                HEIGHT,
                0,
                HEIGHT,
            ]
            annotations.append(
                {
                    "id": image_id + 1000,
                    "image_id": image_id,
                    "author": "rehearsal",
                    "regions": [*regions, ground],
                }
            )
        document = {"info": {}, "licenses": [], "images": images, "annotations": annotations}
        (folder / f"COCO_amodal_{split}2014.json").write_text(json.dumps(document))


def _region(shapes: list[Shape], place: int) -> dict:
    """A region with its whole polygon; it has the two masks only where something hides part."""
    shape, visible_H_W = shapes[place], _visible(shapes, place)
    whole_H_W = shape.mask_H_W
    rate = 1 - float(visible_H_W.sum() / whole_H_W.sum())
    region = {
        "name": shape.name,
        "isStuff": 0,
        "occlude_rate": rate,
        "order": len(shapes) - place,
        "area": float(whole_H_W.sum()),
        "segmentation": [value for corner in shape.corners for value in corner],
    }
    if rate > 0:
        region |= {
            "visible_mask": _rle(visible_H_W),
            "invisible_mask": _rle(whole_H_W & ~visible_H_W),
        }
    return region


def _visible(shapes: list[Shape], place: int) -> np.ndarray:
    visible_H_W = shapes[place].mask_H_W
    for later in shapes[place + 1 :]:
        visible_H_W = visible_H_W & ~later.mask_H_W
    return visible_H_W


def _rle(mask_H_W: np.ndarray) -> dict:
    code = coco_mask.encode(np.asfortranarray(mask_H_W, dtype=np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode("ascii")}


def _write_tao_amodal(root: Path, seed: int) -> None:
    """Frames of two videos: of each, a shape leaves the image, and one is uncertain."""
    images, annotations, videos = [], [], []
    for video in (1, 2):
        name = f"train/YFCC100M/v_rehearsal{video}"
        videos.append(
            {"id": video, "name": name, "width": WIDTH, "height": HEIGHT, "neg_category_ids": []}
        )
        for frame in (1, 31):
            image_id = 100 * video + frame
            file_name = f"{name}/frame{frame:04d}.jpg"
            shapes = scene(f"{seed}:tao:{image_id}", overlapping=True)
            outside = tuple((x - 80, y) for x, y in shapes[0].corners)
            shapes = [Shape(shapes[0].kind, shapes[0].colour, outside), *shapes[1:]]
            _draw(shapes, root / "images" / "tao" / file_name)
            images.append(
                {
                    "id": image_id,
                    "file_name": file_name,
                    "width": WIDTH,
                    "height": HEIGHT,
                    "video": name,
                }
                | {"video_id": video, "frame_index": frame - 1}
            )
            for place in range(len(shapes)):
                annotations.append(
                    _tao_annotation(len(annotations) + 1, image_id, video, shapes, place)
                )
    categories = [
        {"id": number, "name": f"toy_{kind}", "synset": kind}
        for number, kind in enumerate(KINDS, 1)
    ]
    document = {
        "images": images,
        "annotations": annotations,
        "videos": videos,
        "tracks": [],
        "categories": categories,
    }
    path = root / "tao_amodal" / "train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def _tao_annotation(
    ann_id: int, image_id: int, video: int, shapes: list[Shape], place: int
) -> dict:
    """bbox: of what is visible; amodal_bbox: of the whole shape, also outside the image."""
    shape, visible_H_W = shapes[place], _visible(shapes, place)
    x1, y1, x2, y2 = shape.xyxy
    canvas = Image.new("1", (3 * WIDTH, 3 * HEIGHT))
    ImageDraw.Draw(canvas).polygon([(x + WIDTH, y + HEIGHT) for x, y in shape.corners], fill=1)
    rows, columns = (
        np.any(visible_H_W, axis=1).nonzero()[0],
        np.any(visible_H_W, axis=0).nonzero()[0],
    )
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": ann_id,
        "image_id": image_id,
        "video_id": video,
        "track_id": 10 * video + place,
        "iscrowd": 0,
        "category_id": KINDS.index(shape.kind) + 1,
        "amodal_bbox": [x1, y1, x2 - x1, y2 - y1],
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": float(visible_H_W.sum()),
        "visibility": float(visible_H_W.sum() / np.asarray(canvas).sum()),
        "amodal_is_uncertain": place == 1,
        "segmentation": [],
    }
