"""The one record that every data source is turned into, and its JSON-lines files."""

import logging
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher, generate_random_fingerprint

from egm_lib import files
from egm_lib.errors import EgmError, InputError
from egm_lib.prompts import Task

log = logging.getLogger(__name__)


class GroundingSample(TypedDict):
    """One referring expression and the box it means: a row of a Dataset, a line of a *.jsonl file.

    Boxes are [x1, y1, x2, y2] in pixels of the upright image (EXIF orientation applied), with the
    origin at the top left.
    """

    sample_id: str  # unique within a file
    dataset: str  # refcoco, refcoco+, refcocog, coco_amodal, tao_amodal, ...
    split: str  # train, val, test, testA, testB, ...
    task: Task
    image: str  # relative to the data root, or absolute; for a flipped sample the mirrored file
    width: int  # px
    height: int  # px
    expression: str
    gt_box: list[float]  # xyxy px; inside the image for "vanilla", may leave it for "amodal"
    modal_box: list[float] | None  # xyxy px of the visible part; "amodal" only
    image_id: str  # of the unmirrored image, equal across data sets (the COCO id if it has one)
    ann_id: str | None
    ref_id: str | None
    flipped: bool  # True: made by `flip`
    prompt_kind: str | None  # kind of expression, if the source states it
    num_lookalikes: int | None  # other objects of the same kind, if the source tells


class Prediction(GroundingSample):
    """One line of predictions/<model>/<dataset>_<split>.jsonl: a sample and what a model answered.

    boxes, box: xyxy pixels of the original image; box is the one that counts (null: none). IoU is
    never stored.
    """

    model: str
    revision: str | None
    profile: str
    seed: int
    prompt: str
    raw_answer: str
    frame: str  # value of the BoxFrame of the numbers in raw_answer; older files hold its name
    reasoning: str | None
    boxes: list[list[float]]
    box: list[float] | None
    status: str  # "ok" | "no_box" | "unclosed_reasoning" | "malformed" | "error"
    error: str | None
    prompt_tokens: int | None
    reasoning_tokens: int | None
    answer_tokens: int | None
    finish_reason: str  # "stop" | "length" | "error"
    # Null if several were answered together; `measure_latency` measures those
    latency_ms: float | None


# The eight test splits of Table 4 and the amodal benchmark of Table 5, as (dataset, split)
EVAL_SPLITS = (
    ("refcoco", "val"),
    ("refcoco", "testA"),
    ("refcoco", "testB"),
    ("refcoco+", "val"),
    ("refcoco+", "testA"),
    ("refcoco+", "testB"),
    ("refcocog", "val"),
    ("refcocog", "test"),
)
AMODAL_SPLITS = (("coco_amodal", "val"), ("coco_amodal", "test"))

EDGE_TOLERANCE_PX = 1.0  # annotators' boxes overshoot the border by fractions of a pixel
BATCH_ROWS = 20_000  # rows held as Python objects at a time
# Numbers in COCO's files; kept as text, so that ids of all sources are of one type
ID_FIELDS = ("sample_id", "image_id", "ann_id", "ref_id")


class SampleError(EgmError, ValueError):
    """A row that is not a GroundingSample. The message says file, row and reason."""


def _without_none(hint: object) -> tuple[object, bool]:
    """(type, whether null is allowed) of an annotation such as `str` or `str | None`."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not types.NoneType), True
    return hint, False


_COLUMN = {
    str: Value("string"),
    int: Value("int64"),
    bool: Value("bool"),
    Task: Value("string"),
    list[float]: List(Value("float64")),
}
_TYPES = {
    name: _without_none(hint) for name, hint in typing.get_type_hints(GroundingSample).items()
}
FEATURES = Features({name: _COLUMN[kind] for name, (kind, _) in _TYPES.items()})
REQUIRED = tuple(name for name, (_, nullable) in _TYPES.items() if not nullable)


def read_samples(path: str | Path) -> Dataset:
    """All rows of a GroundingSample file, validated, as an Arrow-backed Dataset.

    Raises FileNotFoundError, or SampleError with file, row and reason.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no sample file {path}; make it with `python -m egm_lib.data prepare` "
            "(real data) or by running notebook 00 (miniature world)"
        )
    stat = path.stat()
    table = _read_quickly(path) if stat.st_size else FEATURES.arrow_schema.empty_table()
    if table is None:
        table = rows_to_table(json_lines(path), str(path))
    check_table(table, str(path))
    return _dataset(table, Hasher.hash([str(path.resolve()), stat.st_size, stat.st_mtime_ns]))


