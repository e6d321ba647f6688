"""An engine gets what the profile says of it."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
from tiny_qwen import tiny_qwen

from egm_lib.inference import vllm_engine
from egm_lib.inference.from_profile import make_engine
from egm_lib.inference.openai_engine import OpenAIEngine
from egm_lib.profile import ProfileError, load_profile


def test_a_service_s_key_comes_from_the_variable_that_the_profile_names(monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-another-company")
    monkeypatch.delenv("HERE_API_KEY", raising=False)
    profile = load_profile("eval-qwen3vl-235b")
    away = replace(
        profile.generation, base_url="https://example.invalid/v1", api_key_env="HERE_API_KEY"
    )
    with pytest.raises(
        ProfileError, match=r"no key for https://example\.invalid/v1: set .* HERE_API_KEY"
    ):
        make_engine(replace(profile, generation=away), profile.models.large)
    monkeypatch.setenv("HERE_API_KEY", "its-own-key")
    assert (
        make_engine(replace(profile, generation=away), profile.models.large).client.api_key
        == "its-own-key"
    )


def test_vllm_gets_the_profile_s_gpus_and_the_model_s_revision(monkeypatch):
    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda *args, **options: (args, options))
    profile = load_profile("eval-egm-8b")
    profile = replace(
        profile, generation=replace(profile.generation, engine="vllm", tensor_parallel=2)
    )
    (path, family), options = make_engine(profile, replace(profile.models.small, revision="abc"))
    assert family == "qwen3-vl" and options["tensor_parallel"] == 2 and options["revision"] == "abc"


def test_a_model_with_an_address_of_its_own_is_asked_there(monkeypatch):
    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda *args, **options: options)
    profile = load_profile("paper-qwen3vl-8b")
    options = make_engine(profile, profile.models.large)
    assert options["tensor_parallel"] == 8
    served = replace(profile.models.large, base_url="http://127.0.0.1:8000/v1")
    engine = make_engine(profile, served)
    assert isinstance(engine, OpenAIEngine) and engine.base_url == served.base_url
    assert engine.model == "Qwen/Qwen3-VL-235B-A22B-Instruct"
    assert make_engine(profile, profile.models.small)["tensor_parallel"] == 1
    stated = replace(profile.models.small, max_model_len=4096, gpu_memory_utilization=0.5)
    options = make_engine(profile, stated)
    assert (options["max_model_len"], options["gpu_memory_utilization"]) == (4096, 0.5)


def test_every_option_of_a_service_is_a_key_of_the_profile(monkeypatch):
    """A service may want another name for the limit, more fields, or fewer."""
    profile = load_profile("paper-qwen3vl-8b")
    stated = {
        "engine": "openai",
        "base_url": "http://127.0.0.1:8000/v1",
        "opens_reasoning": True,
        "token_limit": "max_completion_tokens",
        "extra_body": {"top_k": None, "repetition_penalty": None, "reasoning": {"effort": "low"}},
    }
    profile = replace(profile, generation=replace(profile.generation, **stated))
    engine = make_engine(profile, profile.models.small)
    sent = {"temperature", "top_p", "max_completion_tokens", "seed", "reasoning"}
    assert set(engine.accepted.sent) == sent and engine.opener == "<think>\n"
    plain = replace(profile.generation, opens_reasoning=False, token_limit=None, extra_body={})
    engine = make_engine(replace(profile, generation=plain), profile.models.small)
    assert set(engine.accepted.sent) == {
        *("temperature", "top_p", "max_tokens", "seed", "top_k", "repetition_penalty"),
    }
    assert engine.opener == ""


def test_an_engine_for_latency_remembers_nothing(monkeypatch):
    """Neither prompts nor images: a repeated image would be answered faster than a new one."""
    vllm, given = ModuleType("vllm"), []
    vllm.LLM = lambda **options: given.append(options)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(
        "egm_lib.inference.vllm_engine.load_processor", lambda *args: tiny_qwen()[1]
    )
    profile = load_profile("mini")
    model = replace(profile.models.small, engine="vllm")
    for for_latency in (True, False):
        make_engine(profile, model, for_latency=for_latency)
    caches = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    assert caches.items() <= given[0].items() and not caches.keys() & given[1].keys()
    [plain, timed] = (make_engine(profile, profile.models.small, for_latency=on) for on in (0, 1))
    assert plain.cache_vision and not timed.cache_vision
