"""Profiles hold what the paper says, and a mistake in one is named with its place."""

import json
import re
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import yaml

from egm_lib import profile as profiles
from egm_lib.profile import ProfileError, generation_of, load_profile, profile_names

SIZES = ("small", "large")
PAPER = Path(__file__).parents[2] / "data" / "paper"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of profiles for a test, with a copy of mini."""
    (tmp_path / "mini.yaml").write_text((profiles.PROFILES_DIR / "mini.yaml").read_text())
    monkeypatch.setattr(profiles, "PROFILES_DIR", tmp_path)
    load_profile.cache_clear()
    yield tmp_path
    load_profile.cache_clear()


def test_every_profile_and_variant_loads():
    names = profile_names()
    assert {
        "smoke",
        "mini",
        "mini-full",
        "paper-qwen3vl-8b-released",
        "paper-internvl3-1b-amodal",
    } <= set(names)
    digests = {load_profile(name).digest for name in names}
    assert len(digests) == len(names)


@pytest.mark.parametrize(
    "name, column", [("paper-qwen3vl-8b", 0), ("paper-qwen3vl-2b", 0), ("paper-internvl3-1b", 1)]
)
def test_paper_profiles_hold_table_6(name, column):
    grpo = load_profile(name).as_dict()["grpo"]
    rows = json.loads((PAPER / "table6.json").read_text())["rows"]
    stated = {row["key"]: row["values"][column] for row in rows if row["key"] in grpo}
    assert len(stated) >= 10
    stated["top_k"] = None if stated.get("top_k") == -1 else stated.get("top_k")
    assert {key: grpo[key] for key in stated} == stated


def test_global_batches_are_the_papers():
    for name in profile_names():
        profile = load_profile(name)
        if name.startswith("paper"):
            sft = profile.sft
            batch = (
                sft.per_device_train_batch_size
                * sft.gradient_accumulation_steps
                * profile.launch.num_processes
            )
            assert batch == 128, name
        rows = profile.grpo.prompts_per_step * profile.grpo.num_generations
        assert (
            rows % (profile.grpo.per_device_train_batch_size * profile.launch.num_processes) == 0
        ), name


def test_released_differs_only_where_the_scripts_do():
    paper, released = (
        load_profile(f"paper-qwen3vl-8b{tail}").as_dict() for tail in ("", "-released")
    )
    differing = {
        f"{section}.{key}"
        for section in ("sft", "grpo", "selection", "generation", "evaluation")
        for key in paper[section]
        if paper[section][key] != released[section][key]
    }
    assert differing == {
        "grpo.num_train_epochs",
        "grpo.max_completion_length",
        "grpo.ratio_level",
        "grpo.prompt",
        "evaluation.prompt",
        "selection.easy",
    }


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"grpo": {"num_generation": 8}},
            ["odd.grpo", "num_generation", "Did you mean 'num_generations'"],
        ),
        ({"grop": {}}, ["odd:", "'grop'", "'grpo'"]),
        ({"grpo": {"ratio_level": "tokens"}}, ["odd.grpo.ratio_level", "'tokens'", "'token'"]),
        ({"sft": {"learning_rate": "1e-5"}}, ["odd.sft.learning_rate", "expected float", "1.0e-5"]),
        ({"sft": {"max_steps": 2.5}}, ["odd.sft.max_steps", "expected int"]),
        ({"seeds": 3}, ["odd.seeds", "expected a list"]),
        ({"seeds": []}, ["odd.seeds", "at least one"]),
        ({"tasks": []}, ["odd.tasks", "at least one"]),
        ({"sft": {"learning_rate": float("nan")}}, ["odd.sft.learning_rate", "finite"]),
        ({"data": None}, ["odd.data", "expected a section"]),
        ({"grpo": {"prompt": "authors"}}, ["odd.grpo.prompt", "'authors'", "'authors-sft'"]),
        ({"evaluation": {"prompt": "qwen-refcoco"}}, ["odd.evaluation.prompt", "'amodal'"]),
        (
            {
                "tasks": ["vanilla"],
                "evaluation": {"prompt": "qwen-refcoco"},
                "models": {"large": {"family": "internvl-3"}},
            },
            ["odd.evaluation.prompt", "internvl-3", "authors-eval"],
        ),
        ({"generation": {"extra_body": ["a"]}}, ["odd.generation.extra_body", "expected fields"]),
        ({"generation": {"extra_body": {"a": float("nan")}}}, ["generation.extra_body", "JSON"]),
        ({"generation": {"extra_body": {"a": date(2026, 1, 1)}}}, ["extra_body", "JSON"]),
        ({"generation": {"extra_body": {1: 2}}}, ["odd.generation.extra_body: 1 is no field"]),
        # Another model's answers would be filed under this one's name
        ({"generation": {"extra_body": {"model": "b"}}}, ["odd.generation.extra_body: 'model'"]),
        # The budget counts on the limit
        ({"generation": {"extra_body": {"max_tokens": None}}}, ["extra_body: 'max_tokens'"]),
        ({"curation": {"teacher": {"extra_body": {"n": 4}}}}, ["teacher.extra_body: 'n'"]),
        ({"models": {"small": {"family": "qwen"}}}, ["odd.models.small.family", "'qwen3-vl'"]),
    ],
)
def test_a_mistake_is_named_with_its_place(folder, change, words):
    (folder / "odd.yaml").write_text(yaml.safe_dump({"extends": "mini", **change}))
    with pytest.raises(ProfileError) as error:
        load_profile("odd")
    for word in words:
        assert word in str(error.value)


def test_a_missing_value_is_named(folder):
    values = yaml.safe_load((folder / "mini.yaml").read_text())
    del values["grpo"]["beta"]
    (folder / "odd.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ProfileError, match=r"odd\.grpo: 'beta' is missing"):
        load_profile("odd")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "found nothing"),
        (b"- a\n- b\n", "found list"),
        (b"mini", "found str"),
        (b"a: [1, 2", "not valid YAML"),
        (b"seeds: [2024-99-99]", "not valid YAML"),  # no date, which PyYAML reports otherwise
        (b"[" * 5000, "not valid YAML"),
        ("title: é".encode("utf-16"), "not UTF-8"),
        ("title: é".encode("latin-1"), "not UTF-8"),
        (b"extends: 3", "odd.extends: expected a profile's name, got 3"),
        (b"extends: odd", "extends itself: odd -> odd"),
        (b"extends: other", "extends itself: odd -> other -> odd"),
        (b"extends: minni", "There is no profile 'minni' (odd extends it). Did you mean 'mini'"),
        (b"extends: odd-small\nvariants: {small: {}}", "extends itself: odd -> odd"),
        (b"extends: mini\nvariants: 3", "odd.variants: expected a section for each variant"),
        (b"extends: mini\nvariants: {small: 3}", "odd.variants: expected a section"),
        (b"extends: mini\nvariants: [released]", "has no variant 'released'. Known: amodal."),
    ],
)
def test_a_file_that_is_no_profile_is_one_sentence(folder, content, reason):
    (folder / "odd.yaml").write_bytes(content)
    (folder / "other.yaml").write_text("extends: odd")
    with pytest.raises(ProfileError) as caught:
        load_profile("odd")
    assert reason in str(caught.value) and "odd" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {"mini", "mini-amodal", "odd"} <= set(profile_names())  # the others are still found


def test_a_profile_with_a_byte_order_mark_is_read(folder):
    (folder / "odd.yaml").write_bytes(b"\xef\xbb\xbfextends: mini\ntitle: odd\n")
    assert load_profile("odd").title == "odd"


def test_variants_are_not_inherited_but_may_be_taken_over_by_name(folder):
    (folder / "base.yaml").write_text(
        "extends: mini\nvariants:\n  long: {sft: {max_minutes: 9}}\n  short: {seeds: [1]}\n"
    )
    (folder / "plain.yaml").write_text("extends: base\nseeds: [7]\n")
    (folder / "chosen.yaml").write_text("extends: base\nseeds: [7]\nvariants: [long]\n")
    (folder / "two-parts.yaml").write_text("extends: mini\nvariants:\n  no-kl: {seeds: [3]}\n")
    assert load_profile("two-parts-no-kl").seeds == (3,)
    names = set(profile_names())
    assert {"base-long", "base-short", "chosen-long", "two-parts-no-kl"} <= names
    assert not {"plain-long", "plain-short", "chosen-short", "base-amodal"} & names
    assert load_profile("chosen-long").sft.max_minutes == 9
    assert load_profile("chosen-long").seeds == (7,)
    for name in ("plain-long", "chosen-short"):
        with pytest.raises(ProfileError, match=f"There is no profile '{name}'"):
            load_profile(name)


def test_an_evaluation_profile_has_no_variants_of_the_training_that_it_extends():
    names = profile_names()
    assert not [name for name in names if re.fullmatch(r"eval-.*-(amodal|released)", name)]


@pytest.mark.parametrize("task", ["vanilla", "amodal"])
def test_a_profile_may_have_one_task_only(folder, task):
    (folder / "odd.yaml").write_text(f"extends: mini\ntasks: [{task}]\n")
    assert load_profile("odd").tasks == (task,)


def test_prompts_are_the_papers_unless_a_profile_says_otherwise():
    """The authors' RL data and evaluation have another prompt than the paper and their SFT data."""
    for name in profile_names():
        profile = load_profile(name)
        prompts = [profile.sft.prompt, profile.grpo.prompt, profile.evaluation.prompt]
        if name.startswith("paper-qwen3vl") and name.endswith("-released"):
            assert prompts == ["authors-sft", "authors-eval", "authors-eval"], name
        elif name.startswith("eval-egm"):
            assert prompts[2] == "authors-eval", name
        else:
            assert prompts == ["authors-sft"] * 3, name


