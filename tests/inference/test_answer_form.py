"""Bound tokens by first characters are those of the plain scan, and far fewer are tried."""

import pytest
import torch
from tiny_qwen import tiny_qwen

from egm_lib.inference.answer_form import ANSWER_PATTERNS, AnswerForm, Pieces

STARTS = [
    "",
    "[",
    '[{"bbox_2d": [1',
    '[{"bbox_2d": [1, 2, 3, 4], "label": "',
    '[{"b',
    "```json\n",
    '[{"bbox_2d": [1, 2, 3, 4], "label": "Caf\u00e9',
    '[{"bbox_2d": [1, 2, 3, 4]}]',
    "no",
]


@pytest.mark.parametrize("keep", [1, 5, 10_000])
def test_pieces_admit_what_the_scan_admits(keep):
    """The scan without pieces is the reference; also within a character of several bytes."""
    tokenizer = tiny_qwen()[1].tokenizer
    eos_ids = frozenset([tokenizer.eos_token_id])

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    pattern, pieces = ANSWER_PATTERNS["qwen3-vl"], Pieces.of(tokenizer)
    scan, fast = (AnswerForm(pattern, decode, eos_ids, each) for each in (None, pieces))
    generator = torch.Generator().manual_seed(0)
    for start in STARTS:
        ids = tokenizer(start)["input_ids"]
        for written in (ids, ids[:-1]):  # the start with é: the half of a character
            logits_V = torch.randn(len(tokenizer) + 7, generator=generator)
            # Models pad their vocabulary, and a padded row may be the likeliest.
            logits_V[len(tokenizer) :] += 9.0
            expected_V = scan.bind(written, logits_V, keep)
            assert torch.equal(fast.bind(written, logits_V, keep), expected_V)


def test_a_tokenizer_that_joins_with_more_than_its_texts_has_no_pieces():
    assert Pieces.of(object()) is None
