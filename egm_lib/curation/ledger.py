"""The append-only record of what a service was paid for: one JSON object a line, never
rewritten.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from egm_lib.errors import EgmError


class LedgerError(EgmError, RuntimeError):
    """A ledger that cannot be used now; the message says why and what to do."""


class OffsetIndex:
    """Map of 64-bit keys to file offsets in 16 bytes an entry, so that 575k of them stay under 10
    MB.

    A later entry replaces an earlier one. Collisions are the reader's business: it finds the full
    key at the offset.
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
        return (
            int(self._offsets_N[at])
            if at < len(self._keys_N) and int(self._keys_N[at]) == key
            else None
        )

    def _merge(self) -> None:
        fresh_keys_R = np.fromiter(self._recent.keys(), np.uint64, len(self._recent))
        fresh_offsets_R = np.fromiter(self._recent.values(), np.uint64, len(self._recent))
        # np.unique keeps the first of equal keys: the fresh ones stand first
        keys_N, first_N = np.unique(np.concatenate([fresh_keys_R, self._keys_N]), return_index=True)
        self._keys_N, self._offsets_N = (
            keys_N,
            np.concatenate([fresh_offsets_R, self._offsets_N])[first_N],
        )
        self._recent.clear()


class Ledger:
    """Open for one process at a time; a context manager.

    Every record has "key", "task", "model", "status", "usage" and "cost_usd"; status is "answered"
    (paid, received whole), "unreadable" (perhaps paid, of no use: asked again) or "failed" (given
    up in that run, asked again by the next). A record has reached the operating system when
    `append` returns, so a killed process loses nothing it had appended;
    `sync` is against power cuts. cost_usd: sum over all records. mean_usage(task, model): what an
    answer took so far.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __enter__(self) -> Ledger:
        self._lock = FileLock(f"{self.path}.lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            message = f"another process uses {self.path}; wait, stop it, or name another ledger"
            raise LedgerError(message) from None
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
        """Write one record in one call; raises LedgerError, leaving whole lines only, where the
        disk refuses.
        """
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written")
        except OSError as error:
            self._file.truncate(self._size)
            message = (
                f"cannot write {self.path} ({error}); make room and run again, the answers so far "
                "are kept"
            )
            raise LedgerError(message) from error
        self._note(record, self._size)
        self._size += len(line)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def answer(self, key: str) -> dict | None:
        """The paid answer to a request, None where there is none yet."""
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
        """Raise LedgerError, before anything is written or cut off, for a file whose first line is
        no record.
        """
        if not self.path.exists():
            return
        try:
            with open(self.path, "rb") as file:
                first = file.readline()
        except OSError as error:
            raise LedgerError(f"cannot read {self.path} ({error}); name another ledger") from error
        if not first.endswith(b"\n"):  # nothing yet, or torn
            return
        try:
            record = json.loads(first)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not {"key", "status", "usage", "cost_usd"} <= set(
            record
        ):
            raise LedgerError(
                f"{self.path} is no ledger: its first line is no record of one; name another file"
            )

    def _repair(self) -> int:
        """Cut off a last line that a killed process or a power cut left torn; returns the size in
        bytes.
        """
        size = os.fstat(self._file.fileno()).st_size
        tail_at = size
        while tail_at and (
            chunk := os.pread(self._file.fileno(), min(tail_at, 65_536), max(tail_at - 65_536, 0))
        ):
            newline = chunk.rfind(b"\n")
            tail_at = max(tail_at - 65_536, 0)
            if newline >= 0:
                tail_at += newline + 1
                break
        if tail_at == size:
            return size
        tail = os.pread(self._file.fileno(), size - tail_at, tail_at)
        try:
            json.loads(tail)
        except ValueError:
            print(
                f"{self.path}: cut off a torn last line of {len(tail)} bytes; its sample is asked "
                "again",
                file=sys.stderr,
            )
            self._file.truncate(tail_at)
            return tail_at
        self._file.write(b"\n")  # only the line's end was missing
        return size + 1

    def _scan(self) -> Iterator[tuple[int, dict]]:
        """(offset, record) of every line; a damaged one is named and passed over, its sample is
        asked again.
        """
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield offset, json.loads(line)
                except ValueError:
                    print(f"{self.path}, line {number}: not JSON, passed over", file=sys.stderr)
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
        record = json.loads(line)
        return record if record["key"] == key else None


def _short(key: str) -> int:
    return int(key[:16], 16)
