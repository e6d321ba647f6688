"""The transformers engine: the same answers in a batch as alone, and as transformers' generate."""

import weakref
from dataclasses import replace

import pytest
import torch
from engine_world import GREEDY, requests_of
from PIL import Image
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen

from egm_lib.inference.engine import Request
from egm_lib.inference.transformers_engine import TransformersEngine


def test_greedy_answers_in_padded_batches_equal_generate_one_by_one(engine):
    requests = requests_of(10)
    sampling = replace(GREEDY, max_new_tokens=24)
    answers = list(engine.answer(requests, sampling))
    processor, ended = engine.processor, 0
    for request, answer in zip(requests, answers, strict=True):
        messages = engine.family.messages(request.prompt)
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[request.image]], return_tensors="pt")
        output = engine.model.generate(
            **inputs, max_new_tokens=24, do_sample=False, suppress_tokens=engine.suppress_ids
        )[0, inputs["input_ids"].shape[1] :].tolist()
        stops = [index for index, token in enumerate(output) if token in engine.eos_ids]
        expected = output[: stops[0]] if stops else output
        ended += bool(stops)
        assert answer.raw_answer == "<think>\n" + processor.tokenizer.decode(expected)
        assert answer.finish_reason == ("stop" if stops else "length")
        assert answer.prompt_tokens == inputs["input_ids"].shape[1]
        assert answer.reasoning_tokens + answer.answer_tokens == len(expected)
    assert len({answer.raw_answer for answer in answers}) > 3  # or the test would say nothing


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_with_and_without_vision_cache_and_penalty_answers_equal_generate(engine, penalty):
    sampling, requests = replace(GREEDY, repetition_penalty=penalty), requests_of(4)
    model, processor = tiny_qwen()
    uncached = TransformersEngine(
        model, "qwen3-vl", processor=processor, device="cpu", cache_vision=False
    )
    answers = list(uncached.answer(requests, sampling))
    timeless = [
        replace(answer, latency_ms=None, first_token_ms=None)
        for answer in engine.answer(requests, sampling)
    ]
    assert [replace(answer, latency_ms=None, first_token_ms=None) for answer in answers] == timeless
    text = processor.apply_chat_template(
        engine.family.messages(requests[1].prompt), tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[[requests[1].image]], return_tensors="pt")
    output = model.generate(
        **inputs,
        max_new_tokens=12,
        do_sample=False,
        suppress_tokens=engine.suppress_ids,
        repetition_penalty=penalty,
    )[0, inputs["input_ids"].shape[1] :].tolist()
    expected = processor.tokenizer.decode(
        [token for token in output if token not in engine.eos_ids]
    )
    assert answers[1].raw_answer == "<think>\n" + expected


def test_internvl_s_padded_batches_equal_generate_one_by_one():
    """A family with one-dimensional positions and a vision tower that nobody remembers."""
    model, processor = tiny_internvl()
    engine = TransformersEngine(model, "internvl-3", processor=processor, device="cpu")
    requests = requests_of(3)
    for request, answer in zip(requests, engine.answer(requests, GREEDY), strict=True):
        text = processor.apply_chat_template(
            engine.family.messages(request.prompt), tokenize=False, add_generation_prompt=True
        )
        inputs = processor(text=[text], images=[[request.image]], return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=12,
            do_sample=False,
            suppress_tokens=engine.suppress_ids or None,
        )[0, inputs["input_ids"].shape[1] :].tolist()
        expected = processor.tokenizer.decode(
            [token for token in output if token not in engine.eos_ids]
        )
        assert answer.error is None and answer.raw_answer.endswith(expected) and expected


def test_rows_that_end_early_leave_the_batch_and_do_not_change_the_others(engine, monkeypatch):
    requests = requests_of(4)
    # let tokens in the middle of three of the four answers count as an end, so that the batch
    # shrinks
    byte_ids = engine.processor.tokenizer
    answers = [next(iter(engine.answer([request], GREEDY))) for request in requests[:3]]
    tokens = [
        byte_ids(answer.raw_answer.removeprefix("<think>\n"))["input_ids"] for answer in answers
    ]
    ends = {ids[4 + number] for number, ids in enumerate(tokens)}
    monkeypatch.setattr(engine, "eos_ids", engine.eos_ids | ends)
    expected = [next(iter(engine.answer([request], GREEDY))) for request in requests]
    together = list(engine.answer(requests, GREEDY))
    assert [a.raw_answer for a in together] == [a.raw_answer for a in expected]
    assert [a.finish_reason for a in together] == [a.finish_reason for a in expected]
    assert "stop" in {a.finish_reason for a in together}


