"""The plan's arithmetic: hand-computed sums, what several GPUs share, and models that exist."""

import json
from dataclasses import replace

import pytest
from peft import get_peft_model
from tiny_qwen import tiny_qwen

from egm_lib import grpo, sft
from egm_lib.inference.shared_prefix import rollout_rows
from egm_lib.model_shapes import SHAPES, shape_from_config
from egm_lib.profile import Lora, load_profile, profile_names
from egm_lib.prompts import FAMILIES
from egm_lib.training.hardware import GIB, PlanError, hardware
from egm_lib.training.model_setup import freeze_tower, lora_config
from egm_lib.training.plan import (
    Plan,
    default_hardware,
    main,
    make_plan,
    make_setting,
    row_of,
    sharding_of,
)
from egm_lib.training.plan_memory import (
    CONTEXT_BYTES,
    Row,
    fullest,
    lora_parameters,
    total_bytes,
)
from egm_lib.training.plan_work import disk, hours, steps_of

EIGHT = hardware("a100", 8)
QWEN, INTERNVL = load_profile("paper-qwen3vl-8b"), load_profile("paper-internvl3-8b")
ALONE = replace(QWEN.launch, accelerate_config=None, num_processes=1)


def gib(plan: Plan, name: str) -> float:
    """GiB of a part; 0 where the plan has none."""
    return sum(part.bytes for part in plan.parts if part.name == name) / GIB


def changed(profile, stage, **changes):
    return replace(profile, **{stage: replace(getattr(profile, stage), **changes)})


@pytest.mark.parametrize(("tower", "merger"), [(True, True), (True, False), (False, False)])
def test_what_is_trained_is_what_the_model_trains(tower, merger):
    model = tiny_qwen()[0]
    freeze_tower(model, FAMILIES["qwen3-vl"], tower=tower, merger=merger)
    profile = changed(QWEN, "sft", freeze_vision=tower, freeze_merger=merger)
    shape = shape_from_config(model.config)
    setting = make_setting(profile, "sft", EIGHT, shape=shape, row=row_of(profile, "sft", shape))
    assert setting.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_is_what_peft_makes_of_it():
    model = tiny_qwen()[0]
    text = shape_from_config(model.config).text
    peft_model = get_peft_model(model, lora_config(Lora(r=4, alpha=8)))
    made = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert lora_parameters(text, 4) == made


def test_states_under_zero_3_by_hand():
    """8,767,123,696 parameters over 8 GPUs: 2 bytes of weights, 4 of master weights, 8 of moments,
    2 of gradients, and 2 of the reference.
    """
    plan = make_plan(QWEN, "grpo", EIGHT)
    shard_gib = 8_767_123_696 / 8 / GIB
    expected = {
        "weights": 2,
        "master weights": 4,
        "optimizer's moments": 8,
        "gradients": 2,
        "reference for the KL": 2,
    }
    for name, width in expected.items():
        assert gib(plan, name) == pytest.approx(width * shard_gib), name


def test_several_gpus_share_the_state_and_the_work():
    one, eight = (make_plan(QWEN, "sft", hardware("a100", count)) for count in (1, 8))
    for part in ("weights", "master weights", "optimizer's moments", "gradients"):
        assert gib(eight, part) == pytest.approx(gib(one, part) / 8)
    assert gib(eight, "activations, language") == gib(one, "activations, language")
    # Steps are of whole batches
    total = [hours(plan.setting, plan.samples)[-1].value for plan in (one, eight)]
    assert total[1] == pytest.approx(total[0] / 8, rel=1e-3)


def test_frozen_vision_has_no_state_and_no_activations():
    frozen, trained = (
        make_plan(changed(QWEN, "grpo", freeze_vision=freeze), "grpo", EIGHT)
        for freeze in (True, False)
    )
    tower = SHAPES["Qwen3-VL-8B"].vision.tower
    saved = gib(trained, "optimizer's moments") - gib(frozen, "optimizer's moments")
    assert saved == pytest.approx(tower * 8 / 8 / GIB)
    assert gib(frozen, "activations, vision") == 0 < gib(trained, "activations, vision")


