"""Tiny files in the annotation formats of RefCOCO, COCO-Amodal and TAO-Amodal."""

import json
import pickle

import numpy as np
from pycocotools import mask as coco_mask


def write_refcoco(
    root, dataset="refcoco", split_by="unc", refs=(), images=(), annotations=(), protocol=2
):
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"refs({split_by}).p", "wb") as file:
        pickle.dump(list(refs), file, protocol)
    document = {
        "images": list(images),
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "person"}],
    }
    (folder / "instances.json").write_text(json.dumps(document))


def ref(number, split="train", image_id=57, sents=("man on left",), **changes):
    sentences = [
        dict(sent_id=10 * number + i, sent=sent, raw=sent.upper(), tokens=sent.split())
        for i, sent in enumerate(sents)
    ]
    # The oddity: file_name carries the annotation's number, and is not the image's name.
    return (
        dict(
            ref_id=number,
            ann_id=number,
            category_id=1,
            image_id=image_id,
            split=split,
            sentences=sentences,
            file_name=f"COCO_train2014_{image_id:012d}_{number}.jpg",
            sent_ids=[s["sent_id"] for s in sentences],
        )
        | changes
    )


def coco_image(number=57):
    return dict(
        id=number, file_name=f"COCO_train2014_{number:012d}.jpg", width=640, height=480, license=1
    )


def annotation(number, image_id=57, bbox=(10, 20, 100.5, 200), **changes):
    return (
        dict(
            id=number,
            image_id=image_id,
            category_id=1,
            bbox=list(bbox),
            iscrowd=0,
            area=1.0,
            segmentation=[[1, 2, 3, 4, 5, 6]],
        )
        | changes
    )


def region(**changes):
    return (
        dict(
            segmentation=[10, 10, 60, 10, 60, 90, 10, 90],
            name="dog",
            area=4000,
            isStuff=0,
            occlude_rate=0.0,
            order=1,
            visible_mask=None,
            invisible_mask=None,
        )
        | changes
    )


def rle(x1, y1, x2, y2, width=100, height=120):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[y1:y2, x1:x2] = 1
    code = coco_mask.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def write_coco_amodal(path, *regions):
    path.write_text(
        json.dumps(
            {
                "images": [
                    dict(id=57, file_name="COCO_val2014_000000000057.jpg", width=100, height=120)
                ],
                "annotations": [
                    dict(
                        id=5,
                        image_id=57,
                        size=len(regions),
                        depth_constraint="1-2",
                        regions=list(regions),
                    )
                ],
            }
        )
    )
    return path


def write_tao(path, *annotations):
    path.write_text(
        json.dumps(
            {
                "images": [
                    dict(
                        id=3,
                        file_name="train/YFCC100M/v/frame0391.jpg",
                        width=640,
                        height=480,
                        video_id=1,
                    )
                ],
                "videos": [],
                "tracks": [],
                "categories": [dict(id=805, name="baby_buggy")],
                "annotations": list(annotations),
            }
        )
    )
    return path


def tao(number, amodal_bbox, bbox=(0, 10, 20, 30), **changes):
    return (
        dict(
            id=number,
            image_id=3,
            track_id=1,
            video_id=1,
            category_id=805,
            bbox=list(bbox),
            area=600,
            amodal_bbox=list(amodal_bbox),
            amodal_is_uncertain=False,
            visibility=0.5,
        )
        | changes
    )
