"""Files: the project's root, JSON and JSON lines, and writing a file whole or not at all."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
import os
import re
import typing
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from egm_lib.errors import InputError

log = logging.getLogger(__name__)

MAX_WARNINGS = 5  # lines of one file that are named when they are left out
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def project_root() -> Path:
    """The checkout that holds this package, or the working directory of an installed package."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[typing.IO]:
    """A file that replaces `path` if the block succeeds, and leaves no trace if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile's: its files cannot be read by others.
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(unfinished, mode.replace("w", "x"), encoding=encoding) as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    with atomic_open(Path(path)) as file:
        file.write(text)


def read_json(
    path: Path,
    advice: str = "delete it and run its stage again",
    *,
    shape: type = object,
    fields: Mapping[str, type] | None = None,
    object_hook: Callable[[dict], typing.Any] | None = None,
) -> typing.Any:
    """The JSON in a file; None if there is no file.

    shape: dict or list, if the caller needs an object or a list.
    fields: keys that the object must have, and the kind of each value.
    object_hook: as in `json.loads`.
    Raises InputError with the file, the reason and `advice` if the file cannot be read as that.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(_decoded(path.read_bytes()), object_hook=object_hook)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(value, shape):
        raise InputError(f"{path} holds {_kind(value)}, not {_KINDS[shape]}; {advice}")
    for name, kind in (fields or {}).items():
        if name not in value:
            raise InputError(f"{path} has no {name!r}; {advice}")
        if not isinstance(value[name], kind):
            raise InputError(
                f"{name!r} in {path} is {_kind(value[name])}, not {_KINDS[kind]}; {advice}"
            )
    return value


def iter_jsonl(
    path: Path, *, report: Callable[[int, str], None] | None = None
) -> Iterator[dict[str, typing.Any]]:
    """The objects of a JSON-lines file, in order.

    Only a newline ends a line: other separators of Unicode may stand inside a value. Blank lines
    are skipped, and so is a byte order mark.
    report: called with the number of a line that is no JSON object, and the reason; it may raise.
    None: the line is left out with a warning. The torn last line that a killed process leaves is
    then left out without one.
    """
    left_out = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8)  # files are also concatenated
            if not text.strip():
                continue
            try:
                row = json.loads(_decoded(text))
                reason = "" if isinstance(row, dict) else f"not an object but {_kind(row)}"
            except (ValueError, RecursionError) as error:
                reason = f"not JSON ({error})"
            if not reason:
                yield row
            elif report:
                report(number, reason)
            elif line.endswith(b"\n"):
                left_out += 1
                if left_out <= MAX_WARNINGS:
                    log.warning("%s, line %d is left out: %s", path, number, reason)
    if left_out > MAX_WARNINGS:
        log.warning("%s: %d lines are left out in all", path, left_out)


def read_jsonl(path: Path) -> list[dict[str, typing.Any]]:
    """`iter_jsonl` as a list."""
    return list(iter_jsonl(path))


_KINDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _KINDS[type(value)]


def _decoded(content: bytes) -> str:
    """The text of JSON, without white space and byte order mark in front."""
    try:
        return content.decode("utf-8").lstrip(" \t\r\n").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 text: byte {error.start} is {content[error.start]:#x}"
        ) from None


def writable(text: str) -> str:
    """A text that can be written as UTF-8: half a surrogate pair becomes U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def writable_row(row: Mapping) -> dict:
    """A row whose keys and texts can be written as UTF-8, as a data frame must have them."""
    return {
        writable(name): writable(value) if isinstance(value, str) else value
        for name, value in row.items()
    }


def json_line(row: Mapping) -> str:
    """A row as one line of a JSON-lines file, newline included."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half a surrogate pair, which a model may write
        text = json.dumps(row)
    return text + "\n"


def write_jsonl(path: Path, rows: Iterable[Mapping]) -> int:
    """Writes rows as JSON lines, whole or not at all; returns their number."""
    count = 0
    with atomic_open(Path(path)) as file:
        for row in rows:
            file.write(json_line(row))
            count += 1
    return count


def digest(value: object) -> str:
    """SHA-256 of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