def test_tokens_of_an_image_are_the_family_s():
    rows = {
        (profile.name, stage): make_plan(profile, stage, EIGHT).setting.row.image
        for profile in (QWEN, INTERNVL)
        for stage in ("sft", "grpo")
    }
    assert list(rows.values()) == [48, 300, 3328, 3328]  # max_pixels is SFT's; 13 tiles of 256


def test_the_token_budget_bounds_a_pass():
    each_reads = changed(INTERNVL, "grpo", shared_prefix="off")
    with_budget = make_plan(each_reads, "grpo", EIGHT).setting
    without = make_plan(changed(each_reads, "grpo", micro_batch_tokens=None), "grpo", EIGHT).setting
    assert with_budget.tokens == 25_600
    assert without.tokens == 32 * (3328 + 48 + 1024)
    one_row = make_plan(changed(each_reads, "grpo", micro_batch_tokens=1), "grpo", EIGHT).setting
    assert one_row.tokens == 3328 + 48 + 1024  # a row beyond the budget stands alone


def test_packed_groups_read_prompt_and_image_once():
    """32 rows are two groups of 16: two prompts of 3,376 tokens instead of 32."""
    packed = changed(INTERNVL, "grpo", micro_batch_tokens=None)
    each_reads = changed(packed, "grpo", shared_prefix="off")
    packed, each_reads = (make_plan(profile, "grpo", EIGHT) for profile in (packed, each_reads))
    assert packed.setting.tokens == 2 * (3328 + 48) + 32 * 1024
    vision = [gib(plan, "activations, vision") for plan in (packed, each_reads)]
    assert vision[0] == pytest.approx(vision[1] / 16)
    language = [hours(plan.setting, plan.samples)[0].value for plan in (packed, each_reads)]
    assert language[0] / language[1] == pytest.approx((3376 / 16 + 100) / (3376 + 100))
    divided = changed(INTERNVL, "grpo", per_device_train_batch_size=24)  # a group and a half
    assert not make_plan(divided, "grpo", EIGHT).setting.packs


def test_a_longer_context_is_vllm_s_matter_alone():
    short, long = (
        make_plan(changed(QWEN, "grpo", max_model_len=length), "grpo", EIGHT)
        for length in (5120, 32_768)
    )
    assert short.peak_gib == long.peak_gib  # both lie within the share


@pytest.mark.parametrize(("share", "fits"), [(0.3, True), (0.2, False)])
def test_a_colocated_vllm_needs_room_for_its_weights_and_a_whole_context(share, fits):
    """16.3 GiB of weights; 5,120 tokens x 36 layers x 2 x 8 heads x 128 x 2 bytes are 0.7."""
    profile = changed(QWEN, "grpo", vllm_gpu_memory_utilization=share)
    plan = make_plan(profile, "grpo", EIGHT)
    assert plan.fits == fits
    assert gib(plan, "vLLM's share") == pytest.approx(max(share * 80, 16.33 + 0.70), abs=0.01)


def test_a_sleeping_vllm_gives_its_memory_to_the_update():
    asleep, awake = (
        make_plan(changed(QWEN, "grpo", vllm_sleep=sleep), "grpo", EIGHT) for sleep in (True, False)
    )
    freed = total_bytes(awake.parts, "update") - total_bytes(asleep.parts, "update")
    assert freed == pytest.approx(0.3 * 80 * GIB)
    assert total_bytes(awake.parts, "rollout") == total_bytes(asleep.parts, "rollout")


