"""GRPO: our path equals TRL's, learns from the reward, and stops if trainer and sampler differ."""

import itertools
import json
import shlex
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import requests
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_world import (
    as_on_a_gpu,
    grpo_options,
    make_samples,
    moved_names,
    store_model,
    stored,
)
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.generation import vllm_generation
from trl.scripts.vllm_serve import make_parser
from trl.trainer.utils import split_pixel_values_by_grid

from egm_lib import grpo as grpo_module
from egm_lib.files import project_root, write_jsonl
from egm_lib.grpo import (
    grpo_options as trl_options,
)
from egm_lib.grpo import hold_out, make_grpo_trainer, make_reward, question_rows
from egm_lib.inference.shared_prefix import Reader, read_prefix
from egm_lib.inference.vision_cache import freeze_vision
from egm_lib.loss import group_advantages
from egm_lib.profile import Lora, load_profile, profile_names
from egm_lib.prompts import FAMILIES
from egm_lib.reports.figures.curves import training_log
from egm_lib.run import Run
from egm_lib.training import grpo_shared_prefix, grpo_trl
from egm_lib.training.checkpoints import train_to, work_folder
from egm_lib.training.group_keeper import GroupKeeper
from egm_lib.training.groups import read_groups
from egm_lib.training.grpo_trainer import answer_texts, check_same_policy
from egm_lib.training.grpo_trl import check_same_prompts, collapse_image_tokens
from egm_lib.training.micro_batches import row_counts
from egm_lib.training.model_setup import TrainingError, can_share_prefix
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
    world,
    tmp_path,
    *,
    shared=None,
    reward=count_letter,
    seed=0,
    family=FAMILY,
    held_out=(),
    **changes,
):
    folder, samples, root = world
    model, processor = stored(folder, family.name)
    if shared is False:  # TRL's own path, with which others are compared
        changes.setdefault("shared_prefix", "off")
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
        held_out=held_out,
    )
    return trainer, processor


def test_rows_share_keys_though_a_gpu_would_checkpoint(world, tmp_path, monkeypatch):
    as_on_a_gpu(monkeypatch, grpo_module)
    trainer, _ = trainer_of(world, tmp_path, shared=True, max_steps=1)
    trainer.train()  # compares sampler and trainer
    assert trainer.checked and not trainer.model.is_activation_checkpointing


def test_a_model_that_drops_keys_is_not_read_from(world):
    model, processor = stored(world[0])
    reader = Reader(processor, model, freeze_vision(model), grpo_module.open_image)
    image = world[2] / world[1][0]["image"]
    chat = grpo_module.chat_text(processor, [{"role": "user", "content": "?"}])
    prompt, features = reader.prompt(image, chat), reader.features([image])
    assert read_prefix(model, [prompt], features).cache.layers
    model.train()
    model.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="gradient checkpointing drops them"):
        read_prefix(model, [prompt], features)


@pytest.mark.parametrize("zero", [None, object()], ids=["alone", "deepspeed"])
def test_deepspeed_takes_trl_s_path(zero):
    config = SimpleNamespace(world_size=1, deepspeed_plugin=zero)
    assert can_share_prefix(FAMILY, load_profile("mini").grpo, config) == (zero is None)


def trainer_image(world):
    """The first sample's image; all have one size, so that all prompts have one length."""
    return grpo_module.open_image(world[2] / world[1][0]["image"])


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


@pytest.fixture(scope="module")
def ragged(world):
    """The world with prompts of unlike lengths."""
    folder, samples, root = world
    longer = [
        {**sample, "expression": "square" + " red" * (5 * number)}
        for number, sample in enumerate(samples)
    ]
    return folder, longer, root


@pytest.fixture(scope="module")
def internvl(tmp_path_factory):
    return store_model(tmp_path_factory.mktemp("internvl") / "model", "internvl-3")


