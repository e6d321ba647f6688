"""From the published files to a data root that every stage reads: choices of Sec. 4.1."""

import dataclasses
import json
import logging
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from tqdm import tqdm

from egm_lib.data.amodal import fit_to_image, load_coco_amodal, load_tao_amodal
from egm_lib.data.flips import flip_all
from egm_lib.data.images import mirrored_name, resolve_image, write_mirrored
from egm_lib.data.leakage import PAPER_TRAIN_IMAGES, count_images, remove_leakage
from egm_lib.data.records import (
    AMODAL_SPLITS,
    EVAL_SPLITS,
    Task,
    rows_to_dataset,
    write_samples,
)
from egm_lib.data.refcoco import load_refcoco
from egm_lib.errors import InputError
from egm_lib.files import atomic_open, read_json

log = logging.getLogger(__name__)

TRAIN_DATASETS = ("refcoco", "refcoco+", "refcocog")
COCO_IMAGES = "images/train2014"
TAO_IMAGES = "images/tao"
# Where the hub's client puts it, and where a person may
TAO_TRAIN = ("tao_amodal/amodal_annotations/train.json", "tao_amodal/train.json")
PAPER_TRAIN_SAMPLES = {"vanilla": 575_208, "amodal": 23_698}  # Sec. 4.1 and Table 3
PAPER_AMODAL_TRAIN_IMAGES = 15_798
# Ours: the paper does not say how much must be hidden for a region to be an amodal sample
MIN_OCCLUSION = 0.05


def prepare(
    root: str | Path,
    *,
    tasks: Sequence[Task] = ("vanilla", "amodal"),
    flips: bool = True,
    keep_leaks: bool = False,
) -> dict:
    """Writes the train, selection and evaluation files of the tasks; returns the counts by task.

    root: where `fetch` put the published files, and where the new ones go.
    flips: whether to add mirrored twins of vanilla samples, with their images.
    keep_leaks: whether to keep training images that occur in an evaluation split.
    A task that is already prepared is left as it is: delete its `report_path` to prepare it again.
    Raises FileNotFoundError if files are missing, ValueError if a task was prepared with other
    choices, and the errors of the readers.
    """
    root, reports = Path(root), {}
    for task in tasks:
        path = report_path(root, task)
        if not path.exists():
            report = (
                _vanilla(root, flips, keep_leaks)
                if task == "vanilla"
                else _amodal(root, keep_leaks)
            )
            with atomic_open(path) as file:
                json.dump(report, file, indent=1)
        reports[task] = report = read_json(path, "delete it to prepare the task again", shape=dict)
        chosen = {"flipped": flips, "leaks_kept": keep_leaks}
        if other := [
            f"{name} = {report[name]}"
            for name in chosen
            if report.get(name, chosen[name]) != chosen[name]
        ]:
            raise InputError(
                f"{root}: {task} was prepared with {', '.join(other)}; delete {path} to prepare it "
                "again"
            )
    return reports


def report_path(root: Path, task: Task) -> Path:
    """Where `prepare` writes the counts of a task, last of all: this file marks it as prepared."""
    return root / f"prepare-{task}.json"


def _vanilla(root: Path, flips: bool, keep_leaks: bool) -> dict:
    left_out, doubts = Counter(), Counter()

    def load(dataset: str, split: str) -> Dataset:
        return load_refcoco(
            root, dataset=dataset, split=split, image_root=COCO_IMAGES, counts=left_out
        )

    evaluation = {split: load(*split) for split in EVAL_SPLITS}
    train = [load(dataset, "train") for dataset in TRAIN_DATASETS]
    kept, leaks = remove_leakage(train, list(evaluation.values()))
    kept = train if keep_leaks else kept
    parts = [
        part
        for samples in kept
        for part in ([samples, flip_all(samples, doubts)] if flips else [samples])
    ]
    if flips:
        mirror_images(parts, root)
    _write(root, "vanilla", evaluation, concatenate_datasets(parts))
    return dict(
        task="vanilla",
        samples=sum(map(len, parts)),
        paper_samples=PAPER_TRAIN_SAMPLES["vanilla"],
        images=count_images(kept),
        paper_images=PAPER_TRAIN_IMAGES,
        leakage=[dataclasses.asdict(leak) for leak in leaks],
        leaks_kept=keep_leaks,
        flipped=flips,
        not_flipped=dict(doubts),
        left_out=dict(+left_out),
    )


