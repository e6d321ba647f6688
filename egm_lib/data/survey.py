"""What a data root holds: the numbers of Table 3, and images that are missing or not as stated."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from egm_lib.data.images import resolve_image

ORIENTATION_TAG, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF orientations that swap width and height
# Table 3, as far as the texts available to us give it
PAPER_STATS = {
    "vanilla": {"samples": 575_208, "images": 24_407},
    "amodal": {"samples": 23_698, "images": 15_798},
    "amodal evaluation": {"samples": 11_261, "images": 2_474},
}


def describe(samples: Dataset) -> dict[str, float]:
    """The row of Table 3 for some samples.

    Samples, images, distinct boxes per image file, and mean width and height in px.
    """
    columns = ["image_id", "image", "gt_box", "width", "height"]
    table = samples.with_format("arrow").select_columns(columns)[:]
    boxes = pc.list_flatten(table["gt_box"]).combine_chunks()
    corners = {name: boxes[start::4] for start, name in enumerate(("x1", "y1", "x2", "y2"))}
    keyed = pa.table({"image": table["image"].dictionary_encode(), **corners})
    images = table.group_by("image").aggregate([("width", "min"), ("height", "min")])
    distinct = keyed.group_by(["image", *corners]).aggregate([])
    count = max(len(images), 1)
    return {
        "samples": len(table),
        "images": len(table["image_id"].unique()),
        "boxes_per_image": len(distinct) / count,
        "width_px": pc.mean(images["width_min"]).as_py() or 0.0,
        "height_px": pc.mean(images["height_min"]).as_py() or 0.0,
    }


def table3(described: Mapping[str, Mapping[str, float]]) -> str:
    """Table 3 in Markdown: our rows, then the paper's; "lost" marks what no text gives us."""
    names = ("samples", "images", "boxes_per_image", "width_px", "height_px")
    lines = [
        "| set | samples | images | boxes per image | width, px | height, px |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in described.items():
        lines.append(
            f"| {name} | {row['samples']:,} | {row['images']:,} | "
            + " | ".join(f"{row[key]:.1f}" for key in names[2:])
            + " |"
        )
    for name, row in PAPER_STATS.items():
        cells = " | ".join(f"{row[key]:,}" if key in row else "lost" for key in names)
        lines.append(f"| *paper, {name}* | {cells} |")
    return "\n".join(lines)


def image_faults(samples: Dataset, root: str | Path) -> Iterator[str]:
    """A sentence for every image that is missing, unreadable, or not of the stated size."""
    columns = ["image", "width", "height", "sample_id"]
    table = samples.with_format("arrow").select_columns(columns)[:]
    images = table.group_by(["image", "width", "height"]).aggregate([("sample_id", "min")])
    repeated = {image for image, times in Counter(images["image"].to_pylist()).items() if times > 1}
    for row in tqdm(images.to_pylist(), desc="check images", mininterval=10):
        where = f"{row['image']} (e.g. sample {row['sample_id_min']})"
        if row["image"] in repeated:
            stated = f"{row['width']} x {row['height']}"
            yield f"{where}: the samples state different sizes, one of them {stated}"
        try:
            size = image_size(
                resolve_image({"image": row["image"], "sample_id": row["sample_id_min"]}, root)
            )
        except FileNotFoundError:
            yield f"{where}: no such file below {root}"
        except (
            UnidentifiedImageError,
            Image.DecompressionBombError,
            OSError,
            SyntaxError,
            ValueError,
        ) as error:
            yield f"{where}: not a readable image ({error})"
        else:
            if size != (row["width"], row["height"]):
                stated = f"{row['width']} x {row['height']}"
                yield f"{where}: is {size[0]} x {size[1]} px, stated are {stated}"


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of its file if the format allows it."""
    with Image.open(path) as image:
        width, height = image.size
        return (
            (height, width) if image.getexif().get(ORIENTATION_TAG) in TURNED else (width, height)
        )
