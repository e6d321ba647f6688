"""The ledger: what was appended is found again, whatever happens to the file."""

import json
import subprocess
import sys

import numpy as np
import pytest

from egm_lib.curation.ledger import Ledger, LedgerError, OffsetIndex


def key(number):
    return f"{number:016x}" * 2


def record(number, status="answered", **more):
    usage = {"prompt_tokens": 100, "completion_tokens": number}
    base = {
        "key": key(number),
        "task": "trace",
        "model": "m",
        "status": status,
        "usage": usage,
        "cost_usd": 0.5,
    }
    return base | more


def write(path, *records):
    with Ledger(path) as ledger:
        for item in records:
            ledger.append(item)


def test_answers_are_found_after_reopening(tmp_path):
    path = tmp_path / "ledger.jsonl"
    write(
        path, record(1, text="a"), record(2, "failed", error="x"), record(3, "unreadable", text="{")
    )
    with Ledger(path) as ledger:
        assert ledger.answer(key(1))["text"] == "a"
        assert ledger.answer(key(2)) is None and ledger.failure(key(2))["error"] == "x"
        assert ledger.answer(key(3)) is None  # paid perhaps, but no answer
        assert ledger.cost_usd == 1.5  # all of them count
        assert ledger.mean_usage("trace", "m", at_least=1) == (100, 1)


def test_long_records_and_equal_short_keys(tmp_path):
    """A record may be longer than a read. Keys with the same first 64 bits are kept apart."""
    first, second = record(0, text="x" * 100_000), record(0, key="0" * 31 + "1")
    path = tmp_path / "ledger.jsonl"
    write(path, first)
    with Ledger(path) as ledger:
        assert len(ledger.answer(first["key"])["text"]) == 100_000
        assert ledger.answer(second["key"]) is None


@pytest.mark.parametrize("cut", [1, 2, 10, 60])
def test_a_torn_last_line_is_cut_off(tmp_path, cut, capsys):
    path = tmp_path / "ledger.jsonl"
    write(path, record(1), record(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Ledger(path) as ledger:
        assert ledger.answer(key(1))
        # Only the newline was missing: it is whole
        assert (ledger.answer(key(2)) is not None) == (cut == 1)
        ledger.append(record(3))
    assert [json.loads(line)["key"][-1] for line in path.read_bytes().splitlines()] == (
        ["1", "2", "3"] if cut == 1 else ["1", "3"]
    )
    assert ("torn" in capsys.readouterr().err) == (cut > 1)


def test_a_file_that_is_one_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"key": "' + b"a" * 200_000)
    with Ledger(path) as ledger:
        ledger.append(record(1))
    assert len(path.read_bytes().splitlines()) == 1


def test_a_damaged_line_in_the_middle_is_skipped(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    write(path, record(1), record(2), record(3))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * 20 + b"\n" + lines[2])
    with Ledger(path) as ledger:
        assert ledger.answer(key(1)) and ledger.answer(key(3)) and ledger.answer(key(2)) is None
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "odd",
    [
        [],
        7,
        {},
        record(9) | {"key": 9},
        record(9) | {"key": "no hexadecimal digits"},
        record(9) | {"usage": None},
        record(9) | {"usage": {"prompt_tokens": 1}},
        record(9) | {"cost_usd": "free"},
        record(9) | {"cost_usd": float("nan")},
        record(9) | {"text": None},
        {name: value for name, value in record(9).items() if name != "model"},
    ],
)
def test_a_line_of_another_shape_is_left_out_by_name(tmp_path, capsys, odd):
    path = tmp_path / "ledger.jsonl"
    write(path, record(1), record(2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + json.dumps(odd).encode() + b"\n" + second)
    with Ledger(path) as ledger:
        assert ledger.answer(key(1)) and ledger.answer(key(2)) and ledger.answer(key(9)) is None
        assert ledger.cost_usd == 1.0
    assert "line 2: no record" in capsys.readouterr().err


def test_a_byte_order_mark_and_odd_separators_are_no_damage(tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    write(path, record(1, text="a \u2028 b \x85 c"), record(2))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with Ledger(path) as ledger:
        assert ledger.answer(key(1))["text"] == "a \u2028 b \x85 c" and ledger.answer(key(2))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"my notes", b'{"a": 1}', b'[{"key": "a"}]', "{}\n".encode("utf-16"), b"\0" * 50]
)
def test_a_file_of_another_kind_is_not_touched(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="is not a ledger"), Ledger(path):
        pass
    assert path.read_bytes() == content


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    code = f"from egm_lib.curation.ledger import Ledger\nwith Ledger({str(path)!r}): pass"
    with Ledger(path):
        refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert refused.returncode and "LedgerError: another process is using" in refused.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.append(record(1))

        class Full:
            def __init__(self, file):
                self.file = file

            def write(self, line):
                return self.file.write(line[:10])

            def __getattr__(self, name):
                return getattr(self.file, name)

        monkeypatch.setattr(ledger, "_file", Full(ledger._file))
        with pytest.raises(LedgerError, match="make room"):
            ledger.append(record(2))
    assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == [key(1)]


def test_offset_index_agrees_with_a_dict():
    rng = np.random.default_rng(0)
    index, truth = OffsetIndex(recent_limit=64), {}
    # Many keys come again
    for key in rng.integers(0, 2**64, size=5000, dtype=np.uint64) % np.uint64(3000):
        key, offset = int(key) * 2**50, int(rng.integers(2**40))
        index[key] = truth[key] = offset
    assert all(index.get(key) == offset for key, offset in truth.items())
    assert index.get(7) is None
