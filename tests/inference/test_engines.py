"""What the engines share: pixels, counts of reasoning tokens, closing, finish reasons of vLLM."""

import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tiny_internvl import tiny_internvl
from tiny_qwen import tiny_qwen

from egm_lib.errors import InputError
from egm_lib.files import project_root
from egm_lib.inference import loading
from egm_lib.inference import predict as predict_module
from egm_lib.inference.engine import Request, count_reasoning_tokens
from egm_lib.inference.loading import load_processor
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.inference.vllm_engine import VLLMEngine
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

MINI = project_root() / "data/mini/small"
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=8, repetition_penalty=1.0)


def num_pixels(processor, size: tuple[int, int]) -> int:
    images = processor.image_processor
    grid = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
    return int(grid.prod()) * images.patch_size**2


@pytest.mark.parametrize("limit", [1024, 2048, 4096])
def test_max_pixels_limits_and_never_enlarges(limit):
    """A side is rounded to whole tokens; the least is one token."""
    native, limited = load_processor(MINI, "qwen3-vl"), load_processor(MINI, "qwen3-vl", limit)
    for size in ((16, 16), (32, 16), (64, 64), (96, 64)):
        pixels = num_pixels(limited, size)
        assert pixels <= min(limit, num_pixels(native, size))
        if size[0] * size[1] <= limit:
            assert pixels <= size[0] * size[1]
    generous = load_processor(MINI, "qwen3-vl", 10**9)  # above the checkpoint's own limit
    assert generous.image_processor.size == native.image_processor.size


def test_max_pixels_is_refused_for_tiles(monkeypatch):
    monkeypatch.setattr(loading, "_processor", lambda *args: tiny_internvl()[1])
    with pytest.raises(InputError, match="set it to null"):
        load_processor("tiny", "internvl-3", 1024)


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


def fake_vllm(monkeypatch, finish_reasons) -> VLLMEngine:
    """A VLLMEngine whose vLLM gives one answer for each finish reason."""
    vllm, params = ModuleType("vllm"), ModuleType("vllm.sampling_params")
    vllm.SamplingParams = SimpleNamespace
    params.StructuredOutputsParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", params)
    outputs = [
        SimpleNamespace(
            prompt_token_ids=[1],
            outputs=[SimpleNamespace(token_ids=[0], text="[1, 2, 3, 4]", finish_reason=reason)],
        )
        for reason in finish_reasons
    ]
    engine = VLLMEngine.__new__(VLLMEngine)
    engine.family, engine.seed = FAMILIES["qwen3-vl"], 0
    engine.processor = load_processor(MINI, "qwen3-vl")
    engine.llm = SimpleNamespace(generate=lambda *args, **options: outputs)
    return engine


def test_vllm_s_other_finish_reasons_mark_their_rows(monkeypatch):
    reasons = ["stop", "abort", "length", "error", None]
    engine = fake_vllm(monkeypatch, reasons)
    requests = [Request(Image.new("RGB", (64, 64)), "find")] * len(reasons)
    answers = list(engine.answer(requests, GREEDY))
    finished = ["stop", "error", "length", "error", "error"]
    assert [answer.finish_reason for answer in answers] == finished
    assert [answer.error is None for answer in answers] == [name != "error" for name in finished]


def test_an_engine_is_closed_before_the_next_is_built(monkeypatch):
    """Two models do not fit one GPU."""
    events = []

    class Engine:
        def __init__(self, name):
            self.name = name
            events.append(f"open {name}")

        def close(self):
            events.append(f"close {self.name}")

    def fail_for_b(engine, *args):
        if engine.name == "b":
            raise RuntimeError("out of memory")

    names = iter("abc")
    monkeypatch.setattr(predict_module, "model_of", lambda *args: None)
    monkeypatch.setattr(predict_module, "make_engine", lambda *args, **more: Engine(next(names)))
    monkeypatch.setattr(predict_module, "_use_engine", fail_for_b)
    run = SimpleNamespace(profile=SimpleNamespace(tasks=("vanilla",)), seed=0)
    args = SimpleNamespace(model=["a", "b"], task=None, split=None, latency=False)
    monkeypatch.setattr(predict_module, "run_of", lambda args: run)
    with pytest.raises(RuntimeError, match="out of memory"):
        predict_module._predict_all(args)
    assert events == ["open a", "close a", "open b", "close b"]


@pytest.mark.parametrize(
    ("tiny", "family"), [(tiny_qwen, "qwen3-vl"), (tiny_internvl, "internvl-3")]
)
def test_a_closed_engine_lets_go_of_its_model(tiny, family):
    model, processor = tiny()
    engine = TransformersEngine(model, family, processor=processor, device="cpu")
    list(engine.answer([Request(Image.new("RGB", (64, 64)), "find")], GREEDY))
    alive = weakref.ref(model)
    del model
    engine.close()
    assert alive() is None
