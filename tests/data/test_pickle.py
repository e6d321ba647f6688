"""Pickles of strangers: plain data is read, everything else is refused before it can act."""

import datetime
import os
import pickle
import pickletools
import struct

import numpy as np
import pytest

from egm_lib.data.plain_pickle import UnsafePickleError, load_plain_pickle


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_is_read_by_every_protocol(tmp_path, protocol):
    plain = [
        1,
        -(2**70),
        2.5,
        True,
        None,
        "é",
        "x" * 300,
        (1, 2),
        (1, 2, 3),
        (),
        {"k": [[], {}]},
        1 << 2000,
    ]
    # Older ones write these as calls
    plain += [{3}, frozenset({4}), b"bytes"] if protocol >= 4 else []
    (tmp_path / "a.p").write_bytes(pickle.dumps(plain, protocol))
    assert load_plain_pickle(tmp_path / "a.p") == plain


class Acts:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def hostile(folder):
    target = folder / "acted"
    command = f"__import__('os').mkdir({str(target)!r})".encode()
    yield "reduce 0", pickle.dumps([Acts(target)], 0)
    yield "reduce 2", pickle.dumps([Acts(target)], 2)
    yield "reduce 5", pickle.dumps([Acts(target)], 5)
    yield "inst", b"(S'" + command.replace(b"'", b"\\'") + b"'\ni__builtin__\neval\n."
    yield "obj", b"(c__builtin__\neval\nS'" + command.replace(b"'", b"\\'") + b"'\no."
    yield (
        "hidden in a value",
        b"\x80\x02}X\x01\x00\x00\x00acposix\nmkdir\nX\x05\x00\x00\x00acted\x85Rs.",
    )
    yield "newobj", b"\x80\x02c__builtin__\nobject\n)\x81."
    yield "stack_global", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    yield "build", b"\x80\x02]}b."
    yield "persistent id", b"P1\n."
    yield "binary persistent id", b"K\x01Q."
    yield "extension", b"\x80\x02\x82\x01."
    yield "numpy", pickle.dumps(np.float64(1.0))
    yield "date", pickle.dumps(datetime.date(2026, 1, 1))


@pytest.mark.parametrize("case", range(14))
def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    name, data = list(hostile(tmp_path))[case]
    (tmp_path / "a.p").write_bytes(data)
    with pytest.raises(UnsafePickleError, match="refused, it asks for"):
        load_plain_pickle(tmp_path / "a.p")
    assert [path.name for path in tmp_path.iterdir()] == ["a.p"], name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"plain text",
        b"<html>quota exceeded</html>",
        b"\x80\x63.",
        b"\x80\x02a.",
        b"\x80\x02h\x05.",
        b"\x80\x02N",
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",  # a string of 4 EiB
        b"\x80\x02}]Ns.",  # a list as a key
        b"\x80\x02\x8b" + struct.pack("<i", -1) + b".",
        b"I" + b"9" * 10_000 + b"\n.",
    ],
    ids=range(12),
)
def test_a_broken_pickle_is_one_sentence(tmp_path, data):
    (tmp_path / "a.p").write_bytes(data)
    with pytest.raises(UnsafePickleError, match="a\\.p: .*fetch it again"):
        load_plain_pickle(tmp_path / "a.p")


def test_a_memo_index_cannot_exhaust_the_memory(tmp_path):
    # 32 GB in the C unpickler
    (tmp_path / "a.p").write_bytes(b"\x80\x02]r" + struct.pack("<I", 0xFFFFFFFF) + b".")
    assert load_plain_pickle(tmp_path / "a.p") == []


def test_no_accepted_opcode_can_call_or_import():
    from egm_lib.data.plain_pickle import _PlainUnpickler

    named = {opcode.code.encode("latin-1")[0]: opcode.name for opcode in pickletools.opcodes}
    admitted = {named[code] for code in _PlainUnpickler.dispatch}
    assert not admitted & {
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
        "INST",
        "OBJ",
        "NEWOBJ",
        "NEWOBJ_EX",
        "PERSID",
        "BINPERSID",
        "EXT1",
        "EXT2",
        "EXT4",
        "NEXT_BUFFER",
        "READONLY_BUFFER",
    }
