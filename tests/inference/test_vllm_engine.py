"""The vLLM engine on a stand-in for vLLM; test_vllm.py runs vLLM itself."""

import contextlib
import sys
from types import ModuleType, SimpleNamespace

from PIL import Image

from egm_lib.files import project_root
from egm_lib.inference.engine import Request
from egm_lib.inference.loading import load_processor
from egm_lib.inference.vllm_engine import VLLMEngine
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES

MINI = project_root() / "data/mini/small"
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=8, repetition_penalty=1.0)


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


def test_closing_ends_the_engine_core_though_something_still_holds_it(monkeypatch):
    """As an exception does that one of vLLM's modules keeps: the next engine needs the GPU."""

    class Core:
        running = True

        def shutdown(self):
            self.running = False

    engine = fake_vllm(monkeypatch, [])
    core = Core()
    engine.llm = held = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))
    with contextlib.closing(engine):
        assert core.running
    assert held.llm_engine.engine_core is core and not core.running
    assert not hasattr(engine, "llm")
