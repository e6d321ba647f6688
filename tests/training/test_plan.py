"""The plan's arithmetic against models that exist: counted parameters, what is trained, and what
several GPUs share.
"""

import json
from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from tiny_qwen import tiny_qwen
from transformers import Qwen3VLConfig

from egm_lib import grpo, sft
from egm_lib.inference.shared_prefix import ROLLOUT_ROWS
from egm_lib.profile import Lora, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.training.model_setup import freeze_tower, lora_config
from egm_lib.training.plan import (
    Hardware,
    PlanError,
    count_parameters,
    estimate,
    lora_parameters,
    main,
)

ONE = Hardware(gpus=1, memory_gib=80, tflops=312)


def profile(**sft):
    base = load_profile("paper-qwen3vl-8b")
    return replace(base, sft=replace(base.sft, **sft))


@pytest.mark.parametrize(("tower", "merger"), [(True, True), (True, False), (False, False)])
def test_parameters_are_those_of_the_model(tower, merger):
    model = tiny_qwen()[0]
    freeze_tower(model, FAMILIES["qwen3-vl"], tower=tower, merger=merger)
    plan = estimate(
        profile(freeze_vision=tower, freeze_merger=merger), model.config, "sft", ONE, samples=100
    )
    assert plan.parameters == model.num_parameters()
    assert plan.trained_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count_parameters(model.config)["vision"] == sum(
        p.numel() for p in model.model.visual.parameters()
    )


def test_lora_is_what_peft_makes_of_it():
    model = tiny_qwen()[0]
    peft_model = get_peft_model(model, LoraConfig(**{**lora_config(Lora(r=4, alpha=8)).to_dict()}))
    made = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert lora_parameters(model.config, 4) == made


def test_several_gpus_share_the_state_and_the_work():
    config = tiny_qwen()[0].config
    one = estimate(profile(), config, "sft", ONE, samples=1000)
    eight = estimate(profile(), config, "sft", replace(ONE, gpus=8), samples=1000)
    for part in ("weights_gib", "gradients_gib", "optimizer_gib"):
        assert getattr(eight, part) == pytest.approx(getattr(one, part) / 8)
    assert eight.activations_gib == one.activations_gib
    assert eight.hours == pytest.approx(one.hours / 8)
    assert one.optimizer_gib == pytest.approx(8 * one.trained_parameters / 2**30)


def qwen_8b() -> Qwen3VLConfig:
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12_288,
        },
        vision_config={
            "depth": 27,
            "hidden_size": 1152,
            "num_heads": 16,
            "intermediate_size": 4304,
            "out_hidden_size": 4096,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tie_word_embeddings=False,
    )


def test_real_sizes_say_what_everyone_knows():
    """An 8B model's full training does not fit one GPU of 80 GiB, fits eight; LoRA fits one."""
    config = qwen_8b()
    full, lora = profile(), profile(lora=Lora(r=16, alpha=32))
    assert 8.0e9 < estimate(full, config, "sft", ONE, samples=1000).parameters < 9.5e9
    assert not estimate(full, config, "sft", ONE, samples=1000).fits
    assert estimate(full, config, "sft", replace(ONE, gpus=8), samples=1000).fits
    assert estimate(lora, config, "sft", ONE, samples=1000).fits


def test_steps_are_the_profile_s():
    config, profile_ = tiny_qwen()[0].config, load_profile("paper-qwen3vl-8b")
    plan = estimate(profile_, config, "grpo", replace(ONE, gpus=8), samples=83_989)
    assert plan.steps == 329 * 5  # 83,989 prompts in steps of 256, five epochs
    # Batches of 128
    assert estimate(profile_, config, "sft", replace(ONE, gpus=8), samples=575_208).steps == 4494


def test_no_gpu_is_no_plan():
    with pytest.raises(PlanError, match="at least one GPU"):
        Hardware(gpus=0, memory_gib=80, tflops=312)


def test_rollouts_that_wait_take_no_memory():
    config, base = tiny_qwen()[0].config, load_profile("paper-qwen3vl-8b")
    grpo_ = replace(base.grpo, rollout="transformers")
    few, many = (replace(base, grpo=replace(grpo_, prompts_per_step=count)) for count in (1, 4096))
    small, large = (
        estimate(each, config, "grpo", ONE, samples=100).kv_cache_gib for each in (few, many)
    )
    assert large == pytest.approx(small * ROLLOUT_ROWS / base.grpo.num_generations)


@pytest.mark.parametrize(
    ("share", "memory_gib", "fits"), [(0.3, 80, True), (0.2, 80, False), (0.3, 40, False)]
)
def test_a_colocated_vllm_needs_room_for_its_weights_and_a_whole_context(share, memory_gib, fits):
    """8.8 billion parameters of 2 bytes are 16 GiB; 32,768 tokens x 36 layers x 2 x 8 heads x 128 x
    2 bytes, 4.5.
    """
    base, hardware = (
        load_profile("paper-qwen3vl-8b"),
        Hardware(gpus=8, memory_gib=memory_gib, tflops=312),
    )
    base = replace(base, grpo=replace(base.grpo, vllm_gpu_memory_utilization=share))
    plan = estimate(base, qwen_8b(), "grpo", hardware, samples=1000)
    assert plan.fits == fits
    assert plan.rollout_weights_gib == pytest.approx(plan.parameters * 2 / 2**30)
    assert plan.rollout_weights_gib + plan.kv_cache_gib == pytest.approx(
        max(share * memory_gib, 16.3 + 4.5), rel=0.01
    )


def test_the_command_prints_a_table_or_json(capsys):
    assert main(["--profile", "mini", "--gpus", "1"]) == 0
    table = capsys.readouterr().out
    assert "trained parameters" in table and "yes" in table
    assert main(["--profile", "mini", "--gpus", "1", "--json"]) == 0
    assert [plan["fits"] for plan in json.loads(capsys.readouterr().out)] == [True, True]


@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_stage_s_command_has_the_plan_too(stage, capsys):
    assert main(["--profile", "mini"]) == 0
    expected = capsys.readouterr().out
    assert stage.main(["--profile", "mini", "--plan"]) == 0
    assert capsys.readouterr().out == expected
