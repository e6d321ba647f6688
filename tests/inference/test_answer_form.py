"""Answers bound to a form: what it admits, where it ends, and the faster search for its tokens."""

from dataclasses import replace

import pytest
import regex
import torch
from engine_world import GREEDY, requests_of
from tiny_qwen import tiny_qwen

from egm_lib.inference.answer_form import ANSWER_PATTERNS, AnswerForm, Pieces
from egm_lib.prompts import FAMILIES

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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("label", ["red cup", 'the "big" one', "Café, left"])
def test_the_form_admits_what_the_family_writes(family, label):
    text = family.answer((3, 4, 50, 40), (64, 48), label, None).removeprefix(
        family.no_reasoning_prefix
    )
    assert regex.fullmatch(ANSWER_PATTERNS[family.name], text)


@pytest.mark.parametrize(
    "text",
    [
        'I look first. [{"bbox_2d": [1, 2, 3, 4]}]',  # reasoning before the answer
        '[{"bbox_2d": [1, 2, 3]}]',  # three numbers
        '[{"bbox_2d": [1, 2, 3, 1001]}]',  # outside 0..1000
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [1, 2, 3, 4]}]',  # two boxes
    ],
)
def test_the_form_refuses(text):
    assert not regex.fullmatch(ANSWER_PATTERNS["qwen3-vl"], text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_without_reasoning_the_form_binds_even_a_model_of_random_weights(engine, temperature):
    free = replace(GREEDY, temperature=temperature, max_new_tokens=320)
    pattern = ANSWER_PATTERNS["qwen3-vl"]
    for answer in engine.answer(requests_of(3), free, reasoning=False):
        assert (
            answer.raw_answer.startswith("<think>\n</think>\n\n") and answer.reasoning_tokens == 0
        )
        written = answer.raw_answer.removeprefix("<think>\n</think>\n\n")
        assert regex.fullmatch(pattern, written, partial=answer.finish_reason == "length")
        assert "bbox_2d" in written
    # Unbound, the same weights write anything else
    for answer in engine.answer(requests_of(3), free):
        assert not regex.fullmatch(
            pattern, answer.raw_answer.removeprefix("<think>\n"), partial=True
        )


def bound(engine, max_new_tokens: int):
    [answer] = engine.answer(
        requests_of(1), replace(GREEDY, max_new_tokens=max_new_tokens), reasoning=False
    )
    return answer, answer.raw_answer.removeprefix("<think>\n</think>\n\n")


def test_a_bound_answer_ends_where_its_form_ends_or_where_its_tokens_do(engine):
    """Bytes as vocabulary: a token is a character, so that every place is a place to be cut off."""
    pattern, (whole, text) = ANSWER_PATTERNS["qwen3-vl"], bound(engine, 320)
    assert whole.finish_reason == "stop" and regex.fullmatch(pattern, text)
    for cut in (1, whole.answer_tokens // 2, whole.answer_tokens - 1):
        answer, start = bound(engine, cut)
        assert (answer.finish_reason, answer.answer_tokens) == ("length", cut) and text.startswith(
            start
        )
        assert regex.fullmatch(pattern, start, partial=True)
    # The form is complete, but no token was left to say so
    answer, exact = bound(engine, whole.answer_tokens)
    assert exact == text and answer.finish_reason == "length"
