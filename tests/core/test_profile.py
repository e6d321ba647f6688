"""Profiles: what the paper says is what they hold, and a slip of the pen is named."""

import json
import re
from pathlib import Path

import pytest
import yaml

from egm_lib import profile as profiles
from egm_lib.profile import ProfileError, load_profile, profile_names
from egm_lib.run import Run

PAPER = Path(__file__).parents[2] / "data" / "paper"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of profiles of the test's own, beside a copy of mini."""
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
        for section in ("sft", "grpo", "selection", "generation")
        for key in paper[section]
        if paper[section][key] != released[section][key]
    }
    assert differing == {
        "grpo.num_train_epochs",
        "grpo.max_completion_length",
        "grpo.ratio_level",
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
        ({"data": None}, ["odd.data", "expected a section"]),
        ({"models": {"small": {"family": "qwen"}}}, ["odd.models.small.family", "'qwen3-vl'"]),
    ],
)
def test_a_slip_is_named_with_its_place(folder, change, words):
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


def test_unknown_name_offers_the_nearest():
    with pytest.raises(ProfileError, match="no profile 'minni'. Did you mean 'mini'"):
        load_profile("minni")
    with pytest.raises(ProfileError, match="no profile 'mini-released'"):
        load_profile("mini-released")  # mini has no such variant


def test_extends_keeps_what_it_does_not_change():
    mini, full = load_profile("mini"), load_profile("mini-full")
    assert full.models == mini.models and full.generation == mini.generation
    assert full.seeds == (0, 1, 2) and full.grpo.max_minutes > mini.grpo.max_minutes


def test_every_value_of_a_paper_profile_is_beside_its_source():
    """A training or selection value in paper-qwen3vl-8b.yaml without a comment on its line has no
    witness.
    """
    text = (profiles.PROFILES_DIR / "paper-qwen3vl-8b.yaml").read_text()
    lines = text[text.index("\nsft:") : text.index("\ngeneration:")].splitlines()
    stated = [line for line in lines if re.match(r"\s+\w+: \S", line)]
    assert len(stated) > 30
    assert [line for line in stated if "#" not in line] == []


def test_paths_of_a_run():
    run = Run(load_profile("mini"), 3)
    assert run.root.parts[-3:] == ("data", "runs", "mini-3")
    assert (
        run.predictions("small-egm", "refcoco+_testA")
        == run.root / "predictions/small-egm/refcoco+_testA.jsonl"
    )
    assert run.checkpoint("amodal", "small-sft") == run.root / "checkpoints/amodal/small-sft"


def test_a_hub_id_is_left_alone_and_a_folder_made_absolute():
    assert load_profile("paper-qwen3vl-8b").models.small.location == "Qwen/Qwen3-VL-8B-Thinking"
    assert Path(load_profile("mini").models.small.location).is_absolute()


def test_command_line(capsys):
    assert profiles.main(["paper-internvl3-8b"]) == 0
    assert json.loads(capsys.readouterr().out)["grpo"]["entropy_coef"] == 0.01
    assert profiles.main(["nothing-like-it"]) == 2
    assert "There is no profile" in capsys.readouterr().err
