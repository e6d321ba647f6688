"""A model that cannot run on its GPUs is refused before its weights are read."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, InternVLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from egm_lib.files import project_root
from egm_lib.inference import fit, transformers_engine, vllm_engine
from egm_lib.inference.fit import FitError, check_fit, check_heads, check_memory, num_parameters
from egm_lib.inference.from_profile import make_engine
from egm_lib.profile import generation_of, load_profile

MINI = project_root() / "data/mini/small"
# Published: https://huggingface.co/OpenGVLab/InternVL3-1B-hf, .../InternVL3-2B-hf, Qwen's 235B
INTERNVL_1B = {"num_attention_heads": 14, "num_key_value_heads": 2}
INTERNVL_2B = {"num_attention_heads": 12, "num_key_value_heads": 2}
QWEN_235B = {
    "hidden_size": 4096,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1536,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}

# Published: https://huggingface.co/OpenGVLab/InternVL3_5-241B-A28B-HF/blob/main/config.json
INTERN_6B = {
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
}


def heads(text: dict):
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(**text))


@pytest.mark.parametrize(
    ("text", "fitting", "refused"),
    [
        (INTERNVL_1B, (1, 2, 14), (4, 7, 8)),
        (INTERNVL_2B, (1, 2, 4, 6, 12), (3, 8)),
        (QWEN_235B, (1, 2, 4, 8, 16), (3, 6)),
    ],
)
def test_heads_divide_among_the_gpus_or_are_refused(text, fitting, refused):
    for parallel in fitting:
        check_heads("m", heads(text), parallel)
    for parallel in refused:
        with pytest.raises(FitError, match=f"tensor_parallel = {parallel} GPUs. Possible are 1, 2"):
            check_heads("m", heads(text), parallel)


def test_parameters_are_those_of_the_checkpoint():
    """Counted on the meta device, against the tensors that are stored."""
    from safetensors import safe_open

    with safe_open(MINI / "model.safetensors", "pt") as stored:
        shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    assert num_parameters(AutoConfig.from_pretrained(MINI)) == sum(
        int(torch.tensor(shape).prod()) for shape in shapes
    )


def test_a_235b_needs_eight_gpus_and_not_one():
    config = Qwen3VLMoeConfig(text_config=QWEN_235B)
    total = num_parameters(config)
    assert 234e9 < total < 237e9  # as its name says
    check_memory("235B", config, "bfloat16", parallel=8, memory_gib=79.0, share=0.9)
    for parallel in (1, 4):
        with pytest.raises(FitError, match=r"439 GiB of weights .* Raise its tensor_parallel"):
            check_memory("235B", config, "bfloat16", parallel=parallel, memory_gib=79.0, share=0.9)
    config.quantization_config = {"quant_method": "fp8"}  # smaller than the dtype says
    check_memory("235B", config, "bfloat16", parallel=4, memory_gib=79.0)


def machine(monkeypatch, gpus: int, memory_gib: float) -> None:
    properties = SimpleNamespace(total_memory=memory_gib * fit.GIB)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.parametrize(
    ("name", "role", "gpus", "words"),
    [
        ("paper-qwen3vl-8b", "large", 8, None),
        ("paper-qwen3vl-8b", "large", 4, "4 are visible"),
        ("paper-qwen3vl-8b", "small", 1, None),
        ("paper-qwen3vl-8b", "small", 0, None),
        ("paper-internvl3-8b", "reference", 8, None),
        ("paper-internvl3-8b", "reference", 4, "4 are visible"),
    ],
)
def test_the_paper_s_models_are_held_against_the_gpus(monkeypatch, name, role, gpus, words):
    configs = {
        "Qwen/Qwen3-VL-235B-A22B-Instruct": Qwen3VLMoeConfig(text_config=QWEN_235B),
        "Qwen/Qwen3-VL-8B-Thinking": Qwen3VLConfig(),
        "OpenGVLab/InternVL3_5-241B-A28B-HF": InternVLConfig(
            text_config={"model_type": "qwen3_moe"} | QWEN_235B, vision_config=INTERN_6B
        ),
    }
    monkeypatch.setattr(fit, "load_config", lambda place, revision: configs[str(place)])
    machine(monkeypatch, gpus, 79.0)
    profile = load_profile(name)
    model = getattr(profile.models, role)
    if words is None:
        check_fit(model, generation_of(profile, model))
        return
    with pytest.raises(FitError, match=words):
        check_fit(model, generation_of(profile, model))


def test_transformers_runs_one_copy_on_one_gpu(monkeypatch):
    """Its model is not cut over GPUs, whatever tensor_parallel says."""
    machine(monkeypatch, 8, 0.001)
    monkeypatch.setattr(fit, "load_config", lambda place, revision: InternVLConfig())
    profile = load_profile("mini")
    with pytest.raises(FitError, match="tensor_parallel = 1"):
        check_fit(profile.models.small, generation_of(profile, profile.models.small))


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(monkeypatch, engine):
    machine(monkeypatch, 1, 0.001)
    for kind in (transformers_engine.TransformersEngine, vllm_engine.VLLMEngine):
        monkeypatch.setattr(kind, "__init__", lambda *args, **options: pytest.fail("loaded"))
    profile = load_profile("mini")
    profile = replace(profile, generation=replace(profile.generation, engine=engine))
    with pytest.raises(FitError, match="GiB of weights"):
        make_engine(profile, profile.models.small)


# Published: https://huggingface.co/Qwen/Qwen3-VL-8B-Thinking/blob/main/config.json
QWEN_8B = {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 262144,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("memory_gib", "max_model_len", "fits"),
    [
        (22.1, None, False),  # an A10G or an L4 of "24 GB"
        (23.6, None, False),  # an RTX 4090
        (31.4, None, True),  # "32 GB", as the profile says
        (22.1, 8192, True),
    ],
)
def test_vllm_needs_room_for_a_whole_context_too(monkeypatch, memory_gib, max_model_len, fits):
    """A token has 36 layers x 8 heads x 128 x (key, value) x 2 bytes: 4.5 GiB for 32,768."""
    config = Qwen3VLConfig(
        text_config=QWEN_8B,
        vision_config={"hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
    )
    monkeypatch.setattr(fit, "load_config", lambda place, revision: config)
    machine(monkeypatch, 1, memory_gib)
    profile = load_profile("eval-egm-8b")
    model = replace(profile.models.egm, max_model_len=max_model_len)
    stated = generation_of(profile, model)
    assert stated.engine == "vllm" and stated.gpu_memory_utilization == 0.9
    if fits:
        check_fit(model, stated)
        return
    with pytest.raises(FitError, match=r"16 GiB of weights .*, 4\.5 GiB for a context of 32,768 "):
        check_fit(model, stated)
