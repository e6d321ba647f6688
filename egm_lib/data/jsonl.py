"""Referring expressions in the forms of other evaluators: jsonl, and the authors' VeRL parquet."""

import codecs
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq
from datasets import Dataset

from egm_lib.boxes import BoxFrame, convert
from egm_lib.data.records import (
    SampleError,
    Task,
    join_image,
    json_lines,
    read_json,
    report_left_out,
    rows_to_dataset,
    table_to_dataset,
    typed_table,
)

# The fields that we read of a line; others are ignored. `normal_caption` and `solution` are what
# test sets like RefCOCOs call `sent` and `bbox`.
_BOX = pa.list_(pa.float64())
_SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "width": pa.int64(),
        "height": pa.int64(),
        "sent": pa.string(),
        "normal_caption": pa.string(),
        "bbox": _BOX,
        "solution": _BOX,
        "categories": pa.struct({"empty_case": pa.bool_()}),
    }
)
_QUESTIONS = (
    re.compile(r"<ref>(?P<expression>.*?)</ref>", re.DOTALL),
    re.compile(r"Locate (?P<expression>.*?)(?: amodally)?, output its bbox", re.DOTALL),
)


def load_jsonl(
    path: str | Path,
    *,
    dataset: str,
    split: str,
    task: Task = "vanilla",
    image_root: str | Path | None = None,
    counts: Counter | None = None,
) -> Dataset:
    """Samples of a jsonl file (or a JSON list) with fields image, sent, bbox (xyxy px), width,
    height.

    image_root: put before every image's name.
    counts: receives the number of rows that are left out and why: no object fits ("empty_case"),
    the box has no area, or the expression is blank.
    image_id is the COCO number in the image's name, else the name.
    Raises FileNotFoundError, or SampleError with file, row and reason.
    """
    path = Path(path)
    table = _read_rows(path)
    left_out, row_numbers_N = Counter(), 1 + np.arange(len(table))
    for reason, unusable in _UNUSABLE.items():
        odd_N = unusable(table)
        left_out[reason] = int(odd_N.sum())
        row_numbers_N, table = row_numbers_N[~odd_N], table.filter(pa.array(~odd_N))
    report_left_out(str(path), +left_out, counts)
    prefix = "" if image_root is None else f"{Path(image_root)}/"
    numbers = pc.utf8_lpad(pc.cast(pa.array(row_numbers_N), pa.string()), 6, "0")
    absolute = pc.starts_with(table["image"], "/")
    image = pc.if_else(
        absolute, table["image"], pc.binary_join_element_wise(prefix, table["image"], "")
    )
    columns = {
        "sample_id": pc.binary_join_element_wise(f"{dataset}-{split}", numbers, "-"),
        "dataset": pa.repeat(dataset, len(table)),
        "split": pa.repeat(split, len(table)),
        "task": pa.repeat(task, len(table)),
        "image": image,
        "width": table["width"],
        "height": table["height"],
        "expression": _expressions(table),
        "gt_box": _boxes(table),
        "image_id": image_ids(table["image"]),
        "flipped": pc.fill_null(pc.match_substring_regex(table["image"], _MIRRORED_FOLDER), False),
    }
    return table_to_dataset(pa.table(columns), str(path), row_numbers_N)


def _expressions(table: pa.Table) -> pa.ChunkedArray:
    return pc.utf8_trim_whitespace(pc.coalesce(table["sent"], table["normal_caption"]))


def _boxes(table: pa.Table) -> pa.ChunkedArray:
    return table["bbox"] if table["solution"].null_count == len(table) else table["solution"]


def _no_object_fits(table: pa.Table) -> np.ndarray:
    return _mask(pc.struct_field(table["categories"], "empty_case"))


def _is_blank(table: pa.Table) -> np.ndarray:
    return _mask(pc.equal(_expressions(table), ""))


def _has_no_area(table: pa.Table) -> np.ndarray:
    """Whether a box has a side of length 0. Swapped corners, such as boxes as x, y, width and
    height have, are another matter: the file is refused for them.
    """
    boxes = _boxes(table)
    no_area_N = _mask(pc.equal(pc.list_value_length(boxes), 4))
    x1, y1, x2, y2 = pc.list_flatten(boxes.filter(pa.array(no_area_N))).to_numpy().reshape(-1, 4).T
    no_area_N[no_area_N] = (x1 == x2) | (y1 == y2)
    return no_area_N


def _mask(column: pa.ChunkedArray) -> np.ndarray:
    """Truth values as a writable array; null is false."""
    return np.array(pc.fill_null(column, False), dtype=bool)


