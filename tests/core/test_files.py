"""Files as they really come: torn, of another encoding, with odd characters; written whole."""

import json
import logging
import random

import pytest
from fuzz_jsonl import damaged, expected_rows, sample_lines

from egm_lib.errors import InputError
from egm_lib.files import (
    MAX_WARNINGS,
    atomic_open,
    iter_jsonl,
    json_line,
    read_json,
    read_jsonl,
    write_jsonl,
    write_text,
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    "content, rows",
    [
        (b"", []),
        (b'{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        (b'{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),  # whole, without its newline
        (b'{"a": 1}\n{"a": ', [{"a": 1}]),  # torn in the middle of a line
        (b'{"a": 1}\n{"a": "\xc3', [{"a": 1}]),  # torn in the middle of a character
        (b'\xef\xbb\xbf{"a": 1}\n', [{"a": 1}]),  # byte order mark
        (b'{"a": 1}\n\xef\xbb\xbf{"a": 2}\n', [{"a": 1}, {"a": 2}]),  # two files, concatenated
        (b'\n\n{"a": 1}\n  \n', [{"a": 1}]),  # blank lines
        (b'{"a": 1}\r\n{"a": 2}\r\n', [{"a": 1}, {"a": 2}]),  # Windows
        (
            '{"a": "x\u2028y\x85z\x0b"}\n'.replace("\x0b", "\u2029").encode(),
            [{"a": "x\u2028y\x85z\u2029"}],
        ),
        (b'{"a": "\\ud83d"}\n', [{"a": "\ud83d"}]),  # half a surrogate pair, escaped
    ],
)
def test_whole_lines_are_kept_without_a_warning(file, caplog, content, rows):
    file.write_bytes(content)
    assert read_jsonl(file) == rows
    assert caplog.text == ""


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"a": 1', "not JSON"),  # torn, and something was appended later
        (b'{"a": 1{"a": 2}', "not JSON"),
        (b"[1, 2]", "not an object but a list"),
        (b"7", "not an object but a number"),
        (b"null", "not an object but null"),
        (b'"text"', "not an object but text"),
        ('{"a": "é"}'.encode("latin-1"), "not JSON (not UTF-8 text: byte 7 is 0xe9)"),
        (b"[" * 100_000, "not JSON"),  # deeper than Python's stack
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),  # longer than Python reads a number
        (b"\x00\x00\x00", "not JSON"),  # what a crash of the machine leaves
    ],
)
def test_a_line_that_is_no_object_is_named_and_the_others_are_kept(file, caplog, line, reason):
    file.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert read_jsonl(file) == [{"a": 1}, {"a": 2}]
    assert f"{file}, line 2 is left out: {reason}" in caplog.text


def test_a_file_of_garbage_does_not_flood_the_log(file, caplog):
    file.write_bytes(b"garbage\n" * 1000)
    assert read_jsonl(file) == []
    assert len(caplog.records) == MAX_WARNINGS + 1
    assert f"{file}: 1000 lines are left out in all" in caplog.text


def test_a_caller_may_refuse_a_bad_line(file, caplog):
    file.write_bytes(b'{"a": 1}\n{"a": ')

    def refuse(number, reason):
        raise InputError(f"line {number}: {reason}")

    with pytest.raises(InputError, match="line 2: not JSON"):
        list(iter_jsonl(file, report=refuse))
    assert caplog.text == ""


def test_truncations_and_splices_never_lose_a_whole_line(file, caplog):
    """20,000 of the cases of `fuzz_jsonl.py`, which runs a million."""
    caplog.set_level(logging.CRITICAL, "egm_lib.files")
    rng, lines = random.Random(0), sample_lines()
    for _ in range(20_000):
        content = damaged(rng, lines)
        file.write_bytes(content)
        assert read_jsonl(file) == expected_rows(content), content


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"a": ', "not JSON"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text: byte 0 is 0xff"),
        (b"\xff\xfe", "not UTF-8 text"),
        (b"[" * 100_000, "not JSON"),
        (b"", "not JSON"),
        (b"[1]", "holds a list, not an object"),
        (b"null", "holds null, not an object"),
    ],
)
def test_json_that_cannot_be_used_is_one_sentence(tmp_path, content, reason):
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_json(path, "delete it", shape=dict)
    message = str(caught.value)
    assert str(path) in message and reason in message and message.endswith("; delete it")
    assert "\n" not in message


def test_json_with_a_byte_order_mark_is_read_and_a_missing_file_is_none(tmp_path):
    assert read_json(tmp_path / "a.json") is None
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf\n{"a": [1]}')
    assert read_json(tmp_path / "a.json", shape=dict) == {"a": [1]}


def test_what_is_written_is_read_back_and_each_row_is_one_line(file):
    rows = [
        {"a": "x\u2028y\x85\r\n"},  # separators that must not end a line
        {"a": "\ud83d", "b": "é"},  # half a surrogate pair, which UTF-8 cannot hold
        {"a": None, "b": [1.5, -0.0]},
    ]
    assert write_jsonl(file, rows) == 3
    assert read_jsonl(file) == rows
    assert file.read_bytes().count(b"\n") == 3
    assert json_line({"é": 1}) == '{"é": 1}\n'  # readable where it can be


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file):
    write_text(file, "old")

    def rows():
        yield {"a": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(file, rows())
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud83d")
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text() == "old"


def test_a_file_that_is_replaced_whole_has_the_rights_of_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_open(tmp_path / "whole") as file:
        file.write("text")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_line_is_json():
    assert json.loads(json_line({"a": "\ud83d\u2028"})) == {"a": "\ud83d\u2028"}


FIELDS = {"stages": dict, "seconds": float}


@pytest.mark.parametrize(
    "content, reason",
    [
        ("[]", "holds a list, not an object"),
        ("null", "holds null, not an object"),
        ('{"seconds": 1.0}', "has no 'stages'"),
        ('{"stages": [], "seconds": 1.0}', "'stages' in .* is a list, not an object"),
        ('{"stages": {}, "seconds": null}', "'seconds' in .* is null, not a number"),
    ],
)
def test_json_of_another_shape_is_one_sentence(tmp_path, content, reason):
    file = tmp_path / "manifest.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"{reason}; mend it") as caught:
        read_json(file, "mend it", shape=dict, fields=FIELDS)
    assert str(file) in str(caught.value)
    file.write_text('{"stages": {}, "seconds": 1.0, "more": 7}')
    assert read_json(file, shape=dict, fields=FIELDS)["more"] == 7