def _amodal(root: Path, keep_leaks: bool) -> dict:
    left_out, cuts = Counter(), Counter()

    def load_coco(split: str) -> Dataset:
        samples = load_coco_amodal(
            root / "coco_amodal" / "annotations" / f"COCO_amodal_{split}2014.json",
            split=split,
            image_root="images",
            min_occlusion=MIN_OCCLUSION,
            stuff=False,
            counts=left_out,
        )
        return fit_to_image(
            rows_to_dataset(map(_in_coco_folder, samples), f"COCO-Amodal {split}"), cuts
        )

    def visible(samples: Dataset) -> Dataset:
        seen = [number for number, box in enumerate(samples["modal_box"]) if box is not None]
        left_out["nothing visible"] += len(samples) - len(seen)
        return samples.select(seen)

    evaluation = {(dataset, split): visible(load_coco(split)) for dataset, split in AMODAL_SPLITS}
    train = [visible(load_coco("train"))]
    tao_path = next((root / name for name in TAO_TRAIN if (root / name).is_file()), None)
    if tao_path is None:
        log.warning(
            "%s is missing: the amodal training data are COCO-Amodal alone. To add TAO-Amodal, "
            "fetch tao_amodal_train, delete %s and prepare again.",
            root / TAO_TRAIN[0],
            report_path(root, "amodal"),
        )
    else:
        tao = load_tao_amodal(
            tao_path,
            split="train",
            image_root=TAO_IMAGES,
            min_occlusion=MIN_OCCLUSION,
            uncertain=False,
            counts=left_out,
        )
        train.append(visible(fit_to_image(tao, cuts)))
    kept, leaks = remove_leakage(train, list(evaluation.values()))
    kept = train if keep_leaks else kept
    _write(root, "amodal", evaluation, concatenate_datasets(kept))
    return dict(
        task="amodal",
        samples=sum(map(len, kept)),
        paper_samples=PAPER_TRAIN_SAMPLES["amodal"],
        images=count_images(kept),
        paper_images=PAPER_AMODAL_TRAIN_IMAGES,
        leakage=[dataclasses.asdict(leak) for leak in leaks],
        leaks_kept=keep_leaks,
        boxes_outside=dict(cuts),
        left_out=dict(+left_out),
        min_occlusion=MIN_OCCLUSION,
        tao_amodal=tao_path is not None,
    )


def _in_coco_folder(sample: dict) -> dict:
    """images/COCO_val2014_... -> images/val2014/COCO_val2014_..., its place in COCO's archives."""
    image = Path(sample["image"])
    folder = image.name.split("_")[1] if image.name.startswith("COCO_") else ""
    return sample | {"image": str(image.parent / folder / image.name)}


def mirror_images(parts: Sequence[Dataset], root: Path) -> None:
    """Writes the mirrored image of every flipped sample, unless it is there already."""
    names = sorted(
        {
            name
            for part in parts
            for name, flipped in zip(part["image"], part["flipped"], strict=True)
            if flipped
        }
    )
    for name in tqdm(names, desc="mirror images", mininterval=10):
        target = resolve_image({"image": name}, root)
        if not target.exists():
            write_mirrored(resolve_image({"image": mirrored_name(name)}, root), target)


def _write(
    root: Path, task: Task, evaluation: dict[tuple[str, str], Dataset], train: Dataset
) -> None:
    for (dataset, split), samples in evaluation.items():
        write_samples(root / "eval" / f"{dataset}_{split}.jsonl", samples)
    suffix = "_amodal" if task == "amodal" else ""
    path = root / f"train{suffix}.jsonl"
    write_samples(path, train)
    # Sec. 4.2 draws from the samples of Sec. 4.1
    with (
        open(path, "rb") as samples,
        atomic_open(root / f"selection{suffix}.jsonl", "wb") as selection,
    ):
        shutil.copyfileobj(samples, selection)