def test_vision_placeholders_are_never_sampled(engine):
    hot = replace(GREEDY, temperature=50.0, top_k=None, max_new_tokens=40)
    text = "".join(answer.raw_answer for answer in engine.answer(requests_of(4), hot))
    assert (
        "<|image_pad|>" not in text
        and "<|video_pad|>" not in text
        and "<|vision_start|>" not in text
    )


def test_equal_seeds_give_equal_answers_and_other_seeds_others(engine, monkeypatch):
    warm = replace(GREEDY, temperature=1.0, top_p=0.9, top_k=50)
    first = [answer.raw_answer for answer in engine.answer(requests_of(3), warm)]
    assert [answer.raw_answer for answer in engine.answer(requests_of(3), warm)] == first
    monkeypatch.setattr(engine, "seed", 1)
    assert [answer.raw_answer for answer in engine.answer(requests_of(3), warm)] != first


def test_a_bad_request_does_not_affect_the_others_of_its_batch(engine, monkeypatch):
    requests, decode = requests_of(4), engine._decode

    def decode_or_fail(batch, *args):
        if any(request.prompt == requests[2].prompt for request in batch):
            raise RuntimeError("out of memory")
        return decode(batch, *args)

    monkeypatch.setattr(engine, "_decode", decode_or_fail)
    answers = list(engine.answer(requests, GREEDY))
    assert [answer.error is None for answer in answers] == [True, True, False, True]
    assert "out of memory" in answers[2].error


def test_answering_leaves_no_gradients(engine):
    list(engine.answer(requests_of(1), GREEDY))
    assert (
        all(parameter.grad is None for parameter in engine.model.parameters())
        and torch.is_grad_enabled()
    )


def test_an_answer_that_was_begun_is_continued(engine):
    [request] = requests_of(1)
    [whole] = engine.answer([request], GREEDY)
    [start] = engine.answer([request], replace(GREEDY, max_new_tokens=1))
    [rest] = engine.answer([replace(request, begun="looking")], GREEDY)
    assert rest.raw_answer.startswith("<think>\nlooking") and whole.raw_answer.startswith(
        start.raw_answer
    )
    assert rest.prompt_tokens == whole.prompt_tokens + len("looking")


@pytest.mark.parametrize("reasoning", [True, False], ids=["free", "bound"])
def test_text_arrives_token_by_token_and_ends_as_the_answer(engine, reasoning):
    """Who watches sees growing texts; who does not watch is answered the same."""
    seen = []
    requests = requests_of(3)
    watched = [requests[0], replace(requests[1], on_text=seen.append), requests[2]]
    plain = list(engine.answer(requests, GREEDY, reasoning=reasoning))
    answers = list(engine.answer(watched, GREEDY, reasoning=reasoning))
    assert [a.raw_answer for a in answers] == [a.raw_answer for a in plain]
    assert seen[-1] == answers[1].raw_answer
    assert all(b.startswith(a) for a, b in zip(seen, seen[1:], strict=False))
    assert len(seen) == answers[1].reasoning_tokens + answers[1].answer_tokens


class Stop(Exception):
    pass


def test_who_watches_can_end_an_answer(engine):
    seen = []

    def stop(text):
        seen.append(text)
        raise Stop

    [request] = requests_of(1)
    with pytest.raises(Stop):
        list(engine.answer([replace(request, on_text=stop)], GREEDY))
    assert len(seen) == 1
    [answer] = engine.answer([request], GREEDY)  # and the engine goes on working
    assert answer.error is None


@pytest.mark.parametrize(
    ("tiny", "family"), [(tiny_qwen, "qwen3-vl"), (tiny_internvl, "internvl-3")]
)
def test_a_closed_engine_frees_its_model(tiny, family):
    model, processor = tiny()
    engine = TransformersEngine(model, family, processor=processor, device="cpu")
    list(engine.answer([Request(Image.new("RGB", (64, 64)), "find")], GREEDY))
    alive = weakref.ref(model)
    del model
    engine.close()
    assert alive() is None