@pytest.mark.parametrize("family", [FAMILY, INTERNVL], ids=lambda family: family.name)
def test_padded_prompts_get_the_log_probs_of_unpadded_ones(ragged, internvl, tmp_path, family):
    """Qwen's tokenizer pads on the right, and TRL's prompts on the left: positions must agree."""
    folder = ragged[0] if family is FAMILY else internvl
    assert stored(folder, family.name)[1].tokenizer.padding_side == "right"
    trainer, _ = trainer_of((folder, *ragged[1:]), tmp_path, shared=False, beta=0.0, family=family)
    trainer.model.train()
    batch = trainer._generate_and_score_completions(list(trainer.train_dataset))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    assert batch["prompt_mask"].sum(dim=1).unique().numel() == len(ragged[1])
    names = ("pixel_values", "image_grid_thw", "num_images", "num_tiles", "mm_token_type_ids")
    with torch.no_grad():
        logps_B_T, *_ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            ids,
            mask,
            batch["completion_ids"].shape[1],
            **{name: batch[name] for name in names if name in batch},
        )
    for row, pixels in enumerate(split_pixel_values_by_grid(batch)["pixel_values"]):
        row_ids = ids[row][mask[row].bool()][None]
        inputs = {"input_ids": row_ids, "pixel_values": pixels}
        if family is FAMILY:
            inputs["image_grid_thw"] = batch["image_grid_thw"][row : row + 1]
            image = row_ids == trainer.model.config.image_token_id
            inputs["mm_token_type_ids"] = image.int()
        with torch.no_grad():
            logits = trainer.model(**inputs).logits[0, :-1]
        alone = logits.log_softmax(-1).gather(-1, row_ids[0, 1:, None])[:, 0]
        count = int(batch["completion_mask"][row].sum())
        torch.testing.assert_close(logps_B_T[row, :count], alone[-count:], atol=1e-5, rtol=0)


def test_rows_fill_micro_batches_of_so_many_tokens():
    # 2 x (10 + 5) = 30 fits; a third row of 10 + 5 would make 45
    assert row_counts([10, 10, 10], [5, 4, 3], 30) == [2, 1]
    # As wide as the longest prompt and the longest completion together: 2 x (10 + 9) = 38
    assert row_counts([10, 2], [1, 9], 37) == [1, 1]
    assert row_counts([10, 2], [1, 9], 38) == [2]
    assert row_counts([50, 10, 10], [50, 5, 5], 30) == [1, 2]  # one beyond the budget stands alone


@pytest.mark.parametrize("family", [FAMILY, INTERNVL], ids=lambda family: family.name)
@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.01}, {"beta": 0.0, "entropy_coef": 0.05}, {"mask_truncated_completions": True}],
    ids=["kl", "entropy", "masked"],
)
def test_micro_batches_change_neither_loss_nor_gradient(
    ragged, internvl, tmp_path, monkeypatch, family, changes
):
    """Eight rows at once, and the same rows within a budget of tokens that all passes keep."""
    folder = ragged[0] if family is FAMILY else internvl
    budget, sizes, losses, gradients = 400, {}, {}, {}
    plain = GRPOTrainer._get_per_token_logps_and_entropies

    def watched(trainer, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kw):
        rows = min(batch_size or len(input_ids), len(input_ids))
        sizes[trainer.micro_batch_tokens].append(rows * input_ids.shape[1])
        arguments = (model, input_ids, attention_mask, logits_to_keep, batch_size)
        return plain(trainer, *arguments, **kw)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", watched)
    for tokens in (None, budget):
        sizes[tokens] = []
        trainer, processor = trainer_of(
            (folder, *ragged[1:]),
            tmp_path,
            shared=False,
            family=family,
            micro_batch_tokens=tokens,
            reward=half_right,
            **changes,
        )
        end, ids = processor.tokenizer.eos_token_id, itertools.count(1)

        def single_turn(prompt_ids, *args, end=end, ids=ids, **kwargs):
            """Completions of 2 to 9 tokens; some are cut off."""
            lengths = [2 + next(ids) % 8 for _ in prompt_ids]
            return [[40] * (n - 1) + [end if n < 8 else 41] for n in lengths], None

        monkeypatch.setattr(trainer, "_generate_single_turn", single_turn)
        if trainer.ref_model is not None:  # a reference that differs: the KL is not zero
            with torch.no_grad():
                trainer.ref_model.model.language_model.norm.weight.mul_(1.05)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        rows = [row for row in trainer.train_dataset for _ in range(4)]
        torch.manual_seed(0)
        losses[tokens] = [trainer.training_step(trainer.model, rows).item() for _ in range(2)]
        gradients[tokens] = {
            name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None
        }
        if changes.get("entropy_coef"):
            assert set(trainer._metrics["train"]["entropy_coef"]) <= {0.05}
    assert max(sizes[None]) > 2 * budget >= 2 * max(sizes[budget])
    assert len(sizes[budget]) > len(sizes[None])
    assert losses[budget] == pytest.approx(losses[None], abs=1e-6)
    assert gradients[budget].keys() == gradients[None].keys()
    for name, gradient in gradients[None].items():
        torch.testing.assert_close(gradients[budget][name], gradient, atol=1e-6, rtol=1e-4)


