"""Samples and images of every data source, and the layout of a data root.

A data root is a folder with images and, in GroundingSample JSONL files, what is asked about them:

    train.jsonl  train_amodal.jsonl  selection.jsonl  selection_amodal.jsonl
    eval/<dataset>_<split>.jsonl

The miniature world writes one; `python -m egm_lib.data prepare` makes one from RefCOCO, COCO-Amodal
and TAO-Amodal.
"""

from pathlib import Path

from datasets import Dataset

from egm_lib.data.amodal import load_coco_amodal, load_tao_amodal
from egm_lib.data.flips import flip
from egm_lib.data.images import image_key, open_image, resolve_image
from egm_lib.data.jsonl import load_jsonl
from egm_lib.data.records import (
    AMODAL_SPLITS,
    EVAL_SPLITS,
    GroundingSample,
    SampleError,
    Task,
    read_samples,
    write_samples,
)
from egm_lib.data.refcoco import load_refcoco

__all__ = [
    "AMODAL_SPLITS",
    "EVAL_SPLITS",
    "GroundingSample",
    "SampleError",
    "eval_splits",
    "flip",
    "load_coco_amodal",
    "load_jsonl",
    "load_refcoco",
    "load_tao_amodal",
    "image_key",
    "open_image",
    "read_eval",
    "read_samples",
    "read_train",
    "read_validation",
    "resolve_image",
    "split_id",
    "write_samples",
]


def eval_splits(task: Task) -> tuple[tuple[str, str], ...]:
    """(dataset, split) of every evaluation split of a task."""
    return {"vanilla": EVAL_SPLITS, "amodal": AMODAL_SPLITS}[task]


def split_id(dataset: str, split: str) -> str:
    """File-safe name of a split, e.g. `refcoco+_testA`."""
    return f"{dataset}_{split}"


def read_eval(root: str | Path, dataset: str, split: str, limit: int | None = None) -> Dataset:
    """An evaluation split of a data root, or its first `limit` rows."""
    return _head(read_samples(Path(root) / "eval" / f"{split_id(dataset, split)}.jsonl"), limit)


def read_train(
    root: str | Path, task: Task, stage: str = "train", limit: int | None = None
) -> Dataset:
    """The samples of a task for a stage ("train": SFT, "selection": GRPO), or the first `limit`."""
    return _head(
        read_samples(Path(root) / f"{stage}{'_amodal' if task == 'amodal' else ''}.jsonl"), limit
    )


def read_validation(root: str | Path, limit: int | None = None) -> Dataset:
    """The vanilla samples of the data root's validation.jsonl, which no table tests on, or else
    RefCOCO's val; or the first `limit` of them.
    """
    path = Path(root) / "validation.jsonl"
    return (
        _head(read_samples(path), limit)
        if path.is_file()
        else read_eval(root, "refcoco", "val", limit)
    )


def _head(samples: Dataset, limit: int | None) -> Dataset:
    return samples if limit is None or limit >= len(samples) else samples.select(range(limit))