def test_an_unknown_name_suggests_the_nearest_one():
    with pytest.raises(ProfileError, match="no profile 'minni'. Did you mean 'mini'"):
        load_profile("minni")
    with pytest.raises(ProfileError, match="no profile 'mini-released'"):
        load_profile("mini-released")  # mini has no such variant


def test_a_third_size_is_a_base_where_a_profile_states_one():
    mini, paper = load_profile("mini").models, load_profile("paper-qwen3vl-8b").models
    assert mini.bases == ("small-base", "large-base", "huge-base")
    assert mini.named("huge-base@prompt-authors-eval") is mini.huge
    assert paper.bases == ("small-base", "large-base") and paper.named("huge-base") is None
    assert list(paper.by_role()) == ["small", "large", "reference"]


def test_extends_keeps_what_it_does_not_change():
    mini, full = load_profile("mini"), load_profile("mini-full")
    assert full.models == mini.models and full.generation == mini.generation
    assert full.seeds == (0, 1, 2) and full.grpo.max_steps > mini.grpo.max_steps


@pytest.mark.parametrize("name", ["mini", "mini-full", "mini-uniform", "smoke"])
def test_the_miniatures_trainings_end_by_steps(name):
    """Minutes would make the results depend on the machine and on what else it does."""
    profile = load_profile(name)
    assert profile.sft.max_minutes is None and profile.grpo.max_minutes is None
    assert profile.grpo.max_steps


