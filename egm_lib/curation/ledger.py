"""The append-only record of what a service was paid for, as JSON lines."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from egm_lib.errors import EgmError
from egm_lib.files import json_line

BOM = b"\xef\xbb\xbf"
BEGIN = b'{"key": "'  # of every record
TOKENS = ("prompt_tokens", "completion_tokens")
CHUNK_BYTES = 65_536


class LedgerError(EgmError, RuntimeError):
    """A ledger that cannot be used now; the message says why and what to do."""


class OffsetIndex:
    """Map of 64-bit keys to file offsets, in 16 bytes an entry: 575k of them stay under 10 MB.

    A later entry replaces an earlier one. A reader compares the full key that it finds at the
    offset, since two keys may share their first 64 bits.
    """

    def __init__(self, recent_limit: int = 16_384) -> None:
        self._keys_N = np.empty(0, np.uint64)
        self._offsets_N = np.empty(0, np.uint64)
        self._recent: dict[int, int] = {}
        self._recent_limit = recent_limit

    def __setitem__(self, key: int, offset: int) -> None:
        self._recent[key] = offset
        if len(self._recent) >= max(self._recent_limit, len(self._keys_N) // 8):
            self._merge()

    def get(self, key: int) -> int | None:
        if (offset := self._recent.get(key)) is not None:
            return offset
        at = int(np.searchsorted(self._keys_N, np.uint64(key)))
        found = at < len(self._keys_N) and int(self._keys_N[at]) == key
        return int(self._offsets_N[at]) if found else None

    def _merge(self) -> None:
        fresh_keys_R = np.fromiter(self._recent.keys(), np.uint64, len(self._recent))
        fresh_offsets_R = np.fromiter(self._recent.values(), np.uint64, len(self._recent))
        # np.unique keeps the first of equal keys, so the fresh ones come first
        keys_N, first_N = np.unique(np.concatenate([fresh_keys_R, self._keys_N]), return_index=True)
        self._offsets_N = np.concatenate([fresh_offsets_R, self._offsets_N])[first_N]
        self._keys_N = keys_N
        self._recent.clear()


class Ledger:
    """Open for one process at a time; a context manager.

    Every record has "key", "task", "model", "status", "usage" and "cost_usd". status is "answered"
    (paid and received whole), "unreadable" (perhaps paid, but no answer: asked again) or "failed"
    (given up in that run, asked again by the next).
    A record has reached the operating system when `append` returns, so a killed process loses
    nothing that it had appended; `sync` protects against power cuts.
    cost_usd: the sum over all records.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Ledger:
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise LedgerError(
                f"another process is using {self.path}; wait for it, stop it, or name another "
                "ledger"
            ) from None
        except OSError as error:
            raise LedgerError(f"cannot write {self.path} ({error}); name another ledger") from error
        self._answered, self._failed = OffsetIndex(), OffsetIndex()
        self._usage: dict[tuple[str, str], list[int]] = {}
        self.cost_usd = 0.0
        try:
            self._refuse_other_files()
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed in __exit__)
            self._size = self._repair()
            for offset, record in self._scan():
                self._note(record, offset)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._file.close()
        self._lock.release()

    def append(self, record: dict) -> None:
        """Write one record in one call.

        Raises LedgerError if the disk refuses; the file then holds whole lines only.
        """
        line = json_line(record).encode()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            self._file.truncate(self._size)
            raise LedgerError(
                f"cannot write {self.path} ({error}); make room and run again, the answers so far "
                "are kept"
            ) from error
        self._note(record, self._size)
        self._size += len(line)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def answer(self, key: str) -> dict | None:
        """The paid answer to a request, None if there is none yet."""
        return self._read(self._answered, key)

    def failure(self, key: str) -> dict | None:
        """The latest failure of a request."""
        return self._read(self._failed, key)

    def mean_usage(self, task: str, model: str, at_least: int = 20) -> tuple[float, float] | None:
        """Mean (prompt, completion) tokens of the answers so far; None below `at_least` of them."""
        count, prompt, completion = self._usage.get((task, model), (0, 0, 0))
        return (prompt / count, completion / count) if count >= at_least else None

    def records(self) -> Iterator[dict]:
        """All records in order."""
        return (record for _, record in self._scan())

    def _refuse_other_files(self) -> None:
        """Raise LedgerError for a file that is not a ledger, before anything in it is changed."""
        if not self.path.exists():
            return
        try:
            with open(self.path, "rb") as file:
                first = file.readline().removeprefix(BOM)
        except OSError as error:
            raise LedgerError(f"cannot read {self.path} ({error}); name another ledger") from error
        try:
            is_ledger = _is_record(json.loads(first))
        except (ValueError, RecursionError):
            # A kill may have torn the only line; it still begins as every record does.
            torn = not first.endswith(b"\n")
            is_ledger = torn and first[: len(BEGIN)] == BEGIN[: len(first)]
        if not is_ledger:
            raise LedgerError(
                f"{self.path} is not a ledger: its first line is not a ledger record; name another "
                "file"
            )

    def _repair(self) -> int:
        """Mend the end that a killed process or a power cut left; returns the size in bytes."""
        cut = repair_end(self._file)
        if cut:
            print(
                f"{self.path}: removed {cut} bytes of a record that was cut off; its sample is "
                "asked again",
                file=sys.stderr,
            )
        return os.fstat(self._file.fileno()).st_size

    def _scan(self) -> Iterator[tuple[int, dict]]:
        """(offset, record) of every line.

        A damaged line is named and left out; its sample is asked again.
        """
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                record = _parsed(line.removeprefix(BOM) if number == 1 else line)
                if record is not None:
                    yield offset, record
                elif line.strip():
                    print(
                        f"{self.path}, line {number}: no record of a ledger, left out",
                        file=sys.stderr,
                    )
                offset += len(line)

    def _note(self, record: dict, offset: int) -> None:
        self.cost_usd += record["cost_usd"]
        if record["status"] == "answered":
            self._answered[_short(record["key"])] = offset
            usage = self._usage.setdefault((record["task"], record["model"]), [0, 0, 0])
            usage[0] += 1
            usage[1] += record["usage"]["prompt_tokens"]
            usage[2] += record["usage"]["completion_tokens"]
        elif record["status"] == "failed":
            self._failed[_short(record["key"])] = offset

    def _read(self, index: OffsetIndex, key: str) -> dict | None:
        offset = index.get(_short(key))
        if offset is None:
            return None
        line = bytearray()
        while not line.endswith(b"\n"):
            line += os.pread(self._file.fileno(), 4096, offset + len(line))
            if (end := line.find(b"\n")) >= 0:
                del line[end + 1 :]
        record = json.loads(line.removeprefix(BOM))
        return record if record["key"] == key else None


