"""An engine gets what the profile says of it."""

from dataclasses import replace

import pytest

from egm_lib.inference import from_profile
from egm_lib.inference.from_profile import make_engine
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
    monkeypatch.setattr(from_profile, "VLLMEngine", lambda *args, **options: (args, options))
    profile = load_profile("eval-egm-8b")
    profile = replace(
        profile, generation=replace(profile.generation, engine="vllm", tensor_parallel=2)
    )
    (path, family), options = make_engine(profile, replace(profile.models.small, revision="abc"))
    assert family == "qwen3-vl" and options["tensor_parallel"] == 2 and options["revision"] == "abc"