def test_the_two_arms_of_the_experiment_differ_in_the_teacher_alone():
    varied, uniform = (load_profile(name).as_dict() for name in ("mini-full", "mini-uniform"))
    for values, name in ((varied, "mini-full"), (uniform, "mini-uniform")):
        ways = values["curation"]["teacher"].pop("extra_body")["ways"]
        assert sum(ways.values()) == pytest.approx(1) and (ways["worked"] == 1) == (
            name == "mini-uniform"
        )
    differing = {key for key in varied if varied[key] != uniform[key]}
    assert differing == {"name", "title", "tasks", "controls"}


def test_every_value_of_a_paper_profile_is_beside_its_source():
    """Each line of training or selection in paper-qwen3vl-8b.yaml has a comment with its source."""
    text = (profiles.PROFILES_DIR / "paper-qwen3vl-8b.yaml").read_text()
    lines = text[text.index("\nsft:") : text.index("\ngeneration:")].splitlines()
    stated = [line for line in lines if re.match(r"\s+\w+: \S", line)]
    assert len(stated) > 30
    assert [line for line in stated if "#" not in line] == []


def test_a_hub_id_is_left_alone_and_a_folder_made_absolute():
    assert load_profile("paper-qwen3vl-8b").models.small.location == "Qwen/Qwen3-VL-8B-Thinking"
    assert Path(load_profile("mini").models.small.location).is_absolute()


