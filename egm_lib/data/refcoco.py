"""RefCOCO, RefCOCO+ and RefCOCOg as published: `refs(<split_by>).p` and COCO's `instances.json`."""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets import Dataset

from egm_lib.data.plain_pickle import load_plain_pickle
from egm_lib.data.records import (
    SampleError,
    join_image,
    read_json,
    report_left_out,
    rows_to_dataset,
    with_area,
    xywh_to_xyxy,
)
from egm_lib.errors import InputError

SPLITS = {
    ("refcoco", "unc"): ("train", "val", "testA", "testB"),
    ("refcoco", "google"): ("train", "val", "test"),
    ("refcoco+", "unc"): ("train", "val", "testA", "testB"),
    ("refcocog", "umd"): ("train", "val", "test"),
    # Its val shares images with its train: umd is the default
    ("refcocog", "google"): ("train", "val"),
}
DEFAULT_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}


def load_refcoco(
    root: str | Path,
    *,
    dataset: str,
    split: str,
    split_by: str | None = None,
    image_root: str | Path | None = None,
    counts: Counter | None = None,
) -> Dataset:
    """One sample per sentence of a split, in the file's order.

    root: folder with <dataset>/refs(<split_by>).p and <dataset>/instances.json.
    split_by: "unc", "umd" or "google".
    image_root: put before every image's name.
    counts: if given, receives how many sentences were left out and why: blank ones, and those of a
    box without area.
    Raises ValueError for an unknown dataset or split, FileNotFoundError, UnsafePickleError, and
    SampleError for a file that is not in this format.
    """
    split_by = split_by or DEFAULT_SPLIT_BY.get(dataset, "")
    splits = SPLITS.get((dataset, split_by))
    if splits is None or split not in splits:
        known = "; ".join(f"{name} ({by}): {', '.join(of)}" for (name, by), of in SPLITS.items())
        raise InputError(f"no split {split!r} of {dataset!r} by {split_by!r}; there are {known}")
    folder = Path(root) / dataset
    refs_path, left_out = folder / f"refs({split_by}).p", Counter()
    refs = _cached(load_plain_pickle, refs_path)
    if not isinstance(refs, list):
        raise SampleError(
            f"{refs_path}: a list of references is expected, not {type(refs).__name__}"
        )
    images, annotations, kinds = _cached(_read_instances, folder / "instances.json")
    rows = _rows(
        refs, images, annotations, kinds, dataset, split, image_root, str(refs_path), left_out
    )
    samples = rows_to_dataset(rows, f"{refs_path} [{split}]")
    report_left_out(f"{refs_path} [{split}]", left_out, counts)
    return samples


def _rows(
    refs: list,
    images: dict,
    annotations: dict,
    kinds: Counter,
    dataset: str,
    split: str,
    image_root: str | Path | None,
    source: str,
    counts: Counter,
) -> Iterator[dict[str, Any]]:
    for number, ref in enumerate(refs, 1):
        try:
            if ref["split"] != split:
                continue
            # The file_name of a ref ends in the number of its annotation (..._16.jpg), so the
            # image's name is taken from instances.json.
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            if annotation["image_id"] != ref["image_id"]:
                raise SampleError(
                    f"{source}, row {number}: annotation {ref['ann_id']} is of image "
                    f"{annotation['image_id']}, not of {ref['image_id']}"
                )
            gt_box = with_area(xywh_to_xyxy(annotation["bbox"]))
            if gt_box is None:
                counts["no area"] += len(ref["sentences"])
                continue
            common = dict(
                dataset=dataset,
                split=split,
                task="vanilla",
                image=join_image(image_root, image["file_name"]),
                width=image["width"],
                height=image["height"],
                gt_box=gt_box,
                image_id=str(image["id"]),
                ann_id=str(annotation["id"]),
                ref_id=str(ref["ref_id"]),
                flipped=False,
                num_lookalikes=kinds[image["id"], annotation["category_id"]] - 1,
            )
            for sentence in ref["sentences"]:
                if not sentence["sent"].strip():
                    counts["blank sentence"] += 1
                    continue
                sample_id = f"{dataset}-{split}-{ref['ref_id']}-{sentence['sent_id']}"
                yield common | dict(sample_id=sample_id, expression=sentence["sent"].strip())
        except KeyError as error:
            raise SampleError(
                f"{source}, row {number}: {error.args[0]!r} is neither a field of the reference "
                "nor an "
                "id in instances.json"
            ) from error
        except SampleError:
            raise
        except (TypeError, AttributeError, ValueError) as error:
            raise SampleError(
                f"{source}, row {number}: not a reference in the format of refer ({error})"
            ) from error


def _read_instances(path: Path) -> tuple[dict, dict, Counter]:
    """(images by id, annotations by id, number of objects by (image id, category id))."""
    document = read_json(path, object_hook=_without_segmentation)
    try:
        images = {image["id"]: image for image in document["images"]}
        annotations = {annotation["id"]: annotation for annotation in document["annotations"]}
        kinds = Counter((item["image_id"], item["category_id"]) for item in annotations.values())
    except (KeyError, TypeError) as error:
        raise SampleError(f"{path}: not COCO's instances ({error!r})") from error
    return images, annotations, kinds


def _without_segmentation(item: dict) -> dict:
    item.pop("segmentation", None)  # nine tenths of the file, and not needed
    return item


def _cached(read, path: Path):
    """read(path), remembered for the last two files: the splits of a data set share their files."""
    if not path.is_file():
        return read(path)  # raises
    return _read_version(read, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read_version(read, path: Path, _mtime_ns: int):
    return read(path)
