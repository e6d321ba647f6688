"""GRPO: our path equals TRL's, learns what the reward says, and stops where trainer and sampler are
not one policy.
"""

import json
import shlex
from contextlib import nullcontext
from dataclasses import replace

import pytest
import requests
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_world import grpo_options, make_samples, moved_names, store_model, stored
from transformers import TrainerCallback
from trl.generation import vllm_generation
from trl.scripts.vllm_serve import make_parser

from egm_lib import grpo as grpo_module
from egm_lib.grpo import (
    grpo_options as trl_options,
)
from egm_lib.grpo import make_grpo_trainer, make_reward, question_rows
from egm_lib.loss import group_advantages
from egm_lib.profile import Lora, load_profile
from egm_lib.prompts import FAMILIES
from egm_lib.run import Run
from egm_lib.training import grpo_shared_prefix, grpo_trl
from egm_lib.training.checkpoints import train_to, work_folder
from egm_lib.training.groups import read_groups
from egm_lib.training.grpo_trainer import check_same_policy
from egm_lib.training.grpo_trl import check_same_prompts, collapse_image_tokens
from egm_lib.training.model_setup import TrainingError
from egm_lib.viewer import TraceViewer

FAMILY, INTERNVL = FAMILIES["qwen3-vl"], FAMILIES["internvl-3"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return store_model(folder / "model"), make_samples(folder, images=4, per_image=1), folder


def count_letter(completions, **kwargs) -> list[float]:
    """A reward that is easy to learn: the share of capital letters."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum("A" <= letter <= "Z" for letter in text) / 8 for text in texts]


def half_right(completions, **kwargs) -> list[float]:
    """Eq. 8 of an exact box and of none, in turns."""
    return [float(place % 2 == 0) for place in range(len(completions))]


def trainer_of(
    world, tmp_path, *, shared=None, reward=count_letter, seed=0, family=FAMILY, **changes
):
    folder, samples, root = world
    model, processor = stored(folder, family.name)
    trainer = make_grpo_trainer(
        model,
        processor,
        question_rows(samples, family, root),
        family,
        grpo_options(**changes),
        work=work_folder(tmp_path / "out"),
        log=tmp_path / "log.jsonl",
        groups=tmp_path / "groups.jsonl",
        seed=seed,
        shared_prefix=shared,
        reward=reward,
    )
    return trainer, processor


def logged(log, key: str) -> list[float]:
    return [line[key] for line in map(json.loads, log.read_text().splitlines()) if key in line]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta": 0.0, "entropy_coef": 0.05, "per_device_train_batch_size": 16},
        {"ratio_level": "sequence"},
    ],
    ids=["kl", "entropy", "sequence"],
)
def test_loss_and_gradients_equal_trl_s(world, tmp_path, changes):
    """The same completions and advantages through both: our shared prefix and loss, TRL's forward
    and loss.
    """
    ours, processor = trainer_of(world, tmp_path, shared=True, **changes)
    trl, _ = trainer_of(world, tmp_path, shared=False, **changes)
    for trainer in (ours, trl):  # a reference that differs: the KL is not zero
        if trainer.ref_model is not None:
            with torch.no_grad():
                trainer.ref_model.model.language_model.norm.weight.mul_(1.05)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.model.train()
    rows = [row for row in ours.train_dataset for _ in range(4)]
    torch.manual_seed(1)
    parts = ours._prepare_inputs(rows)
    parts = [parts, *ours.waiting]
    loss = sum(ours._compute_loss(ours.model, part) for part in parts)
    loss.backward()
    trl_loss = 0.0
    for part in parts:
        texts = [p for p in part["prompts"] for _ in range(4)]
        images = [[grpo_module.open_image(p.image)] for p in texts]
        chat = [grpo_module.chat_text(processor, rows[0]["prompt"])] * len(images)
        inputs = processor(images=images, text=chat, return_tensors="pt", padding=True)
        assert all(ids == p.ids for ids, p in zip(inputs["input_ids"].tolist(), texts, strict=True))
        kind = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(part["completion"])], dim=1)
        batch = {
            "prompt_ids": inputs["input_ids"],
            "prompt_mask": inputs["attention_mask"],
            "mm_token_type_ids": kind,
            "completion_ids": part["completion"],
            "completion_mask": part["mask"].long(),
            "advantages": part["advantages"],
            "num_items_in_batch": torch.tensor(part["num_tokens"]),
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
            "num_images": [1] * len(images),
        }
        if trl.beta:
            with torch.no_grad():
                batch["ref_per_token_logps"] = trl._get_per_token_logps_and_entropies(
                    trl.ref_model,
                    torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
                    torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
                    part["completion"].shape[1],
                    pixel_values=batch["pixel_values"],
                    image_grid_thw=batch["image_grid_thw"],
                    num_images=batch["num_images"],
                    mm_token_type_ids=kind,
                )[0]
        part_loss = trl._compute_loss(trl.model, batch)
        part_loss.backward()
        trl_loss += part_loss.item()
    # TRL's entropy is a mean per part, ours over all tokens: one part there
    if not changes.get("entropy_coef"):
        assert len(parts) == 2
    assert loss.item() == pytest.approx(trl_loss, abs=1e-5)
    pairs = zip(ours.model.named_parameters(), trl.model.named_parameters(), strict=True)
    for (name, mine), (_, other) in pairs:
        if mine.requires_grad:
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("shared", "changes"),
    [
        (True, {}),
        (True, {"lora": Lora(r=2, alpha=4)}),
        (False, {}),
        (False, {"lora": Lora(r=2, alpha=4)}),
    ],
    ids=["full", "lora", "plain-full", "plain-lora"],
)
def test_two_steps_move_the_language_model_alone_and_log_what_they_did(
    world, tmp_path, shared, changes
):
    trainer, processor = trainer_of(world, tmp_path, shared=shared, reward=half_right, **changes)
    moved = moved_names(world[0], train_to(trainer, processor, tmp_path / "out"))
    assert moved and all("language_model" in name or "lm_head" in name for name in moved)
    names = {
        "frac_reward_zero_std",
        "completions/mean_length",
        "completions/clipped_ratio",
        "entropy",
        "clip_ratio/region_mean",
        "grad_norm",
    }
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert names <= first.keys()
    expected = {
        "reward": 0.5,
        "acc_at_50": 0.5,
        "mean_iou": 0.5,
        "group_std": (4 * 0.25 / 3) ** 0.5,
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    seconds = [first[f"time/{part}"] for part in ("rollout", "reward", "update")]
    assert min(seconds) > 0 and sum(seconds) <= first["elapsed_s"] + 0.01
    tokens = 16 * first["completions/mean_length"]
    assert first["tokens_per_second"] * first["time/rollout"] == pytest.approx(tokens)
    # Before the first step the policy is the reference
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    if shared:
        assert first["sampling/sampling_logp_difference/mean"] < 1e-4
    board = EventAccumulator(str(tmp_path / "tensorboard" / "log")).Reload()
    assert [event.step for event in board.Scalars("reward")] == [1, 2]
    for group in check_groups(tmp_path / "groups.jsonl", steps=[1] * 4 + [2] * 4):
        assert group["rewards"] == [1.0, 0.0, 1.0, 0.0]
        view = TraceViewer(groups=[group], root=world[2]).view["group"]["completions"]
        assert [c["advantage"] for c in view] == group_advantages(
            torch.tensor(group["rewards"]), 4
        ).tolist()


@pytest.mark.parametrize("lora", [None, Lora(r=2, alpha=4)], ids=["full", "lora"])
def test_two_steps_of_internvl_move_the_language_model_alone(world, tmp_path, lora):
    """Images of several tiles, and the InternVL column of Table 6: no KL, an entropy term."""
    folder = store_model(tmp_path / "model", "internvl-3")
    trainer, processor = trainer_of(
        (folder, *world[1:]),
        tmp_path,
        reward=half_right,
        family=INTERNVL,
        lora=lora,
        beta=0.0,
        entropy_coef=0.01,
        per_device_train_batch_size=16,
    )
    moved = moved_names(folder, train_to(trainer, processor, tmp_path / "out"))
    parts = ("_proj.",) if lora else ("language_model", "lm_head")
    assert moved and all(any(part in name for part in parts) for name in moved)
    assert logged(tmp_path / "log.jsonl", "reward") == [0.5, 0.5] and logged(
        tmp_path / "log.jsonl", "entropy"
    )
    assert not read_groups(tmp_path / "groups.jsonl")[0]["completions"][0].startswith("<think>")


def check_groups(path, steps: list[int]) -> list[dict]:
    """The file's groups; each of a prompt with four completions that begin as the template begins
    them.
    """
    groups = read_groups(path)
    assert [group["step"] for group in groups] == steps
    assert all(len(group["completions"]) == 4 for group in groups)
    assert all(text.startswith("<think>") for group in groups for text in group["completions"])
    return groups


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_leave_the_update_where_the_profile_says_so(
    world, tmp_path, monkeypatch, masked
):
    """Two of four completions of a group end: with the mask, those alone are trained on; all are
    counted and scored.
    """
    trainer, processor = trainer_of(
        world, tmp_path, reward=half_right, mask_truncated_completions=masked
    )
    end = processor.tokenizer.eos_token_id
    answers = [[40, 41, end], [42, 43, 44, 45], [46, end], [47, 48, 49, 50]]
    monkeypatch.setattr(
        grpo_shared_prefix,
        "sample",
        lambda model, prompts, *args: (answers * len(prompts), [[0.0] * 4] * 4 * len(prompts)),
    )
    parts = trainer._roll_out([row for row in trainer.train_dataset for _ in range(4)])
    kept = [tokens for part in parts for tokens in part["completion"].tolist()]
    assert len(kept) == (8 if masked else 16)
    assert all((end in tokens) or not masked for tokens in kept)
    assert {part["num_tokens"] for part in parts} == {4 * (5.0 if masked else 13.0)}
    assert sum(part["mask"].sum().item() for part in parts) == parts[0]["num_tokens"]
    rows = [part["group"].tolist() for part in parts]
    assert rows == [[0, 0, 1, 1] if masked else [0] * 4 + [1] * 4] * 2
    assert trainer._metrics["train"]["completions/clipped_ratio"] == [0.5]
    plain, _ = trainer_of(world, tmp_path, shared=False, mask_truncated_completions=masked)
    assert plain.mask_truncated_completions is masked


@pytest.mark.parametrize("seed", [0, 1])
def test_the_mean_reward_rises_and_falls_with_the_sign_of_the_reward(world, tmp_path, seed):
    def flipped(completions, **kwargs):
        return [-value for value in count_letter(completions)]

    options = {
        "max_steps": 15,
        "num_generations": 16,
        "per_device_train_batch_size": 64,
        "beta": 0.0,
        "seed": seed,
    }
    means = {}
    for name, reward in (("up", count_letter), ("down", flipped)):
        (tmp_path / name).mkdir()
        trainer, processor = trainer_of(
            world, tmp_path / name, reward=reward, learning_rate=3e-3, **options
        )
        train_to(trainer, processor, tmp_path / name / "out")
        sign = 1 if name == "up" else -1
        means[name] = [sign * value for value in logged(tmp_path / name / "log.jsonl", "reward")]
    assert sum(means["up"][-3:]) / 3 > 1.5 * means["up"][0]
    assert sum(means["down"][-3:]) / 3 < 0.7 * means["down"][0]


def test_a_killed_run_goes_on_to_the_same_rewards(world, tmp_path):
    class Killed(Exception):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Killed

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    trainer, processor = trainer_of(world, tmp_path / "whole", max_steps=4)
    train_to(trainer, processor, tmp_path / "whole/out")
    trainer, processor = trainer_of(world, tmp_path / "killed", max_steps=4)
    trainer.clock.save_seconds = 0.0
    trainer.add_callback(Kill())
    with pytest.raises(Killed):
        train_to(trainer, processor, tmp_path / "killed/out")
    trainer, processor = trainer_of(world, tmp_path / "killed", max_steps=4)
    train_to(trainer, processor, tmp_path / "killed/out")
    for key in ("reward", "loss", "grad_norm", "completions/mean_length"):
        assert logged(tmp_path / "killed/log.jsonl", key) == logged(
            tmp_path / "whole/log.jsonl", key
        )
    groups = check_groups(
        tmp_path / "killed/groups.jsonl", steps=[step for step in (1, 2, 3, 4) for _ in range(4)]
    )
    assert groups == read_groups(tmp_path / "whole/groups.jsonl")


def test_a_step_without_any_mixed_group_changes_nothing(world, tmp_path):
    trainer, processor = trainer_of(
        world, tmp_path, reward=lambda completions, **kwargs: [0.5] * len(completions)
    )
    assert not moved_names(world[0], train_to(trainer, processor, tmp_path / "out"))
    assert logged(tmp_path / "log.jsonl", "frac_reward_zero_std") == [1.0, 1.0]


def test_another_sampler_stops_the_run_with_both_numbers(world, tmp_path, monkeypatch):
    def drunk(*args, **kwargs):
        tokens, logps = plain(*args, **kwargs)
        return tokens, [[value - 1.0 for value in row] for row in logps]

    plain = grpo_shared_prefix.sample
    monkeypatch.setattr(grpo_shared_prefix, "sample", drunk)
    trainer, processor = trainer_of(world, tmp_path)
    with pytest.raises(
        TrainingError,
        match=r"disagree: mean log-prob .* by the trainer, .* mean difference 1\.0000",
    ):
        train_to(trainer, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_is_no_agreement():
    with pytest.raises(TrainingError, match="disagree"):
        check_same_policy(torch.tensor([float("nan")]), torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("ids", "ends", "collapsed"),
    [
        ([1, 9, 9, 9, 2], (), [1, 9, 2]),
        ([9, 9, 1, 9, 9, 9], (), [9, 1, 9]),  # two images
        ([1, 1, 2], (), [1, 1, 2]),  # other repeated tokens stay
        ([1, 7, 9, 9, 8, 2], (7, 8), [1, 9, 2]),  # InternVL-3's ends, which vLLM puts there
        ([1, 7, 9, 9, 8, 2], (None, None), [1, 7, 9, 8, 2]),
        ([], (), []),
    ],
)
def test_image_tokens_collapse_to_one_a_image(ids, ends, collapsed):
    assert collapse_image_tokens(ids, 9, ends) == collapsed


def test_a_sampler_that_reads_another_prompt_is_stopped():
    check_same_prompts([[1, 9, 9, 2]], [(1, 9, 9, 2)])
    with pytest.raises(TrainingError, match="read a prompt of 5 tokens, and the trainer has 4"):
        check_same_prompts([[1, 9, 9, 2]], [[1, 9, 9, 9, 2]])


def test_reward_sees_what_the_template_has_begun(world):
    reward = make_reward(stored(world[0])[1], FAMILY, 0.5)
    box = '```json\n[\n\t{"bbox_2d": [100, 100, 500, 500], "label": "x"}\n]\n```'
    # The second never stops thinking: its box does not count
    answers = [f"red\n</think>\n\n{box}", f"red {box}"]
    assert reward(answers, [[10, 10, 50, 50]] * 2, [[100, 100]] * 2) == [1.0, 0.0]


def test_profile_values_arrive_under_trl_s_names(tmp_path):
    options = trl_options(grpo_options(beta=0.005, top_k=50, prompts_per_step=16), tmp_path, seed=1)
    expected = {
        "beta": 0.005,
        "top_k": 50,
        "gradient_accumulation_steps": 8,
        "loss_type": "dapo",
        "epsilon": 0.2,
    }
    assert expected.items() <= options.items()
    json.dumps(options)
    with pytest.raises(TrainingError, match="does not divide"):
        trl_options(grpo_options(per_device_train_batch_size=7), tmp_path, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_vllm_without_a_gpu_is_said_before_anything_starts():
    grpo_module.check_rollout(grpo_options())
    with pytest.raises(TrainingError, match="sees no GPU here"):
        grpo_module.check_rollout(grpo_options(rollout="vllm-colocate"))


def test_vllm_is_started_with_what_the_profile_says_and_trl_does_not(world, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generation, "LLM", dict, raising=False)
    with grpo_trl.vllm_options(dtype="float16"):
        assert vllm_generation.LLM(model="x") == {"model": "x", "dtype": "float16"}
    assert vllm_generation.LLM is dict
    started = {}
    monkeypatch.setattr(
        grpo_trl, "vllm_options", lambda **options: nullcontext(started.update(options))
    )
    trainer, processor = trainer_of(world, tmp_path, shared=False, rollout_dtype="float16")
    size = processor.image_processor.size
    assert started["dtype"] == "float16" and started["limit_mm_per_prompt"] == {
        "image": 1,
        "video": 0,
    }
    assert started["mm_processor_kwargs"]["size"] == {
        name: size[name] for name in ("shortest_edge", "longest_edge")
    }
    assert (
        trainer.args.vllm_max_model_length
        == 32_768
        < trainer.model.config.text_config.max_position_embeddings
    )


def test_a_server_that_does_not_answer_is_said_with_what_starts_one(world, tmp_path, monkeypatch):
    def wait(*args, **kwargs):
        raise requests.ConnectionError("The vLLM server can't be reached after 240.0 seconds.")

    base = load_profile("smoke")
    served = replace(base, grpo=replace(base.grpo, rollout="vllm-server"))
    monkeypatch.setattr(Run, "root", property(lambda run: tmp_path))
    monkeypatch.setattr(grpo_module, "check_rollout", lambda options: None)
    monkeypatch.setattr(grpo_module, "require_checkpoint", lambda *args: world[0])
    monkeypatch.setattr(grpo_module, "require_file", lambda *args: tmp_path)
    monkeypatch.setattr(grpo_module, "read_samples", lambda path: world[1])
    monkeypatch.setattr(grpo_module, "make_grpo_trainer", wait)
    with pytest.raises(
        TrainingError, match="240.0 seconds. Start one, .* `trl vllm-serve --model "
    ) as stopped:
        grpo_module.run_grpo(Run(served, 0), "vanilla")
    words = shlex.split(str(stopped.value).split("`")[1])
    options, others = make_parser().parse_args_and_config(words[2:], return_remaining_strings=True)
    assert (options.model, options.dtype, options.max_model_len) == (
        str(world[0]),
        served.grpo.rollout_dtype,
        32_768,
    )
    # Goes on to vLLM as it is
    assert others == ["--limit-mm-per-prompt", '{"image": 1, "video": 0}']


def test_no_sample_is_said_in_one_sentence(world, tmp_path):
    with pytest.raises(TrainingError, match="no RL sample"):
        trainer_of((world[0], [], world[2]), tmp_path)