def write_samples(path: str | Path, rows: Iterable[Mapping] | Dataset) -> int:
    """Writes validated rows as JSON lines, whole or not at all; returns their number.

    Optional fields that a row lacks are written as null. Raises SampleError with row and reason.
    """
    path, count, seen = Path(path), 0, set()
    with files.atomic_open(path) as file:
        for table in _batches(rows, str(path)):
            check_table(table, str(path), first_row=count + 1)
            ids = set(table["sample_id"].to_pylist())
            if repeated := seen & ids:
                raise SampleError(
                    f"{path}: sample_id {min(repeated)!r} occurs twice; give every row its own id"
                )
            seen |= ids
            count += len(table)
            file.writelines(map(files.json_line, table.to_pylist()))
    return count


def rows_to_dataset(rows: Iterable[Mapping], source: str) -> Dataset:
    """Validated Dataset of rows, of which at most BATCH_ROWS are Python objects at a time.

    source: what errors call the rows, such as the file that they come from.
    """
    return table_to_dataset(rows_to_table(rows, source), source)


def table_to_dataset(
    table: pa.Table, source: str, row_numbers_N: np.ndarray | None = None
) -> Dataset:
    """Validated Dataset over an Arrow table; missing columns become null.

    row_numbers_N: number of each row in the source, for errors; None: 1, 2, ...
    """
    for field in FEATURES.arrow_schema:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    table = table.select(list(FEATURES)).cast(FEATURES.arrow_schema)
    check_table(table, source, row_numbers_N=row_numbers_N)
    return _dataset(table, generate_random_fingerprint())


def _dataset(table: pa.Table, fingerprint: str) -> Dataset:
    # The default fingerprint would hash the whole table.
    return Dataset(table.cast(FEATURES.arrow_schema), fingerprint=fingerprint)


def rows_to_table(rows: Iterable[Mapping], source: str) -> pa.Table:
    """Arrow table of rows with the right fields and types; `check_table` checks the values."""
    return pa.concat_tables([*_tables(iter(rows), source), FEATURES.arrow_schema.empty_table()])


def _batches(rows: Iterable[Mapping] | Dataset, source: str) -> Iterator[pa.Table]:
    if isinstance(rows, Dataset) and rows.features == FEATURES:
        return rows.with_format("arrow").iter(batch_size=BATCH_ROWS)
    return _tables(iter(rows), source)


def _tables(rows: Iterator[Mapping], source: str) -> Iterator[pa.Table]:
    first_row = 1
    while batch := list(islice(rows, BATCH_ROWS)):
        batch = [_as_sample(row, source, number) for number, row in enumerate(batch, first_row)]
        yield typed_table(batch, FEATURES.arrow_schema, source, first_row)
        first_row += len(batch)


def _as_sample(row: Mapping, source: str, number: int) -> Mapping:
    """The row with its ids as text; SampleError if it is no object or has an unknown field."""
    if not isinstance(row, Mapping):
        raise SampleError(f"{source}, row {number}: not an object but {type(row).__name__}")
    if unknown := set(row) - set(FEATURES):
        raise SampleError(
            f"{source}, row {number}: unknown field {min(unknown, key=str)!r}; "
            f"a sample has {', '.join(FEATURES)}"
        )
    numbers = [name for name in ID_FIELDS if type(row.get(name)) is int]
    return {**row, **{name: str(row[name]) for name in numbers}} if numbers else row


