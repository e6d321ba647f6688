"""A million damaged JSON-lines files: no line that is whole may be lost, and nothing may raise.

    PYTHONPATH=. python tests/core/fuzz_jsonl.py 1000000

Prints how many files were read and how many rows they kept; ends at the first file that is read
wrongly. `test_files.py` runs some of them.
"""

import json
import logging
import random
import sys
import tempfile
from pathlib import Path

from egm_lib.files import json_line, read_jsonl

VALUES = [
    "left dog",
    "x\u2028y\x85z",  # separators that str.splitlines would cut at
    "日本語 é",
    "\ud83d",  # half a surrogate pair
    '"{\\}\n',
    "",
    None,
    [1.5, 2, -3e-7],
    {"box": [1, 2, 3, 4]},
]


def sample_lines() -> list[bytes]:
    """Rows as `json_line` writes them: one for each odd value."""
    rows = [{"sample_id": f"s{number}", "text": value} for number, value in enumerate(VALUES)]
    return [json_line(row).encode() for row in rows]


def damaged(rng: random.Random, lines: list[bytes]) -> bytes:
    """A file of some lines: cut anywhere, and sometimes continued, joined or marked afterwards."""
    content = b"".join(rng.choices(lines, k=rng.randrange(1, 5)))
    kind = rng.randrange(4)
    if kind == 0:  # killed while writing
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:  # killed, and continued without a look at the end
        return content[: rng.randrange(len(content) + 1)] + rng.choice(lines)
    if kind == 2:  # a part is missing in the middle
        start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        return content[:start] + content[end:]
    mark = rng.choice((b"\xef\xbb\xbf", b"\n", b"\r\n", b" ", b"\x00", b"\xff", b"null\n"))
    place = rng.randrange(len(content) + 1)
    return content[:place] + mark + content[place:]


def expected_rows(content: bytes) -> list[dict]:
    """The lines that are whole, found the plain way: cut at newlines, keep what is an object."""
    rows = []
    for line in content.split(b"\n"):
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def main(count: int) -> None:
    logging.getLogger("egm_lib.files").setLevel(logging.CRITICAL)
    rng, lines, kept = random.Random(1), sample_lines(), 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        for number in range(count):
            content = damaged(rng, lines)
            path.write_bytes(content)
            rows = read_jsonl(path)
            assert rows == expected_rows(content), (number, content)
            kept += len(rows)
    print(f"{count:,} files read, {kept:,} rows kept")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
