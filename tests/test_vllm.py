"""vLLM on a CPU (`make test-vllm`): its answers are those of transformers, and a bound form binds."""

import json
import shutil

import pytest
import regex
from transformers import Qwen3VLVideoProcessor

from egm_lib.data import open_image
from egm_lib.engines import ANSWER_PATTERNS, Request, TransformersEngine, VLLMEngine
from egm_lib.mini.world import write_split
from egm_lib.profile import Sampling, project_root
from egm_lib.prompts import FAMILIES

pytestmark = pytest.mark.vllm

GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=32, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list[Request]:
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    write_split(folder, "validation.jsonl", 64)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    prompt = FAMILIES["qwen3-vl"].prompt
    return [Request(open_image(folder / row["image"]), prompt(row["expression"], "vanilla")) for row in rows]


@pytest.fixture(scope="module")
def engines(tmp_path_factory) -> tuple[VLLMEngine, TransformersEngine]:
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")
    model = tmp_path_factory.mktemp("small")
    shutil.copytree(project_root() / "data/mini/small", model, dirs_exist_ok=True)
    # vLLM builds Qwen's whole processor, and the miniature has no half for videos
    Qwen3VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2).save_pretrained(model)
    return VLLMEngine(str(model), "qwen3-vl", "float32"), TransformersEngine(str(model), "qwen3-vl", "float32", 16)


@pytest.mark.parametrize("reasoning", [True, False])
def test_greedy_answers_are_those_of_transformers(requests, engines, reasoning):
    ours, theirs = (list(engine.answer(requests, GREEDY, reasoning=reasoning)) for engine in engines)
    counts = ("raw_answer", "prompt_tokens", "reasoning_tokens", "answer_tokens", "finish_reason")
    assert len(ours) == 64 and len({answer.raw_answer for answer in theirs}) > 20  # it looks at the pictures
    for mine, reference in zip(ours, theirs, strict=True):
        assert [getattr(mine, name) for name in counts] == [getattr(reference, name) for name in counts]
        if not reasoning:
            answer = mine.raw_answer.rpartition("</think>\n\n")[2]
            assert regex.fullmatch(ANSWER_PATTERNS["qwen3-vl"], answer)
