"""vLLM on a CPU (`make test-vllm`) answers as transformers does, and samples what GRPO trains."""

import json
from dataclasses import replace

import pytest
import regex
import torch
from training_world import grpo_options, make_samples, store_model, stored

from egm_lib import grpo
from egm_lib.data import open_image
from egm_lib.files import project_root
from egm_lib.grpo import make_grpo_trainer, question_rows
from egm_lib.inference.answer_form import ANSWER_PATTERNS
from egm_lib.inference.engine import Request
from egm_lib.inference.transformers_engine import TransformersEngine
from egm_lib.inference.vllm_engine import VLLMEngine
from egm_lib.mini.world import write_split
from egm_lib.pipeline.rehearsal.cpu_ranks import keep_sampler_weights
from egm_lib.profile import Sampling
from egm_lib.prompts import FAMILIES
from egm_lib.training import grpo_trl
from egm_lib.training.checkpoints import train_to, work_folder
from egm_lib.training.grpo_trl import PlainGRPO
from egm_lib.training.model_setup import TrainingError

pytestmark = pytest.mark.vllm

MODEL, FAMILY = project_root() / "data/mini/small", FAMILIES["qwen3-vl"]
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=None, max_new_tokens=32, repetition_penalty=1.0)
QUARTER = 64 * 64  # px: an image shrunk to 16 tokens from 64


@pytest.fixture(scope="module", autouse=True)
def installed():
    pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm")


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> list[Request]:
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images").mkdir()
    write_split(folder, "validation.jsonl", 64)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return [
        Request(open_image(folder / row["image"]), FAMILY.prompt(row["expression"], "vanilla"))
        for row in rows
    ]


def engines_of(max_pixels: int | None = None) -> tuple[VLLMEngine, TransformersEngine]:
    return (
        VLLMEngine(str(MODEL), FAMILY.name, "float32", max_pixels=max_pixels),
        TransformersEngine(str(MODEL), FAMILY.name, "float32", 16, max_pixels=max_pixels),
    )


@pytest.fixture(scope="module")
def engines() -> tuple[VLLMEngine, TransformersEngine]:
    return engines_of()


@pytest.mark.parametrize("reasoning", [True, False])
def test_greedy_answers_are_those_of_transformers(requests, engines, reasoning):
    ours, theirs = (
        list(engine.answer(requests, GREEDY, reasoning=reasoning)) for engine in engines
    )
    counts = ("raw_answer", "prompt_tokens", "reasoning_tokens", "answer_tokens", "finish_reason")
    # It looks at the images
    assert len(ours) == 64 and len({answer.raw_answer for answer in theirs}) > 20
    for mine, reference in zip(ours, theirs, strict=True):
        assert [getattr(mine, name) for name in counts] == [
            getattr(reference, name) for name in counts
        ]
        if not reasoning:
            answer = mine.raw_answer.rpartition("</think>\n\n")[2]
            assert regex.fullmatch(ANSWER_PATTERNS["qwen3-vl"], answer)


def test_images_are_shrunk_as_the_profile_says(requests, engines):
    few = requests[:4]
    whole, ours, theirs = (
        [answer.prompt_tokens for answer in engine.answer(few, GREEDY)]
        for engine in (engines[1], *engines_of(QUARTER))
    )
    assert ours == theirs == [count - 48 for count in whole]


class Watched(PlainGRPO):
    """Compares trainer and sampler in every step, not in the first alone."""

    def _compute_loss(self, model, inputs):
        loss = super()._compute_loss(model, inputs)
        assert self.checked and not self.vllm_importance_sampling_correction  # Eq. 3 has none
        self.checked, self.vllm_importance_sampling_correction = False, True
        return loss


@pytest.fixture
def kept_weights(monkeypatch):
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    keep_sampler_weights()
    return utils


def make_trainer(place, family, tmp_path, images: int = 4, **changes) -> Watched:
    """Three steps at a rate that changes every weight."""
    samples = make_samples(tmp_path / "images", images=images, per_image=1)
    options = grpo_options(
        rollout="vllm-colocate", learning_rate=1e-2, max_steps=3, max_completion_length=32
    )
    return make_grpo_trainer(
        *stored(place, family.name),
        question_rows(samples, family, tmp_path / "images"),
        family,
        replace(options, **changes),
        work=work_folder(tmp_path / "egm"),
        log=tmp_path / "log.jsonl",
        groups=tmp_path / "groups.jsonl",
        seed=0,
    )


@pytest.fixture
def trainer(request, tmp_path, monkeypatch, kept_weights) -> Watched:
    """Of the miniature or a tiny InternVL-3; its vision tower is frozen."""
    monkeypatch.setattr(grpo, "PlainGRPO", Watched)
    family = getattr(request, "param", FAMILY)
    place = MODEL if family is FAMILY else store_model(tmp_path / "model", family.name)
    return make_trainer(place, family, tmp_path)


@pytest.fixture
def tower_trainer(tmp_path, monkeypatch, kept_weights) -> Watched:
    """Every step has the same two images, and trains the tower that reads them."""
    monkeypatch.setattr(grpo, "PlainGRPO", Watched)
    trained = {"freeze_vision": False, "freeze_merger": False}
    return make_trainer(MODEL, FAMILY, tmp_path, images=2, **trained)


@pytest.mark.parametrize("trainer", FAMILIES.values(), ids=list(FAMILIES), indirect=True)
def test_grpo_samples_from_the_weights_that_it_trains(trainer, requests, tmp_path, request):
    out = train_to(trainer, trainer.processing_class, tmp_path / "egm")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    # Tokens of images are not sampled; a random model gives one 1 in 270, so that the others are
    # as much likelier.
    assert max(line["sampling/sampling_logp_difference/mean"] for line in log[:3]) < 0.005
    # What was trained is started as it was written
    engine = VLLMEngine(str(out), request.node.callspec.id, "float32")
    assert len(list(engine.answer(requests[:2], GREEDY))) == 2


def test_grpo_stops_where_the_sampler_has_other_weights(trainer, monkeypatch):
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    with pytest.raises(TrainingError, match="disagree"):
        trainer.train()
    assert trainer.state.global_step == 1  # the first step's were the same


def test_the_sampler_reads_images_with_the_tower_that_was_trained(tower_trainer, tmp_path):
    tower_trainer.train()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert max(line["sampling/sampling_logp_difference/mean"] for line in log[:3]) < 0.005


def test_grpo_stops_where_the_sampler_has_image_features_of_old_weights(tower_trainer, monkeypatch):
    monkeypatch.setattr(grpo_trl, "reset_caches", lambda llm: None)
    with pytest.raises(TrainingError, match="disagree"):
        tower_trainer.train()
    assert tower_trainer.state.global_step == 1  # the first step read each image for the first time


def test_grpo_stops_where_the_sampler_sees_another_prompt(trainer, monkeypatch):
    monkeypatch.setattr(grpo_trl, "collapse_image_tokens", lambda ids, *_: list(ids))
    with pytest.raises(TrainingError, match="read a prompt of"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_cpu_a_sampler_keeps_the_weights_that_training_replaces(kept_weights, dtype):
    """vLLM drops them where it has packed them for the processor, if nothing is done."""
    layer = torch.nn.Linear(64, 128, dtype=dtype)
    kept_weights.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    input_B_H = torch.randn(2, 64, dtype=dtype)
    layer.weight.data.fill_(0.5)
    assert torch.equal(layer.cpu_linear(input_B_H, layer.weight, layer.bias), layer(input_B_H))
