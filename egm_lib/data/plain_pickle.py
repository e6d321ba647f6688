"""Pickles from strangers: plain containers, strings and numbers are read, and nothing else."""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from egm_lib.errors import EgmError

MAX_BYTES = 512 * 2**20  # the largest refs(*).p has about 40 MB

# The opcodes that build None, bools, numbers, strings, lists, tuples, dicts and sets, and the memo
# that shares their parts. All others are refused: those that import (GLOBAL, STACK_GLOBAL, INST),
# call (REDUCE, OBJ, NEWOBJ, BUILD), or look something up outside the file (PERSID, EXT*).
_ADMITTED = (
    pickle.PROTO,
    pickle.FRAME,
    pickle.STOP,
    pickle.MARK,
    pickle.POP,
    pickle.POP_MARK,
    pickle.DUP,
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.INT,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.LONG,
    pickle.LONG1,
    pickle.LONG4,
    pickle.FLOAT,
    pickle.BINFLOAT,
    pickle.STRING,
    pickle.BINSTRING,
    pickle.SHORT_BINSTRING,
    pickle.BINBYTES,
    pickle.SHORT_BINBYTES,
    pickle.BINBYTES8,
    pickle.BYTEARRAY8,
    pickle.UNICODE,
    pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE,
    pickle.BINUNICODE8,
    pickle.LIST,
    pickle.EMPTY_LIST,
    pickle.APPEND,
    pickle.APPENDS,
    pickle.TUPLE,
    pickle.EMPTY_TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.DICT,
    pickle.EMPTY_DICT,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.EMPTY_SET,
    pickle.ADDITEMS,
    pickle.FROZENSET,
    pickle.GET,
    pickle.BINGET,
    pickle.LONG_BINGET,
    pickle.PUT,
    pickle.BINPUT,
    pickle.LONG_BINPUT,
    pickle.MEMOIZE,
)
_OPCODE_NAMES = {opcode.code.encode("latin-1")[0]: opcode.name for opcode in pickletools.opcodes}


class UnsafePickleError(EgmError, ValueError):
    """A pickle that is broken or asks for more than plain data. The message says what."""


# The Python unpickler, because its opcodes are a table and its memo is a dict, which cannot be made
# to take all memory
class _PlainUnpickler(pickle._Unpickler):
    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in _ADMITTED}


def load_plain_pickle(path: str | Path) -> Any:
    """The object in a pickle of plain containers, strings and numbers.

    Strings of Python 2 are read as UTF-8.
    Raises FileNotFoundError, or UnsafePickleError for a pickle that asks for anything else; nothing
    of it is carried out.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path}; `python -m egm_lib.data fetch` gets it or says how to"
        )
    if path.stat().st_size > MAX_BYTES:
        raise UnsafePickleError(
            f"{path}: {path.stat().st_size} bytes, over the limit of {MAX_BYTES}"
        )
    try:
        return _PlainUnpickler(
            io.BytesIO(path.read_bytes()), encoding="utf-8", errors="replace"
        ).load()
    except KeyError as error:
        byte = error.args[0]
        if byte not in _OPCODE_NAMES:
            reason = f"no pickle (byte {byte} is none of its codes); delete it and fetch it again"
            raise UnsafePickleError(f"{path}: {reason}") from error
        raise UnsafePickleError(
            f"{path}: refused, it asks for {_OPCODE_NAMES[byte]}; only plain containers, strings "
            "and numbers are read. "
            "If you trust the file, convert it to JSON yourself"
        ) from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
        MemoryError,
    ) as error:
        raise UnsafePickleError(
            f"{path}: a broken pickle ({error!r}); delete it and fetch it again"
        ) from error
