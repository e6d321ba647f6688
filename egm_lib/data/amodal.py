"""COCO-Amodal and TAO-Amodal: objects with the box that they would have if nothing hid them.

The expressions are the annotators' object names. Notebook 03 replaces them by the referring
expressions of Sec. 4.1 (Fig. 9).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from pycocotools import mask as coco_mask

from egm_lib.boxes import iou
from egm_lib.data.records import (
    SampleError,
    join_image,
    read_json,
    report_left_out,
    rows_to_dataset,
    with_area,
    xywh_to_xyxy,
)


def load_coco_amodal(
    annotation_json: str | Path,
    *,
    split: str,
    image_root: str | Path | None = None,
    min_occlusion: float = 0.0,
    stuff: bool = True,
    counts: Counter | None = None,
) -> Dataset:
    """One sample per annotated region of COCO-Amodal (Zhu et al. 2017).

    gt_box is the amodal box, which may leave the image (`fit_to_image`). modal_box is that of the
    visible part, null if nothing is visible.
    min_occlusion: least `occlude_rate`, the hidden share of the region, 0..1.
    stuff: whether to keep sky, grass and the like.
    image_root: put before every image's name.
    counts: if given, receives how many regions were left out and why.
    Raises FileNotFoundError, or SampleError with file, region and reason.
    """
    source, left_out = str(annotation_json), Counter()
    rows = _coco_rows(read_json(source), source, split, image_root, min_occlusion, stuff, left_out)
    samples = rows_to_dataset(rows, source)
    report_left_out(source, left_out, counts)
    return samples


def load_tao_amodal(
    annotation_json: str | Path,
    *,
    split: str,
    image_root: str | Path | None = None,
    min_occlusion: float = 0.0,
    uncertain: bool = True,
    counts: Counter | None = None,
) -> Dataset:
    """One sample per annotated box of TAO-Amodal (Hsieh et al. 2023).

    gt_box is the amodal box, which often leaves the image; modal_box that of the visible part.
    min_occlusion: least 1 - `visibility`, 0..1.
    uncertain: whether to keep boxes that the annotators were not sure of.
    Otherwise as `load_coco_amodal`.
    """
    source, left_out = str(annotation_json), Counter()
    rows = _tao_rows(
        read_json(source), source, split, image_root, min_occlusion, uncertain, left_out
    )
    samples = rows_to_dataset(rows, source)
    report_left_out(source, left_out, counts)
    return samples


def _coco_rows(
    document: Any,
    source: str,
    split: str,
    image_root: str | Path | None,
    min_occlusion: float,
    stuff: bool,
    counts: Counter,
) -> Iterator[dict[str, Any]]:
    images, annotations = _index(document, source)
    for annotation in annotations:
        where = f"{source}, annotation {annotation.get('id')}"
        image = _image_of(annotation, images, where)
        image_wh = image["width"], image["height"]
        regions = annotation.get("regions") or ()
        names = Counter(
            region["name"]
            for region in regions
            if isinstance(region, dict) and isinstance(region.get("name"), str)
        )
        for number, region in enumerate(regions):
            at = f"{where}, region {number}"
            try:
                if region.get("isStuff") and not stuff:
                    counts["stuff"] += 1
                    continue
                if (region.get("occlude_rate") or 0) < min_occlusion:
                    counts["occluded too little"] += 1
                    continue
                gt_box = mask_box(region["segmentation"], image_wh, at)
                visible = region.get("visible_mask")
                modal_box = (
                    _inside(gt_box, image_wh)
                    if visible is None
                    else mask_box(visible, image_wh, at)
                )
                if gt_box is None or not region["name"].strip():
                    counts["no area" if gt_box is None else "no name"] += 1
                    continue
            except SampleError:
                raise
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise SampleError(f"{at}: not a region of COCO-Amodal ({error!r})") from error
            region_id = f"{annotation.get('id', annotation['image_id'])}_{number}"
            yield dict(
                sample_id=f"coco_amodal-{split}-{region_id}",
                dataset="coco_amodal",
                split=split,
                task="amodal",
                image=join_image(image_root, image["file_name"]),
                width=image_wh[0],
                height=image_wh[1],
                expression=region["name"].strip(),
                gt_box=gt_box,
                modal_box=modal_box,
                image_id=str(image["id"]),
                ann_id=region_id,
                flipped=False,
                num_lookalikes=names[region["name"]] - 1,
            )


def _tao_rows(
    document: Any,
    source: str,
    split: str,
    image_root: str | Path | None,
    min_occlusion: float,
    uncertain: bool,
    counts: Counter,
) -> Iterator[dict[str, Any]]:
    images, annotations = _index(document, source)
    try:
        names = {category["id"]: category["name"] for category in document.get("categories") or ()}
        kinds = Counter((item.get("image_id"), item.get("category_id")) for item in annotations)
    except (KeyError, TypeError) as error:
        raise SampleError(f"{source}: not the categories of TAO-Amodal ({error!r})") from error
    for annotation in annotations:
        at = f"{source}, annotation {annotation.get('id')}"
        image = _image_of(annotation, images, at)
        try:
            if annotation.get("amodal_is_uncertain") and not uncertain:
                counts["uncertain"] += 1
                continue
            visibility = annotation.get("visibility")
            visibility = 1 if visibility is None else visibility
            if 1 - visibility < min_occlusion:
                counts["occluded too little"] += 1
                continue
            gt_box = with_area(xywh_to_xyxy(annotation["amodal_bbox"]))
            if gt_box is None:
                counts["no area"] += 1
                continue
            hidden = visibility == 0 or not annotation.get("bbox")
            yield dict(
                sample_id=f"tao_amodal-{split}-{annotation['id']}",
                dataset="tao_amodal",
                split=split,
                task="amodal",
                image=join_image(image_root, image["file_name"]),
                width=image["width"],
                height=image["height"],
                expression=names[annotation["category_id"]].replace("_", " ").strip(),
                gt_box=gt_box,
                modal_box=None if hidden else with_area(xywh_to_xyxy(annotation["bbox"])),
                image_id=f"tao-{image['id']}",
                ann_id=str(annotation["id"]),
                flipped=False,
                num_lookalikes=kinds[annotation["image_id"], annotation["category_id"]] - 1,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SampleError(f"{at}: not an annotation of TAO-Amodal ({error!r})") from error


def _index(document: Any, source: str) -> tuple[dict, list]:
    try:
        images = {image["id"]: image for image in document["images"]}
        annotations = document["annotations"]
        if not all(isinstance(annotation, dict) for annotation in annotations):
            raise TypeError("an annotation is not an object")
    except (KeyError, TypeError) as error:
        raise SampleError(
            f"{source}: not an annotation file with images and annotations ({error!r})"
        ) from error
    return images, annotations


def _image_of(annotation: dict, images: dict, where: str) -> dict:
    image_id = annotation.get("image_id")
    image = images.get(image_id) if isinstance(image_id, int | str) else None
    if image is None or not {"file_name", "width", "height"} <= set(image):
        raise SampleError(
            f"{where}: image {image_id} is not among the file's images, or has "
            "no "
            "file_name, width and height"
        )
    return image


def mask_box(mask: Any, image_wh: tuple[int, int], where: str) -> list[float] | None:
    """xyxy px of a COCO mask: a polygon, a list of polygons, or RLE (compressed or not).

    None if it has no area. The box of a polygon is that of its corners: unlike a raster, it may
    leave the image.
    where: the place that a SampleError names, if the mask is anything else.
    """
    if isinstance(mask, dict):
        return _rle_box(mask, image_wh, where)
    polygons = mask if mask and isinstance(mask[0], list) else [mask]
    xs = [float(x) for polygon in polygons for x in polygon[0::2]]
    ys = [float(y) for polygon in polygons for y in polygon[1::2]]
    if len(xs) != len(ys):
        raise SampleError(f"{where}: a polygon with an odd number of coordinates")
    return with_area([min(xs), min(ys), max(xs), max(ys)]) if len(xs) > 2 else None


def _rle_box(rle: dict, image_wh: tuple[int, int], where: str) -> list[float] | None:
    width, height = image_wh
    if list(rle.get("size", ())) != [height, width]:
        raise SampleError(
            f"{where}: a mask of size {rle.get('size')} for an image of height {height}, width "
            f"{width}"
        )
    counts = rle.get("counts")
    if isinstance(counts, list):
        if (
            not all(isinstance(run, int) and run >= 0 for run in counts)
            or sum(counts) != width * height
        ):
            raise SampleError(f"{where}: the runs of a mask do not add up to the image")
        rle = coco_mask.frPyObjects(rle, height, width)
    else:
        code = counts.encode() if isinstance(counts, str) else b""
        # pycocotools reads past the end of a string whose last character announces another one
        if not code or not all(48 <= byte < 112 for byte in code) or (code[-1] - 48) & 32:
            raise SampleError(f"{where}: counts of a mask are not a COCO run-length code")
        rle = {"size": [height, width], "counts": code}
    return with_area(xywh_to_xyxy(coco_mask.toBbox(rle)))


def _inside(box: Sequence[float] | None, image_wh: tuple[int, int]) -> list[float] | None:
    """The part of a box that lies in the image; None if there is none."""
    if box is None:
        return None
    (x1, y1, x2, y2), (width, height) = box, image_wh
    return with_area([max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))])


def fit_to_image(samples: Dataset, counts: Counter | None = None) -> Dataset:
    """The samples with every box cut to its image; samples wholly outside are dropped.

    An answer in 0..1000 cannot state a box that leaves the image. Data roots are written through
    this function, so that target, reward and metric see the same box.
    counts: if given, receives "cut at the border", "of these, IoU with the whole box < 0.5" and
    "wholly outside".
    """
    counts = Counter() if counts is None else counts
    return rows_to_dataset(_fitted(samples, counts), "samples cut to the image")


def _fitted(samples: Dataset, counts: Counter) -> Iterator[dict]:
    for sample in samples:
        image_wh = sample["width"], sample["height"]
        gt_box = _inside(sample["gt_box"], image_wh)
        if gt_box is None:
            counts["wholly outside"] += 1
            continue
        if gt_box != sample["gt_box"]:
            counts["cut at the border"] += 1
            counts["of these, IoU with the whole box < 0.5"] += iou(gt_box, sample["gt_box"]) < 0.5
        yield sample | dict(gt_box=gt_box, modal_box=_inside(sample["modal_box"], image_wh))