# What pyarrow raises for a value that does not have the type of its column: also an integer of more
# than 64 bits, and half a surrogate pair in a text
_TYPE_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)


def typed_table(
    batch: Sequence[Mapping], schema: pa.Schema, source: str, first_row: int
) -> pa.Table:
    """Arrow table of rows; SampleError names the first value that does not have its field's type.

    first_row: number of the first row in the source.
    """
    try:
        table = pa.Table.from_pylist(batch, schema=schema)
    except _TYPE_ERRORS:
        table = None
    if table is not None and not _has_fractions(batch, schema):
        return table
    for number, row in enumerate(batch, first_row):
        for field in schema:
            value = row.get(field.name)
            try:
                pa.array([value], field.type)
                valid = not _has_fractions([row], pa.schema([field]))
            except _TYPE_ERRORS:
                valid = False
            if not valid:
                shown = f"{field.name} = {ascii(value)[:80]}"
                raise SampleError(f"{source}, row {number}: {shown} is not {field.type}")
    raise SampleError(f"{source}: rows {first_row} and following do not fit {schema.names}")


def _has_fractions(batch: Iterable[Mapping], schema: pa.Schema) -> bool:
    """Whether a whole-number column is given a fraction, which pyarrow would cut off."""
    names = [field.name for field in schema if pa.types.is_integer(field.type)]
    values = (row.get(name) for row in batch for name in names)
    return any(isinstance(value, float) and not value.is_integer() for value in values)


def _read_quickly(path: Path) -> pa.Table | None:
    """The whole file through Arrow's own JSON reader; None if rows must be read one by one."""
    options = pa.json.ParseOptions(
        explicit_schema=FEATURES.arrow_schema, unexpected_field_behavior="error"
    )
    try:
        table = pa.json.read_json(path, parse_options=options)
        table.validate(full=True)  # strings are UTF-8, which the reader does not check
        return table
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def json_lines(path: Path) -> Iterator[Mapping]:
    """The objects of a JSON-lines file one by one; SampleError names the line that is not one."""

    def refuse(number: int, reason: str) -> None:
        raise SampleError(f"{path}, row {number}: {reason}")

    return files.iter_jsonl(path, report=refuse)


def check_table(
    table: pa.Table, source: str, first_row: int = 1, row_numbers_N: np.ndarray | None = None
) -> None:
    """Raises SampleError for the first row whose values contradict the record."""
    start = 0
    for batch in table.to_batches(max_chunksize=200_000):
        faults = [
            (int(np.argmax(bad_N)), reason) for bad_N, reason in _faults(batch) if bad_N.any()
        ]
        if faults:
            row, reason = min(faults, key=lambda fault: fault[0])
            shown = {name: batch[name][row].as_py() for name in ("sample_id", "gt_box")}
            number = (
                first_row + start + row if row_numbers_N is None else row_numbers_N[start + row]
            )
            raise SampleError(f"{source}, row {number}: {reason} ({shown})")
        start += len(batch)
    if (unique := pc.count_distinct(table["sample_id"]).as_py()) != len(table):
        counts = table["sample_id"].value_counts()
        repeated = counts.filter(pc.greater(counts.field(1), 1))[0]["values"].as_py()
        raise SampleError(
            f"{source}: only {unique} of {len(table)} sample_id are different; "
            f"{repeated!r} occurs more than once; give every row its own id"
        )


