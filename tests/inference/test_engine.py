"""Reasoning tokens are counted alike by all engines."""

import pytest

from egm_lib.inference.engine import count_reasoning_tokens


class Pieces:
    """A tokenizer that decodes by joining pieces."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, **options):
        return "".join(self.pieces[i] for i in ids)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (("so", "</think>", "[1]"), 2),  # Qwen3-VL's single token
        (("so", "</", "think", ">\n", "[1]"), 4),  # InternVL-3's, the last one with a line break
        (("a", "</think>", "b", "</", "think>", "c"), 5),  # the last tag counts
        (("so", "</", "think"), 0),
        ((), 0),
    ],
)
def test_reasoning_tokens_are_counted_by_decoding(pieces, expected):
    assert count_reasoning_tokens(Pieces(*pieces), range(len(pieces))) == expected
