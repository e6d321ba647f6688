"""Files: the project's root, JSON and JSON lines, and writing a file whole or not at all."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import typing
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from egm_lib.errors import InputError

log = logging.getLogger(__name__)


def project_root() -> Path:
    """The checkout that holds this package, or the working directory of an installed package."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "notebooks").is_dir() else Path.cwd()


@contextmanager
def atomic_open(path: Path, mode: str = "w") -> Iterator[typing.IO]:
    """A file that replaces `path` when the block ends well, and else leaves no trace."""
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


def read_json(path: Path, advice: str = "delete it and run its stage again") -> typing.Any:
    """The JSON in a file; None where there is no file.

    Raises InputError naming the file and the reason, with `advice`, where it cannot be read.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); {advice}") from error


def iter_jsonl(path: Path) -> Iterator[dict]:
    """The objects of a JSON-lines file, in order.

    A line ends with a newline alone: other separators of Unicode may stand inside a value. A line
    that is no JSON object is left out with a warning that names file and line; a torn last line,
    which a killed process leaves, is left out in silence.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            try:
                row = json.loads(text.decode("utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"an object is needed, not {type(row).__name__}")
            except (ValueError, RecursionError) as error:
                if line.endswith(b"\n"):
                    log.warning("%s, line %d is left out: %s", path, number, error)
                continue
            yield row


def read_jsonl(path: Path) -> list[dict]:
    """`iter_jsonl` as a list."""
    return list(iter_jsonl(path))


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