def test_an_image_is_processed_once_a_step_and_stays_on_its_rank(world, tmp_path, monkeypatch):
    """TRL's loader brings each row once for every accumulation step and completion."""
    opened = []

    def spy(file):
        opened.append(file)
        return grpo_module.open_image(file)

    monkeypatch.setattr(grpo_trl, "open_image", spy)
    trainer, processor = trainer_of(world, tmp_path, shared=False, max_steps=2)
    patchify, patched = processor.image_processor.patchify, []
    monkeypatch.setattr(
        processor.image_processor,
        "patchify",
        lambda image, **sizes: patched.append(image) or patchify(image, **sizes),
    )
    assert trainer.args.gradient_accumulation_steps == 2
    trainer.train()
    assert len(opened) == 2 * len(world[1]) == len(patched)
    # What TRL gathers from all ranks to log it
    assert all(isinstance(row[0]["content"], str) for row in trainer._logs["prompt"])
    assert len(trainer._logs["prompt"]) == 16 and not trainer._logs["images"]


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
def test_two_steps_train_only_the_language_model_and_log_their_metrics(
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
    expected = {"reward": 0.5, "group_std": (4 * 0.25 / 3) ** 0.5}
    assert {name: first[name] for name in expected} == pytest.approx(expected)
    seconds = [first[f"time/{part}"] for part in ("rollout", "reward", "update")]
    assert min(seconds) > 0 and sum(seconds) <= first["elapsed_s"] + 0.01
    tokens = 16 * first["completions/mean_length"]
    assert first["tokens_per_second"] * first["time/rollout"] == pytest.approx(tokens)
    question = trainer.train_dataset[0]["prompt"]
    prompt = grpo_module.chat_text(processor, question)
    ids = processor(images=[trainer_image(world)], text=[prompt])["input_ids"][0]
    assert first["num_tokens"] == pytest.approx(16 * len(ids) + tokens)
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
def test_two_steps_of_internvl_train_only_the_language_model(world, tmp_path, lora):
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


def question_images(samples) -> set[str]:
    return {sample["image_id"] for sample in samples}


def test_no_image_of_a_held_out_prompt_is_trained_on():
    samples = [{"sample_id": n, "image_id": f"{n // 3}"} for n in range(60)]
    trained, held_out = hold_out(samples, 10, seed=0)
    assert len(held_out) == 10 and not question_images(trained) & question_images(held_out)
    assert len(trained) == 60 - 12  # four images of three samples each
    assert hold_out(samples, 10, seed=0) == (trained, held_out) != hold_out(samples, 10, seed=1)
    assert hold_out(samples, 0, seed=0) == (samples, [])
    with pytest.raises(TrainingError, match="held_out_prompts = 58 leaves none of 60"):
        hold_out(samples, 58, seed=0)


@pytest.mark.parametrize(
    ("shared", "changes"),
    [
        (True, {}),
        (False, {"shared_prefix": "off"}),
        (False, {}),
        (False, {"micro_batch_tokens": 200}),
    ],
    ids=["shared", "plain", "packed", "budget"],
)
def test_held_out_prompts_are_answered_now_and_then_and_never_trained_on(
    world, tmp_path, shared, changes
):
    """Rewards of the prompts alone: six of which the first is right, and in turns in training."""
    _, samples, root = world
    asked = []

    def reward(completions, sample, **kwargs) -> list[float]:
        asked.append([row["sample_id"] for row in sample])
        if len(completions) == 6:  # the held-out ones; no whole number of groups
            return [1.0] + [0.0] * 5
        return half_right(completions)

    held_out = [
        sample | {"sample_id": f"held-{n}"} for n, sample in enumerate(samples + samples[:2])
    ]
    trainer, processor = trainer_of(
        world,
        tmp_path,
        shared=shared,
        reward=reward,
        held_out=question_rows(held_out, FAMILY, root),
        held_out_prompts=6,
        held_out_steps=2,
        max_steps=3,
        **changes,
    )
    train_to(trainer, processor, tmp_path / "out")
    lines = list(map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()))
    measured = {line["step"]: line["eval_reward"] for line in lines if "eval_reward" in line}
    assert measured == pytest.approx({0: 1 / 6, 2: 1 / 6, 3: 1 / 6})
    assert [line["reward"] for line in lines if "reward" in line] == [0.5] * 3
    assert all(line["eval_completions/mean_length"] > 0 for line in lines if "eval_reward" in line)
    assert not any("eval_loss" in line for line in lines)
    trained = [name for names in asked if len(names) != 6 for name in names]
    assert trained and not any(str(name).startswith("held") for name in trained)
    kept = read_groups(tmp_path / "groups.jsonl")
    assert {group["step"] for group in kept} == {1, 2, 3}  # of training alone
    frame = training_log(tmp_path / "log.jsonl")
    assert frame["step"].tolist() == [0, 1, 2, 3]
    both = frame.set_index("step").loc[2, ["reward", "eval_reward"]].tolist()
    assert both == pytest.approx([0.5, 1 / 6])