def _faults(batch: pa.RecordBatch) -> Iterator[tuple[np.ndarray, str]]:
    """(bad_N, reason) for every rule of the record, the most basic rules first."""
    for name in REQUIRED:
        yield _bools(pc.is_null(batch[name])), f"{name} is missing"
    for name in ("sample_id", "dataset", "split", "image", "expression", "image_id"):
        yield _bools(pc.equal(pc.utf8_trim_whitespace(batch[name]), "")), f"{name} is blank"
    vanilla_N, amodal_N = (
        _bools(pc.equal(batch["task"], "vanilla")),
        _bools(pc.equal(batch["task"], "amodal")),
    )
    yield ~(vanilla_N | amodal_N), "task is neither 'vanilla' nor 'amodal'"
    for side in ("width", "height"):
        yield _bools(pc.less_equal(batch[side], 0)), f"{side} is not positive"
    for name in ("gt_box", "modal_box"):
        absent_N = _bools(pc.is_null(batch[name]))
        not_four_N = _bools(pc.not_equal(pc.list_value_length(batch[name]), 4))
        yield not_four_N, f"{name} does not have four numbers"
        boxes_N_4 = _boxes(batch[name], absent_N | not_four_N)
        yield ~np.isfinite(boxes_N_4).all(axis=1), f"{name} is not finite"
        x1_N, y1_N, x2_N, y2_N = boxes_N_4.T
        yield (
            (x2_N <= x1_N) | (y2_N <= y1_N),
            f"{name} is empty or its corners are swapped (x1 < x2 and y1 < y2)",
        )
        width_N, height_N = (
            pc.fill_null(batch[side], 0).to_numpy() for side in ("width", "height")
        )
        overshoot_N = np.max([-x1_N, -y1_N, x2_N - width_N, y2_N - height_N], axis=0)
        known_N = vanilla_N & ~absent_N & ~not_four_N
        yield (
            known_N & (overshoot_N > EDGE_TOLERANCE_PX),
            f"{name} leaves the image, which only amodal boxes may",
        )
    yield vanilla_N & ~absent_N, "modal_box belongs to amodal samples only"


def _bools(array: pa.Array) -> np.ndarray:
    """Boolean numpy array; null counts as False, because a missing value has its own rule."""
    return pc.fill_null(array, False).to_numpy(zero_copy_only=False)


def _boxes(column: pa.ListArray, unusable_N: np.ndarray) -> np.ndarray:
    """boxes_N_4 of a list column; unusable rows become the unit box, which passes later rules."""
    boxes_N_4 = np.tile([0.0, 0.0, 1.0, 1.0], (len(column), 1))
    usable = column.filter(pa.array(~unusable_N))
    boxes_N_4[~unusable_N] = pc.list_flatten(usable).to_numpy(zero_copy_only=False).reshape(-1, 4)
    return boxes_N_4


def report_left_out(source: str, left_out: Counter, counts: Counter | None) -> None:
    """Logs what a reader left out of a source and why, and adds it to the caller's counts."""
    if left_out:
        log.warning("%s: left out %s", source, dict(left_out))
    if counts is not None:
        counts.update(left_out)


def read_json(
    path: str | Path,
    *,
    shape: type = dict,
    object_hook: Callable[[dict], typing.Any] | None = None,
) -> typing.Any:
    """A published JSON file. Raises FileNotFoundError, or SampleError if it is not what we expect.

    shape, object_hook: as in `egm_lib.files.read_json`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; `python -m egm_lib.data fetch` gets it or says how to"
        )
    try:
        return files.read_json(
            path, "delete it and fetch it again", shape=shape, object_hook=object_hook
        )
    except InputError as error:
        raise SampleError(str(error)) from error


def xywh_to_xyxy(box: typing.Sequence[float]) -> list[float]:
    """COCO's [x, y, width, height] as [x1, y1, x2, y2]; px."""
    x, y, width, height = map(float, box)
    return [x, y, x + width, y + height]


def with_area(box: list[float]) -> list[float] | None:
    """The box; None if it has no area, or a side that is not a number."""
    return box if box[2] > box[0] and box[3] > box[1] else None


def join_image(image_root: str | Path | None, name: str) -> str:
    """`image` of a sample: a file name below image_root, which is absolute or relative to the data
    root.
    """
    return name if image_root is None else str(Path(image_root) / name)
