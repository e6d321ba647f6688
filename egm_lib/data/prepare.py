"""From the published files to a data root that every stage reads: the choices of Sec. 4.1, made
once and counted.
"""

import dataclasses
import json
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
from egm_lib.files import atomic_open

TRAIN_DATASETS = ("refcoco", "refcoco+", "refcocog")
COCO_IMAGES = "images/train2014"
TAO_IMAGES = "images/tao"
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
    """Write train, selection and evaluation files of the tasks from what `fetch` left in root;
    returns the counts.

    Already prepared tasks are left as they are (delete their `report_path` to do one again).
    flips: add mirrored twins of vanilla samples, and make their images. keep_leaks: do not remove
    images of the evaluation splits. Raises FileNotFoundError where files are missing, ValueError
    where a task was prepared with other choices, and the readers' errors.
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
        reports[task] = report = json.loads(path.read_text(encoding="utf-8"))
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
    """Where `prepare` leaves the counts of a task, last of all: while it is there, the task is
    prepared.
    """
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
    tao = load_tao_amodal(
        root / "tao_amodal" / "train.json",
        split="train",
        image_root=TAO_IMAGES,
        min_occlusion=MIN_OCCLUSION,
        uncertain=False,
        counts=left_out,
    )
    train = [visible(load_coco("train")), visible(fit_to_image(tao, cuts))]
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
    )


def _in_coco_folder(sample: dict) -> dict:
    """images/COCO_val2014_... -> images/val2014/COCO_val2014_..., where COCO's archives put it."""
    image = Path(sample["image"])
    folder = image.name.split("_")[1] if image.name.startswith("COCO_") else ""
    return sample | {"image": str(image.parent / folder / image.name)}


def mirror_images(parts: Sequence[Dataset], root: Path) -> None:
    """Make the mirrored twin of every image of a flipped sample that has none yet."""
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