def repair_end(file: BinaryIO) -> int:
    """End a file of JSON lines with a whole line; returns how many bytes of a torn one were cut.

    file: open for reading and writing. A last line that only lacks its newline gets it.
    """
    size = os.fstat(file.fileno()).st_size
    start = size  # of the last line
    while start:
        begin = max(start - CHUNK_BYTES, 0)
        newline = os.pread(file.fileno(), start - begin, begin).rfind(b"\n")
        start = begin if newline < 0 else begin + newline + 1
        if newline >= 0:
            break
    last = os.pread(file.fileno(), size - start, start)
    if not last:
        return 0
    try:
        json.loads(last.removeprefix(BOM))
    except (ValueError, RecursionError):
        file.truncate(start)
        return len(last)
    file.seek(0, os.SEEK_END)
    file.write(b"\n")
    return 0


def _parsed(line: bytes) -> dict | None:
    """The record of a line, None for a damaged one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if _is_record(record) else None


def _is_record(record: object) -> bool:
    """Whether a value has the fields of a record, of the right kinds."""
    if not isinstance(record, dict):
        return False
    usage, cost = record.get("usage"), record.get("cost_usd")
    counts = [usage.get(name) for name in TOKENS] if isinstance(usage, dict) else [None]
    texts = [record.get(name) for name in ("key", "task", "model", "status")]
    return (
        all(isinstance(text, str) for text in (*texts, record.get("text", "")))
        and re.fullmatch(r"[0-9a-f]{16,}", record["key"]) is not None
        and all(type(count) is int for count in counts)
        and type(cost) in (int, float)
        and math.isfinite(cost)
    )


def _short(key: str) -> int:
    return int(key[:16], 16)