def test_float32_takes_more_of_everything_that_is_computed_with():
    bfloat16, float32 = (
        make_plan(changed(QWEN, "grpo", compute_dtype=dtype), "grpo", EIGHT)
        for dtype in ("bfloat16", "float32")
    )
    for name in ("weights", "gradients", "activations, language", "images of a step"):
        assert gib(float32, name) == pytest.approx(2 * gib(bfloat16, name)), name
    assert gib(float32, "master weights") == gib(bfloat16, "master weights")


def test_real_sizes_say_what_everyone_knows():
    """An 8B model's full training does not fit one GPU of 80 GiB, fits eight; LoRA fits one."""
    one = hardware("a100")
    lora = replace(changed(QWEN, "sft", lora=Lora(r=16, alpha=32)), launch=ALONE)
    assert not make_plan(QWEN, "sft", one).fits
    assert make_plan(QWEN, "sft", EIGHT).fits
    assert make_plan(lora, "sft", one).fits


def test_steps_are_the_profile_s():
    # 83,989 prompts in steps of 256, five epochs; batches of 128
    plan = make_plan(QWEN, "grpo", EIGHT)
    assert steps_of(plan.setting, plan.samples) == 329 * 5
    plan = make_plan(QWEN, "sft", EIGHT)
    assert steps_of(plan.setting, plan.samples) == 4494


def test_checkpoints_are_123_gb_and_two_are_kept():
    plan = make_plan(QWEN, "grpo", EIGHT)
    checkpoints, finished = disk(plan.setting)
    assert checkpoints.value == pytest.approx(2 * 8.767 * 14, rel=1e-3)
    assert finished.value == pytest.approx(2 * 8.767, rel=1e-3)


def test_rollouts_that_wait_take_no_memory():
    """Our own trainer samples some completions at a time, however many a step has."""
    mini = load_profile("mini")
    size = mini.grpo.num_generations
    few, many = (
        gib(make_plan(changed(mini, "grpo", prompts_per_step=n), "grpo", hardware("cpu")), name)
        for name, n in (("KV cache", 1), ("KV cache", 4096))
    )
    assert many == pytest.approx(few * rollout_rows(on_gpu=False) / size)


# Peaks of an H200, without the CUDA context: benchmarks/bench_real_size.py of Qwen3-VL-2B
MEASURED_GIB = {
    "sft": {"update": 31.48, "optimizer": 28.37},
    "sft-zero3": {"optimizer": 34.33},  # DeepSpeed takes the optimizer's step in the update
    "grpo": {"update": 45.9, "optimizer": 40.6},
}


@pytest.mark.parametrize("case", MEASURED_GIB)
def test_a_step_of_a_real_size_takes_what_an_h200_took(case):
    profile = load_profile("paper-qwen3vl-2b")
    zero = "deepspeed_zero3" if case.endswith("zero3") else None
    launch = replace(profile.launch, accelerate_config=zero, num_processes=1)
    changes = {"prompts_per_step": 8, "max_completion_length": 101, "rollout": "transformers"}
    profile = replace(changed(profile, "grpo", **changes), launch=launch)
    stage = case.partition("-")[0]
    rows = {"sft": Row(image=48, question=28, answer=32, longest=32)}
    rows["grpo"] = Row(image=300, question=44, answer=101, longest=101)
    setting = make_setting(profile, stage, hardware("h200"), row=rows[stage], shared_prefix=False)
    plan = Plan(stage, setting, 8)
    for phase, measured in MEASURED_GIB[case].items():
        predicted = (total_bytes(plan.parts, phase) - CONTEXT_BYTES) / GIB
        assert predicted == pytest.approx(measured, rel=0.03), phase


def test_short_passes_wait_for_python():
    """SFT of a 2B took 1.05 to 1.15 s for four passes of 432 tokens on an H200, which computes
    them in 0.07."""
    profile = replace(load_profile("paper-qwen3vl-2b"), launch=ALONE)
    row = Row(image=48, question=28, answer=32, longest=32)
    setting = make_setting(profile, "sft", hardware("h200"), row=row, shared_prefix=False)
    amounts = {amount.name: 3600 * amount.value for amount in hours(setting, samples=16)}
    assert amounts["together"] == pytest.approx(1.1, rel=0.1)
    assert amounts["language model"] + amounts["vision tower"] < 0.1


