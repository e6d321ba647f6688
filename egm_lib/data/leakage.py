"""Images both trained on and tested on.

RefCOCO, RefCOCO+ and RefCOCOg split the same images differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

PAPER_TRAIN_IMAGES = 24_407  # Sec. 4.1 and Table 3, vanilla


@dataclass(frozen=True)
class Leakage:
    """What a training set shares with the evaluation splits."""

    dataset: str
    samples: int  # before
    images: int
    leaked_samples: int
    leaked_images: int


def remove_leakage(
    train: Sequence[Dataset], evaluation: Sequence[Dataset]
) -> tuple[list[Dataset], list[Leakage]]:
    """The training sets without images of any evaluation split, and what was removed from each.

    Images are compared by image_id (COCO's number), so mirrored twins go with their originals.
    """
    tested = pa.chunked_array(
        [chunk for samples in evaluation for chunk in _column(samples, "image_id").chunks],
        type=pa.string(),
    ).unique()
    kept, found = [], []
    for samples in train:
        image_ids = _column(samples, "image_id")
        leaked = pc.is_in(image_ids, tested)
        kept.append(samples.select(np.flatnonzero(~leaked.to_numpy())))
        found.append(
            Leakage(
                dataset=samples[0]["dataset"] if len(samples) else "(empty)",
                samples=len(samples),
                images=len(image_ids.unique()),
                leaked_samples=pc.sum(leaked).as_py() or 0,
                leaked_images=len(image_ids.filter(leaked).unique()),
            )
        )
    return kept, found


def count_images(datasets: Sequence[Dataset]) -> int:
    """Number of different images in some sets together."""
    return len(
        set().union(*(_column(samples, "image_id").unique().to_pylist() for samples in datasets))
    )


def _column(samples: Dataset, name: str) -> pa.ChunkedArray:
    return samples.with_format("arrow").select_columns([name])[:][name]
