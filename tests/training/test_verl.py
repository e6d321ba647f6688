"""The export to VeRL: rows of its schema, a reward that scores them, Table 6 under its names.

The last tests ask VeRL itself, and are skipped where `pip install verl` has not been run.
"""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from training_world import make_samples

from egm_lib.boxes import BoxFrame, convert
from egm_lib.data import write_samples
from egm_lib.profile import load_profile, profile_names
from egm_lib.prompts import FAMILIES
from egm_lib.reward import compute_score
from egm_lib.run import Run
from egm_lib.training.model_setup import TrainingError
from egm_lib.training.verl_export import _hydra, export, verl_overrides


@pytest.fixture
def exported(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "root", tmp_path / "run")
    run = Run(load_profile("paper-qwen3vl-8b"), 42)
    rows = make_samples(tmp_path / "images", images=2, per_image=1)
    for row in rows:
        del row["reasoning"]
        row |= {
            "image": str(tmp_path / "images" / row["image"]),
            "dataset": "refcoco",
            "split": "train",
            "image_id": row["image"],
            "flipped": False,
        }
    write_samples(run.samples("rl_vanilla"), rows)
    return export(run, "vanilla"), rows


def test_parquet_has_verl_s_columns_and_one_placeholder_a_image(exported):
    out, samples = exported
    rows = pq.read_table(out / "train.parquet").to_pylist()
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        assert {
            "data_source",
            "prompt",
            "images",
            "ability",
            "reward_model",
            "extra_info",
        } == row.keys()
        assert row["prompt"][0]["content"].count("<image>") == len(row["images"]) == 1
        # SFT's max_pixels is not RL's
        assert row["images"] == [{"image": f"file://{sample['image']}"}]
        # Arrow fills what a row lacks with None, and a reward takes it for given
        assert None not in row["extra_info"].values()
        assert row["extra_info"]["sample_id"] == sample["sample_id"]


def test_the_true_box_scores_one_through_verl_s_reward(exported):
    out, _ = exported
    for row in pq.read_table(out / "train.parquet").to_pylist():
        truth, info = row["reward_model"]["ground_truth"], row["extra_info"]
        answer = convert(truth, BoxFrame.PIXEL, BoxFrame.NORM_1000, (info["width"], info["height"]))
        text = f"here\n</think>\n\n{json.dumps([{'bbox_2d': answer, 'label': 'x'}])}"
        assert compute_score(row["data_source"], text, truth, info) == pytest.approx(1.0)
        assert compute_score(row["data_source"], "no box", truth, info) == 0.0


def test_overrides_are_table_6(exported):
    out, _ = exported
    lines = dict(line.split("=", 1) for line in (out / "overrides.txt").read_text().splitlines())
    expected = {
        "data.train_batch_size": "256",
        "actor_rollout_ref.rollout.n": "16",
        "actor_rollout_ref.actor.kl_loss_coef": "0.005",
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "actor_rollout_ref.actor.clip_ratio": "0.2",
        "actor_rollout_ref.actor.optim.lr": "3e-06",
        "actor_rollout_ref.actor.optim.lr_warmup_steps": "30",
        "actor_rollout_ref.actor.entropy_coeff": "0.0",
        "data.max_response_length": "1024",
        "trainer.total_epochs": "5",
        "actor_rollout_ref.rollout.temperature": "0.7",
        "actor_rollout_ref.rollout.top_p": "0.9",
        "actor_rollout_ref.rollout.top_k": "50",
        "actor_rollout_ref.actor.use_kl_loss": "true",
        "custom_reward_function.name": "compute_score",
        # The authors' budget of tokens, and this profile's context and sleeping vLLM
        "actor_rollout_ref.actor.use_dynamic_bsz": "true",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": "25600",
        "actor_rollout_ref.rollout.max_model_len": "5120",
        "actor_rollout_ref.rollout.free_cache_engine": "true",
    }
    assert expected.items() <= lines.items()
    assert all(
        line in (out / "run.sh").read_text()
        for line in ("data.train_batch_size=256", "verl.trainer.main_ppo")
    )


def test_the_released_preset_has_the_sequence_level_ratio(tmp_path):
    profile = load_profile("paper-qwen3vl-8b-released")
    overrides = verl_overrides(profile, 42, model=tmp_path, train=tmp_path / "t", out=tmp_path)
    assert overrides["actor_rollout_ref.actor.policy_loss.loss_mode"] == "gspo"
    assert overrides["trainer.total_epochs"] == 3


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("paper-")])
def test_prompt_and_answer_fit_into_the_context(name, tmp_path):
    profile = load_profile(name)
    overrides = verl_overrides(profile, 42, model=tmp_path, train=tmp_path / "t", out=tmp_path)
    context = overrides["actor_rollout_ref.rollout.max_model_len"]
    asked, answered = (overrides[f"data.max_{what}_length"] for what in ("prompt", "response"))
    assert asked + answered <= context == profile.grpo.max_model_len


def test_a_context_without_room_for_a_prompt_is_refused(tmp_path):
    base = load_profile("paper-qwen3vl-8b")
    profile = replace(base, grpo=replace(base.grpo, max_model_len=1024))
    with pytest.raises(TrainingError, match="no room for a prompt"):
        verl_overrides(profile, 42, model=tmp_path, train=tmp_path / "t", out=tmp_path)


@pytest.mark.parametrize("name", ["paper-qwen3vl-8b", "paper-internvl3-8b-released"])
def test_verl_s_own_configuration_takes_every_override(name, tmp_path):
    verl = pytest.importorskip("verl")
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.utils.config import validate_config

    overrides = verl_overrides(
        load_profile(name), 42, model=tmp_path, train=tmp_path / "t.parquet", out=tmp_path
    )
    with initialize_config_dir(
        str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None
    ):
        # An option that VeRL does not have, or no longer has, ends here.
        config = compose(
            "ppo_trainer", [f"{name}={_hydra(value)}" for name, value in overrides.items()]
        )
    assert config.data.max_prompt_length + config.data.max_response_length <= 32_768
    assert {name: OmegaConf.select(config, name) for name in overrides} == overrides
    validate_config(
        config,
        use_reference_policy=overrides["actor_rollout_ref.actor.use_kl_loss"],
        use_critic=False,
    )


def test_verl_s_own_reader_takes_every_row(exported):
    pytest.importorskip("verl")
    from verl.utils.dataset import RLHFDataset

    out, samples = exported
    rows = RLHFDataset(
        str(out / "train.parquet"), None, {"filter_overlong_prompts": False}, processor=object()
    )
    assert len(rows) == len(samples)
    for row, sample in zip(rows, samples, strict=True):
        image, question = row["raw_prompt"][0]["content"]
        assert image == {
            "type": "image",
            "image": f"file://{sample['image']}",
        }
        assert question["text"].strip() == FAMILIES["qwen3-vl"].prompt(
            sample["expression"], "vanilla"
        )