def test_held_out_prompts_fill_whole_batches(tmp_path):
    options = grpo_options(held_out_prompts=9)
    with pytest.raises(TrainingError, match="held_out_prompts = 9 does not divide into batches"):
        trl_options(options, tmp_path, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_completions_are_left_out_if_the_profile_says_so(
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
    trainer.model.train()  # as in a step
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


def test_a_killed_run_continues_to_the_same_rewards(world, tmp_path):
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


def test_a_step_whose_groups_have_equal_rewards_changes_nothing(world, tmp_path):
    trainer, processor = trainer_of(
        world, tmp_path, reward=lambda completions, **kwargs: [0.5] * len(completions)
    )
    assert not moved_names(world[0], train_to(trainer, processor, tmp_path / "out"))
    assert logged(tmp_path / "log.jsonl", "frac_reward_zero_std") == [1.0, 1.0]


def test_a_sampler_with_another_policy_stops_the_run(world, tmp_path, monkeypatch):
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


def test_a_sampler_that_differs_only_later_stops_the_run(world, tmp_path, monkeypatch):
    """Old weights in the sampler show only after the first step."""

    def stale(*args, **kwargs):
        tokens, logps = plain(*args, **kwargs)
        gap = 0.05 if trainer.state.global_step else 0.0
        return tokens, [[value - gap for value in row] for row in logps]

    plain = grpo_shared_prefix.sample
    monkeypatch.setattr(grpo_shared_prefix, "sample", stale)
    trainer, _ = trainer_of(world, tmp_path, max_steps=4, check_steps=2, reward=half_right)
    with pytest.raises(TrainingError, match=r"mean difference 0\.0500"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_top_p_is_not_mistaken_for_another_policy(world, tmp_path):
    trainer, _ = trainer_of(world, tmp_path, top_p=0.5, reward=half_right, check_steps=1)
    trainer.train()
    gaps = logged(tmp_path / "log.jsonl", "sampling/sampling_logp_difference/mean")
    assert len(gaps) == 2 and max(gaps) < 1e-4


@pytest.mark.parametrize(("gap", "stops"), [(0.005, False), (0.03, True)])
def test_the_limit_separates_half_precision_from_misplaced_images(gap, stops):
    logps = torch.linspace(-2, 0, 50)
    with pytest.raises(TrainingError, match="disagree") if stops else nullcontext():
        check_same_policy(logps, logps - gap)


def test_vllm_samples_a_compared_step_without_top_p(colocated, monkeypatch):
    """vLLM states log-probs of the cut distribution, up to -log(top_p) above the trainer's."""

    def rollout(trainer, prompts):
        return trainer.vllm_generation.generate(prompts=prompts, images=None), [[1]]

    monkeypatch.setattr(GRPOTrainer, "_generate", rollout)
    trainer = colocated(top_p=0.7, top_k=5, check_steps=2)
    trainer.model.train()  # as in a step
    logps, compared = torch.zeros(3), []
    for trainer.state.global_step in range(4):
        trainer._generate([])
        compared.append(not trainer.checked)
        if not trainer.checked:
            trainer._check_policy(logps, logps)
    assert compared == [True, False, True, False]
    assert trainer.vllm_generation.calls == [(1.0, 0), (0.7, 5)] * 2
    trainer.model.eval()  # held-out prompts are sampled as a rollout is, and compared with nothing
    trainer._generate([])
    assert trainer.vllm_generation.calls[-1] == (0.7, 5)


def test_nan_counts_as_a_disagreement():
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
def test_image_tokens_collapse_to_one_per_image(ids, ends, collapsed):
    assert collapse_image_tokens(ids, 9, ends) == collapsed


def test_a_sampler_that_reads_another_prompt_stops_the_run():
    check_same_prompts([[1, 9, 9, 2]], [(1, 9, 9, 2)])
    with pytest.raises(TrainingError, match="read a prompt of 5 tokens, and the trainer has 4"):
        check_same_prompts([[1, 9, 9, 2]], [[1, 9, 9, 9, 2]])


def test_the_reward_sees_the_start_that_the_template_wrote(world):
    reward = make_reward(stored(world[0])[1], FAMILY, 0.5)
    box = '```json\n[\n\t{"bbox_2d": [100, 100, 500, 500], "label": "x"}\n]\n```'
    # The second never stops thinking: its box does not count
    answers = [f"red\n</think>\n\n{box}", f"red {box}"]
    assert reward(answers, [[10, 10, 50, 50]] * 2, [[100, 100]] * 2) == [1.0, 0.0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_accuracy_is_counted_from_boxes_at_any_reward_weight(world, tmp_path, shared, weight):
    """Eq. 8 at weight 1 tells a success from a miss, and nothing of IoU; the log tells both."""
    eq_8 = make_reward(stored(world[0])[1], FAMILY, weight)

    def answered(completions, gt_box, image_wh, **kwargs):
        """Of four answers one is right, one has 40 % of the box, and two have none."""
        texts = [None] * len(completions)
        for row, ((x1, y1, x2, y2), wh) in enumerate(zip(gt_box, image_wh, strict=True)):
            right = (x2 - 0.6 * (x2 - x1) * (row % 4), y2)
            if row % 4 < 2:
                text = FAMILY.answer([x1, y1, *right], wh, "square", "red")
                texts[row] = text.removeprefix(FAMILY.reasoning_opener)
        return eq_8(texts, gt_box, image_wh, **kwargs)

    trainer, _ = trainer_of(world, tmp_path, shared=shared, reward=answered, max_steps=1)
    trainer.train()
    log = tmp_path / "log.jsonl"
    assert logged(log, "acc_at_50") == [0.25]
    assert logged(log, "mean_iou") == [pytest.approx(1.4 / 4, abs=0.02)]  # the grid rounds
    assert logged(log, "reward") == [pytest.approx((weight + (1 - weight) * 1.4) / 4, abs=0.02)]


def test_a_completion_that_is_none_is_kept_as_empty(world, tmp_path):
    assert answer_texts([None, [{"role": "assistant", "content": None}], "x"]) == ["", "", "x"]
    keeper = GroupKeeper(tmp_path / "groups.jsonl", "<think>\n")
    keeper.keep(1, world[1][:1] * 2, [None, "x"], torch.tensor([0.0, 1.0]), 2)
    assert keeper.groups[0]["completions"] == ["<think>\n", "<think>\nx"]


def test_rows_that_are_no_groups_are_left_out(tmp_path):
    """The figure compares rewards, and a training that goes on compares steps."""
    group = {"step": 1, "completions": ["x"], "rewards": [1.0], "advantages": [0.0]}
    odd = [{}, *({**group, name: None} for name in group), {**group, "rewards": [None]}]
    odd += [{**group, "rewards": [1.0, 0.0]}, {**group, "completions": "x"}]
    empty = {**group, "completions": [None]}  # one completion without text is no reason
    write_jsonl(tmp_path / "groups.jsonl", [*odd, group, empty])
    assert read_groups(tmp_path / "groups.jsonl") == [group, empty]


def test_profile_values_become_trl_s_options(tmp_path):
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


def test_a_step_has_the_profile_s_size_on_any_number_of_processes(tmp_path, monkeypatch):
    """Eight processes divide a step's 16 completions among them; each does not sample all of it."""

    def of_world(size):
        def config(**options):
            batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
            return SimpleNamespace(n_gpu=1, world_size=size, generation_batch_size=size * batch)

        return config

    monkeypatch.setenv("WORLD_SIZE", "8")
    options = grpo_options(per_device_train_batch_size=2)
    monkeypatch.setattr(grpo_module, "GRPOConfig", of_world(8))
    assert grpo_module.grpo_config(options, tmp_path, 0).generation_batch_size == 16
    monkeypatch.setattr(grpo_module, "GRPOConfig", of_world(1))
    with pytest.raises(TrainingError, match="would sample 2 completions instead of .* = 16"):
        grpo_module.grpo_config(options, tmp_path, 0)


class StandInVLLM:
    """Records the calls of TRL's VLLMGeneration and of vLLM's LLM, which has its engine inside."""

    def __init__(self, **options):
        self.calls, self.llm, self.llm_engine = [], self, SimpleNamespace()
        self.llm_engine.reset_encoder_cache = lambda: self.calls.append("encoder")
        self.top_p, self.top_k = options.get("top_p", 1.0), options.get("top_k", 0)

    def sync_weights(self):
        self.calls.append("sync")

    def reset_prefix_cache(self):
        self.calls.append("prefix")

    def generate(self, **kwargs):
        self.calls.append((self.top_p, self.top_k))


@pytest.fixture
def colocated(world, tmp_path, monkeypatch):
    """A trainer that believes a vLLM in its process; options of the profile as arguments."""

    def make(**changes):
        def start(trainer, *args, **kwargs):
            plain(trainer, *args, **kwargs)
            trainer.use_vllm, trainer.vllm_mode = True, "colocate"
            trainer.vllm_generation = StandInVLLM(top_p=trainer.top_p, top_k=trainer.top_k)

        plain = grpo_trl.TimedGRPO.__init__
        monkeypatch.setattr(grpo_trl.TimedGRPO, "__init__", start)
        return trainer_of(world, tmp_path, shared=False, **changes)[0]

    return make


def test_new_weights_empty_the_caches_of_the_old_ones(colocated):
    """Features of images that come again would be those of the weights before."""
    vllm = colocated().vllm_generation
    vllm.sync_weights()
    assert vllm.calls == ["sync", "encoder", "prefix"]
    with pytest.raises(TrainingError, match="this vLLM has no reset_encoder_cache"):
        grpo_trl.reset_caches(SimpleNamespace())


@pytest.mark.parametrize("status", [200, 404])
def test_new_weights_empty_the_image_features_of_a_server(colocated, status):
    """TRL asks a server to empty the prompts' keys and values only."""
    trainer = colocated()
    trainer.vllm_mode, vllm = "server", trainer.vllm_generation

    def post(url):
        vllm.calls.append(url)
        return SimpleNamespace(status_code=status)

    vllm.vllm_client = SimpleNamespace(
        base_url="http://127.0.0.1:8000", session=SimpleNamespace(post=post)
    )
    if status == 200:
        vllm.sync_weights()
    else:
        with pytest.raises(TrainingError, match="answered 404, .* image features of old weights"):
            vllm.sync_weights()
    assert vllm.calls == ["sync", "http://127.0.0.1:8000/reset_encoder_cache"]


def test_vllm_gets_a_context_of_prompt_and_completion_and_sleeps(world, tmp_path):
    """32,768 tokens would be set aside for prompts of a few hundred."""
    trainer, _ = trainer_of(world, tmp_path, shared=False, max_model_len=4096)
    assert trainer.args.vllm_max_model_length == 4096
    with pytest.raises(TrainingError, match="no room for a prompt"):
        grpo_module.rollout_context(grpo_options(max_model_len=1024, max_completion_length=1024))
    options = grpo_options(max_model_len=4096)
    assert "--max-model-len 4096 " in grpo_module.server_command("model", options, 1)
    paper = load_profile("paper-qwen3vl-8b").grpo
    assert trl_options(paper, tmp_path, 0)["vllm_enable_sleep_mode"]
    served = replace(paper, rollout="vllm-server")
    assert not trl_options(served, tmp_path, 0)["vllm_enable_sleep_mode"]


@pytest.mark.parametrize("name", [name for name in profile_names() if name.startswith("paper")])
def test_paper_profiles_leave_room_for_an_image(name):
    """13 tiles of InternVL-3, or a frame of 1920 x 1080 pixels and patches of 32 for Qwen3-VL."""
    profile = load_profile(name)
    image = {"internvl-3": 13 * 256, "qwen3-vl": 60 * 34}[profile.models.small.family]
    text = 400  # the question and the template
    needed = image + text + profile.grpo.max_completion_length
    assert needed <= grpo_module.rollout_context(profile.grpo) <= 2 * needed


@pytest.mark.parametrize("name", profile_names())
def test_trainer_and_launcher_agree_on_mixed_precision(tmp_path, name):
    """DeepSpeed refuses a trainer whose bf16 is not what the accelerate configuration says."""
    profile = load_profile(name)
    if profile.launch.accelerate_config is None:
        pytest.skip("no launcher")
    file = project_root() / f"egm_lib/pipeline/configs/{profile.launch.accelerate_config}.yaml"
    stated = yaml.safe_load(file.read_text(encoding="utf-8"))["mixed_precision"]
    options = trl_options(profile.grpo, tmp_path, 0, profile.launch.num_processes)
    assert options["bf16"] == (stated == "bf16") and not options["fp16"]
    assert (profile.sft.dtype == "bfloat16") == (stated == "bf16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of machines without a GPU")
def test_vllm_without_a_gpu_is_reported_before_anything_starts():
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


def test_a_server_that_does_not_answer_is_reported_with_the_command_for_it(
    world, tmp_path, monkeypatch
):
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
        TrainingError, match="240.0 seconds. Start one .* `trl vllm-serve --model "
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


def test_checkpoints_come_as_often_as_the_profile_says(world, tmp_path):
    trainer, _ = trainer_of(world, tmp_path, save_minutes=7.0)
    assert trainer.clock.save_seconds == 7 * 60


def test_a_file_without_samples_is_reported_in_one_sentence(world, tmp_path):
    with pytest.raises(TrainingError, match="no RL samples"):
        trainer_of((world[0], [], world[2]), tmp_path)
