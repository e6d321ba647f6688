"""The samples of one prediction file, divided among several processes.

Each process writes the answers of its shard to a separate file and can continue it after a stop:
`refcoco_val.unfinished/1-of-2.part` beside `refcoco_val.jsonl`. The last process to finish merges
the files.
"""

import shutil
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from egm_lib.files import read_jsonl, write_jsonl


@dataclass(frozen=True)
class Shard:
    """Shard `number`, counted from 1, of `count`."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that `--shard I/N` names. Raises ArgumentTypeError, for argparse."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ArgumentTypeError(f"{text!r} is not a shard: write I/N, such as 1/2")
        return cls(int(number), int(count))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, samples: Sequence[Mapping]) -> Sequence[Mapping]:
        """Every count-th sample, so that all shards are alike."""
        return samples[self.number - 1 :: self.count]

    def file(self, out: Path) -> Path:
        """Where the shard's rows of `out` are kept; the only shard's are `out` itself."""
        return out if self.count == 1 else _folder(out) / f"{self.number}-of-{self.count}.part"


WHOLE = Shard()
MARKS = ("sample_id", "status")


def add_shard_option(parser: ArgumentParser) -> None:
    """`--shard I/N`, as every command that predicts has it."""
    parser.add_argument(
        "--shard",
        type=Shard.parse,
        default=WHOLE,
        metavar="I/N",
        help="answer every N-th sample, from the I-th; the last of N processes merges the files",
    )


def _folder(out: Path) -> Path:
    return out.with_name(f"{out.stem}.unfinished")


def files_with_rows(out: Path) -> list[Path]:
    """`out` and the files of its shards, as far as they exist; also of a run with other shards."""
    return [path for path in (out, *sorted(_folder(out).glob("*.part"))) if path.is_file()]


def merge(out: Path, samples: Sequence[Mapping], own: Shard) -> list[str]:
    """Writes `out` in the order of the samples, whole or not at all, once no shard lacks a row.

    own: the shard of this process, which is finished. Several processes may merge at a time.
    Returns the unfinished shards, and how far each one is.
    """
    rows, unfinished = {}, []
    for shard in (Shard(number, own.count) for number in range(1, own.count + 1)):
        wanted, file = {sample["sample_id"] for sample in shard.of(samples)}, shard.file(out)
        found = {row["sample_id"]: row for row in whole_rows(file)}
        rows |= found
        if missing := wanted - found.keys():
            unfinished.append(f"{shard} ({len(wanted) - len(missing)} of {len(wanted)} samples)")
    if not own.file(out).is_file():  # another process has merged meanwhile
        return []
    if not unfinished:
        write_jsonl(out, (rows[sample["sample_id"]] for sample in samples))
        shutil.rmtree(_folder(out), ignore_errors=True)
    return unfinished


def whole_rows(file: Path) -> list[dict]:
    """The rows of a file of predictions; none without a file.

    A row without its sample or its status is damaged and left out, so that its sample is asked
    again.
    """
    try:
        rows = read_jsonl(file)
    except FileNotFoundError:
        return []
    return [row for row in rows if all(isinstance(row.get(key), str) for key in MARKS)]