# What is left out, as the reader of RefCOCO's own files does
_UNUSABLE = {
    "no object fits": _no_object_fits,
    "no area": _has_no_area,
    "blank sentence": _is_blank,
}


def image_ids(images: pa.ChunkedArray) -> pa.ChunkedArray:
    """The COCO number in an image's file name, without leading zeros; else the path.

    The number has 12 digits and stands before the suffix.
    """
    found = pc.struct_field(
        pc.extract_regex(images, r"(?:^|[/_])(?P<number>\d{12})\.\w+$"), "number"
    )
    number = pc.utf8_ltrim(found, "0")
    return pc.coalesce(pc.if_else(pc.equal(number, ""), "0", number), images)


_MIRRORED_FOLDER = r"(^|/)\w*_flip/"  # the authors' coco_flip/, our train2014_flip/


def _read_rows(path: Path) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; `python -m egm_lib.data fetch` gets it or says how to"
        )
    first = _first_byte(path)
    if not first:
        return _SCHEMA.empty_table()
    if first == b"[":
        rows = read_json(path, shape=list)
    else:
        try:
            options = pa.json.ParseOptions(
                explicit_schema=_SCHEMA, unexpected_field_behavior="ignore"
            )
            table = pa.json.read_json(path, parse_options=options)
            table.validate(full=True)  # strings are UTF-8
            return table
        except pa.ArrowInvalid:
            rows = json_lines(path)  # slower, and able to say which row is wrong
    tables = [_SCHEMA.empty_table()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise SampleError(f"{path}, row {number}: not an object but {type(row).__name__}")
        tables.append(typed_table([row], _SCHEMA, str(path), number))
    return pa.concat_tables(tables).combine_chunks()


def _first_byte(path: Path) -> bytes:
    """The first byte that is neither white space nor a byte order mark; b"" if there is none."""
    with open(path, "rb") as file:
        for line in file:
            if text := line.removeprefix(codecs.BOM_UTF8).strip():
                return text[:1]
    return b""


def load_rl_parquet(
    path: str | Path, *, dataset: str, split: str, image_root: str | Path | None = None
) -> Dataset:
    """The authors' RL set, with boxes in pixels (processed_rl_data/*.parquet of EGM_Datasets).

    VeRL's columns: images [path], prompt [{role, content}], reward_model {ground_truth: xyxy in
    0..1000}, extra_info {width, height}. The paths are absolute on the authors' machine: the part
    from coco/ or coco_flip/ on is kept and put below image_root.
    Raises FileNotFoundError, or SampleError with file, row and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; `python -m egm_lib.data fetch` gets it or says how to"
        )
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise SampleError(
            f"{path} is not parquet ({error}); delete it and fetch it again"
        ) from error
    return rows_to_dataset(_rl_rows(parquet, path, dataset, split, image_root), str(path))


def _rl_rows(
    parquet: pq.ParquetFile, path: Path, dataset: str, split: str, image_root: str | Path | None
) -> Iterator[dict]:
    number = 0
    for batch in parquet.iter_batches(
        batch_size=4096, columns=["images", "prompt", "reward_model", "extra_info"]
    ):
        for row in batch.to_pylist():
            number += 1
            try:
                sample = _rl_sample(row, image_root)
            except (KeyError, TypeError, IndexError, ValueError) as error:
                raise SampleError(
                    f"{path}, row {number}: not a row of the authors' RL set ({error!r})"
                ) from error
            yield sample | dict(
                sample_id=f"{dataset}-{split}-{number:06d}", dataset=dataset, split=split
            )


def _rl_sample(row: dict, image_root: str | Path | None) -> dict:
    question = row["prompt"][0]["content"]
    found = next((match for pattern in _QUESTIONS if (match := pattern.search(question))), None)
    if found is None:
        raise ValueError(f"no referring expression in {question!r}")
    image = row["images"][0]
    image = image if isinstance(image, str) else image["path"]
    image = re.sub(r"^.*?(?=(?:^|/)coco(?:_flip)?/)/?", "", image)
    width, height = row["extra_info"]["width"], row["extra_info"]["height"]
    box = convert(
        row["reward_model"]["ground_truth"], BoxFrame.NORM_1000, BoxFrame.PIXEL, (width, height)
    )
    return dict(
        task="amodal" if "amodal" in question.replace(found["expression"], "") else "vanilla",
        image=join_image(image_root, image),
        width=width,
        height=height,
        expression=found["expression"].strip(),
        gt_box=list(box),
        image_id=image_ids(pa.chunked_array([[image]]))[0].as_py(),
        flipped=re.search(_MIRRORED_FOLDER, image) is not None,
    )