def test_command_line(capsys):
    assert profiles.main(["paper-internvl3-8b"]) == 0
    assert json.loads(capsys.readouterr().out)["grpo"]["entropy_coef"] == 0.01
    assert profiles.main(["nothing-like-it"]) == 2
    assert "There is no profile" in capsys.readouterr().err


def test_a_model_states_how_it_is_run_and_the_rest_is_of_all():
    profile = load_profile("paper-qwen3vl-8b")
    small, large = (generation_of(profile, profile.models.named(f"{n}-base")) for n in SIZES)
    assert (small.engine, small.tensor_parallel) == ("vllm", 1)
    assert large == replace(small, tensor_parallel=8)
    url = "http://localhost:8000/v1"
    served = generation_of(profile, replace(profile.models.large, base_url=url))
    assert (served.engine, served.base_url) == ("openai", url)
    stated = replace(profile.models.large, engine="transformers", max_model_len=5000)
    assert generation_of(profile, stated) == replace(
        large, engine="transformers", max_model_len=5000
    )
    endpoint = load_profile("eval-qwen3vl-235b")
    assert generation_of(endpoint, endpoint.models.large).engine == "openai"


@pytest.mark.parametrize("name", [name for name in profile_names() if "internvl3" in name])
def test_small_internvl_models_stay_on_one_gpu(name):
    """14 and 12 attention heads do not divide among eight."""
    profile = load_profile(name)
    assert generation_of(profile, profile.models.small).tensor_parallel == 1


def test_names_of_a_run_mean_the_checkpoints_of_the_profile():
    models, published = load_profile("mini").models, load_profile("eval-egm-8b").models
    assert models.named("small-base") is models.small and models.named("small-sft") is None
    assert models.named("small-egm") is None
    for name in ("small-egm", "small-egm-no-reasoning", "small-egm@budget-16"):
        assert published.named(name) is published.egm


@pytest.mark.parametrize(
    "change, words",
    [
        ({"launch": {"nodes": 3, "num_processes": 8}}, "8 processes do not divide among 3 nodes"),
        ({"launch": {"nodes": 2, "num_processes": 2}}, "several nodes need an accelerate_config"),
        ({"launch": {"prediction_workers": 0}}, "prediction_workers: expected at least 1"),
        ({"models": {"small": {"tensor_parallel": 0}}}, "models.small: tensor_parallel"),
        ({"models": {"large": {"gpu_memory_utilization": 1.5}}}, "models.large: gpu_memory"),
        ({"generation": {"gpu_memory_utilization": 0.0}}, "gpu_memory_utilization must be a share"),
        ({"models": {"small": {"engine": "tgi"}}}, "'tgi' is not one of"),
    ],
)
def test_numbers_of_gpus_and_processes_that_cannot_be_are_refused(folder, change, words):
    (folder / "odd.yaml").write_text(yaml.safe_dump({"extends": "mini", **change}))
    with pytest.raises(ProfileError, match=re.escape(words)):
        load_profile("odd")