def test_the_fullest_phase_decides():
    plan = make_plan(QWEN, "grpo", EIGHT)
    sums = [total_bytes(plan.parts, phase) for phase in ("rollout", "update", "optimizer")]
    assert total_bytes(plan.parts, fullest(plan.parts)) == max(sums)
    assert plan.peak_gib == max(sums) / GIB


@pytest.mark.parametrize(
    ("profile", "device", "message"),
    [
        (replace(QWEN, launch=ALONE), hardware("a100", 8), "starts one process"),
        (
            changed(QWEN, "sft", lora=Lora(r=4, alpha=8)),
            EIGHT,
            "lora cannot be combined with zero-3",
        ),
        (replace(QWEN, launch=ALONE), hardware("cpu"), "computes in bfloat16"),
    ],
)
def test_what_training_would_refuse_is_no_plan(profile, device, message):
    with pytest.raises(PlanError, match=message):
        make_plan(profile, "sft", device)


def test_no_device_is_no_plan():
    with pytest.raises(PlanError, match="at least one"):
        hardware("a100", 0)
    with pytest.raises(PlanError, match="one process"):
        hardware("cpu", 2)


def test_sizes_of_zero_s_buffers_are_the_configuration_s(tmp_path, monkeypatch):
    assert sharding_of("deepspeed_zero3").zero["reduce_bucket_size"] == 500_000_000  # the default
    monkeypatch.setattr("egm_lib.training.plan.CONFIGS", tmp_path)
    lines = ["distributed_type: DEEPSPEED", "deepspeed_config:", "  zero_stage: 3"]
    stated = [*lines, "  reduce_bucket_size: 1000", "  offload_optimizer_device: cpu"]
    (tmp_path / "own.yaml").write_text("\n".join(stated))
    own = sharding_of("own")
    assert own.zero["reduce_bucket_size"] == 1000 and own.offload_optimizer
    (tmp_path / "own.yaml").write_text("distributed_type: MULTI_GPU")
    with pytest.raises(PlanError, match="another way"):
        sharding_of("own")


@pytest.mark.parametrize("name", [name for name in profile_names() if name != "smoke"])
def test_every_profile_has_a_plan(name):
    """No hub is asked: shapes are in the table, or in the miniature's folders."""
    profile = load_profile(name)
    for stage in ("sft", "grpo"):
        plan = make_plan(profile, stage, default_hardware(profile, None, None))
        assert plan.peak_gib > 0 and plan.as_dict()["hours"]


def test_the_paper_profiles_fit_eight_gpus_of_80_gib():
    for name in profile_names():
        if name.startswith("paper-"):
            profile = load_profile(name)
            for stage in ("sft", "grpo"):
                assert make_plan(profile, stage, EIGHT).fits, (name, stage)


def test_the_command_prints_the_arithmetic_or_json(capsys):
    assert main(["--profile", "paper-qwen3vl-8b"]) == 0
    text = capsys.readouterr().out
    assert "8,767,123,696 trained x 8 bytes / 8 GPUs" in text
    assert main(["--profile", "paper-qwen3vl-8b", "--json"]) == 0
    assert [plan["fits"] for plan in json.loads(capsys.readouterr().out)] == [True, True]


@pytest.mark.parametrize("stage", [sft, grpo])
def test_a_stage_s_command_has_the_plan_too(stage, capsys):
    assert main(["--profile", "mini", "--task", "amodal"]) == 0
    expected = capsys.readouterr().out
    assert stage.main(["--profile", "mini", "--task", "amodal", "--plan"]) == 0
    assert capsys.readouterr().out == expected
