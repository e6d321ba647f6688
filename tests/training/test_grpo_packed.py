"""Packed groups: the prompt of a group is read once, and nothing that is learnt from it changes.

The truth is TRL's own path, which gives each completion its own prompt, on the same completions.
"""

import itertools
from types import SimpleNamespace

import pytest
import torch
from training_world import grpo_options, make_samples, store_model, stored
from trl import GRPOTrainer

from egm_lib.grpo import make_grpo_trainer, question_rows
from egm_lib.profile import Lora
from egm_lib.prompts import FAMILIES
from egm_lib.training import grpo_trl, packed_groups
from egm_lib.training.checkpoints import work_folder
from egm_lib.training.micro_batches import by_group, packed_row_counts
from egm_lib.training.packed_groups import IGNORED, pack, packed_logps, shared_runs
from egm_lib.training.packing_check import SAME

FAMILY_NAMES = ("qwen3-vl", "internvl-3")
TRAINED_VISION = {"freeze_vision": False, "freeze_merger": False}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models of both families by name, and samples with prompts of unlike lengths."""
    folder = tmp_path_factory.mktemp("world")
    models = {name: store_model(folder / name, name) for name in FAMILY_NAMES}
    samples = [
        {**sample, "expression": "square" + " red" * (5 * number)}
        for number, sample in enumerate(make_samples(folder, images=4, per_image=1))
    ]
    return models, samples, folder


def half_right(completions, **kwargs) -> list[float]:
    """Rewards of 1 and 0 in turns; the completions of every other group are all alike."""
    return [float(row % 2 == 0 or row // 4 % 2) for row in range(len(completions))]


def trainer_of(world, tmp_path, family: str = "qwen3-vl", reward=half_right, **changes):
    """A trainer of TRL's rollouts, whose sampler gives 2 to 9 tokens; the longest are cut off."""
    models, samples, root = world
    model, processor = stored(models[family], family)
    trainer = make_grpo_trainer(
        model,
        processor,
        question_rows(samples, FAMILIES[family], root),
        FAMILIES[family],
        grpo_options(**changes),
        work=work_folder(tmp_path / "out"),
        log=tmp_path / "log.jsonl",
        groups=tmp_path / "groups.jsonl",
        seed=0,
        shared_prefix=False,
        reward=reward,
    )
    end, number = processor.tokenizer.eos_token_id, itertools.count(1)

    def single_turn(prompt_ids, *args, **kwargs):
        lengths = [2 + next(number) % 8 for _ in prompt_ids]
        return [[40 + n] * (n - 1) + [end if n < 8 else 41] for n in lengths], None

    trainer._generate_single_turn = single_turn
    if trainer.ref_model is not None:  # a reference that differs: the KL is not zero
        with torch.no_grad():
            trainer.ref_model.model.language_model.norm.weight.mul_(1.05)
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def step(trainer) -> tuple[float, dict]:
    """Loss and gradients of one update of 16 rows, in as many accumulation steps as it takes."""
    rows = [row for row in trainer.train_dataset for _ in range(4)]
    torch.manual_seed(0)
    trainer.model.train()
    count = trainer.args.gradient_accumulation_steps
    loss = sum(trainer.training_step(trainer.model, rows, None).item() for _ in range(count))
    return loss, {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def rollout(trainer) -> dict:
    """TRL's batch of all rows, groups side by side."""
    trainer.model.train()
    return trainer._generate_and_score_completions(
        [row for row in trainer.train_dataset for _ in range(4)]
    )


def logps(trainer, batch: dict, model=None, **kwargs) -> torch.Tensor:
    ids = [batch[f"{part}_ids"] for part in ("prompt", "completion")]
    masks = [batch[f"{part}_mask"] for part in ("prompt", "completion")]
    names = ("pixel_values", "image_grid_thw", "num_images", "num_tiles", "mm_token_type_ids")
    images = {name: batch.get(name) for name in names}
    return trainer._get_per_token_logps_and_entropies(
        model or trainer.model,
        torch.cat(ids, 1),
        torch.cat(masks, 1),
        ids[1].shape[1],
        **images,
        **kwargs,
    )[0]


def clipped_update(trainer, batch: dict) -> tuple[float, float, dict]:
    """Loss, share of clipped ratios and gradients of an update, given its old log-probs."""
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    clipped = trainer._metrics["train"]["clip_ratio/region_mean"][-1]
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), clipped, gradients


def noisy(logps_B_C: torch.Tensor) -> torch.Tensor:
    """Log-probs of a policy that differs, so that some ratios are clipped."""
    noise_B_C = torch.randn(logps_B_C.shape, generator=torch.Generator().manual_seed(0))
    return logps_B_C + 0.3 * noise_B_C


def assert_same_gradients(
    gradients: dict, expected: dict, relative: float = 1e-5, absolute: float = 1e-7
) -> None:
    """Every gradient within `relative` of its largest value, plus `absolute`."""
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        limit = relative * gradient.abs().max().item() + absolute
        torch.testing.assert_close(gradients[name], gradient, atol=limit, rtol=0, msg=name)


def test_a_packed_row_by_hand():
    """Prompt 1 2 3 with completions 7 8 and 9, prompt 4 5 with 6; M-RoPE's positions may jump."""
    positions = [torch.tensor([[0, 1, 5]]), torch.tensor([[0, 1]])]
    row = pack(
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5])],
        positions,
        [[torch.tensor([7, 8]), torch.tensor([9])], [torch.tensor([6])]],
    )
    assert row.ids_1_L.tolist() == [[1, 2, 3, 7, 3, 4, 5]]
    assert row.positions_A_L.tolist() == [[0, 1, 5, 6, 5, 0, 1]]
    none = IGNORED
    assert row.targets_1_L.tolist() == [[none, none, 7, 8, 9, none, 6]]
    first, second = row.groups
    assert (first.prompt, second.prompt) == (slice(0, 2), slice(5, 6))
    assert first.places_N_T.flatten()[first.kept_K].tolist() == [2, 3, 4]
    assert first.kept_K.tolist() == [0, 1, 2]  # the second completion has one token
    both = [[1, 1, 1, 0], [1, 1, 1, 1]]  # two tokens of the prompt, then up to the token itself
    assert first.mask_T_S.int().tolist() == both


def test_rows_share_a_prompt_only_with_their_image():
    """Two images of one size may be asked the same question."""
    prompts = [torch.tensor(ids) for ids in ([1, 2], [1, 2], [1, 2], [1, 2, 3])]
    images = [torch.tensor(pixels) for pixels in ([0.0], [0.0], [1.0], [1.0])]
    assert shared_runs(prompts, images) == [range(2), range(2, 3), range(3, 4)]


def test_groups_fill_micro_batches_of_so_many_tokens():
    # A prompt counts once: 10 + 5 + 5 = 20, and the next group would make it 35
    assert packed_row_counts([10] * 4, [5] * 4, 2, 34) == [2, 2]
    assert packed_row_counts([10] * 4, [5] * 4, 2, 35) == [3, 1]  # its second row reads it again
    assert packed_row_counts([10] * 4, [5] * 4, 2, 40) == [4]
    assert packed_row_counts([10, 10], [50, 5], 2, 30) == [1, 1]  # one beyond it stands alone
    masks = {
        "prompt_mask": torch.ones(4, 2),
        "completion_mask": torch.ones(4, 5).tril(torch.tensor(-1)),
    }
    assert by_group(masks, 2) == [3, 2, 1, 0]


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_log_probs_equal_those_of_rows_with_their_own_prompt(world, tmp_path, family):
    """Float32, prompts and completions of unlike lengths, some completions masked."""
    options = {"family": family, "beta": 0.0, "mask_truncated_completions": True}
    trainer = trainer_of(world, tmp_path, **options)
    batch = rollout(trainer)
    lengths = batch["completion_mask"].sum(dim=1)
    assert batch["prompt_mask"].sum(dim=1).unique().numel() == 4 and (lengths == 0).any()
    kept = batch["completion_mask"].bool()
    with torch.no_grad():
        expected = logps(trainer, batch)
        trainer.packs = True
        got = logps(trainer, batch)
    # TRL counts InternVL-3's positions from the padding: rotations round otherwise
    torch.testing.assert_close(got[kept], expected[kept], atol=1e-5, rtol=5e-6)
    assert (got[~kept] == 0).all()
    # Of a whole group that is masked nothing is scored, and its gradient is zero, not missing
    nothing = {**batch, "completion_mask": torch.zeros_like(batch["completion_mask"])}
    trainer.model.zero_grad()
    packed_logps(trainer.model, trainer.model, nothing)[0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.01, **TRAINED_VISION},
        # TRL's entropy is a mean over an accumulation step: there is only one
        {
            "beta": 0.0,
            "entropy_coef": 0.05,
            "mask_truncated_completions": True,
            "per_device_train_batch_size": 16,
        },
        {"beta": 0.01, "lora": Lora(r=2, alpha=4)},
        {"beta": 0.01, "ratio_level": "sequence", "micro_batch_tokens": 200, **TRAINED_VISION},
    ],
    ids=["vision", "entropy-masked", "lora", "budget"],
)
def test_loss_and_gradients_equal_trl_s(world, tmp_path, family, changes):
    trl = trainer_of(world, tmp_path, family, shared_prefix="off", **changes)
    packed = trainer_of(world, tmp_path, family, **changes)
    for trainer in (trl, packed):  # an adapter that does something: it starts as zero
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
    expected_loss, expected = step(trl)
    loss, gradients = step(packed)
    assert packed.packs and not trl.packs
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    vision = [name for name in gradients if "visual" in name or "vision_tower" in name]
    assert bool(vision) == (not grpo_options(**changes).freeze_vision)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize(
    ("family", "beta"), [("qwen3-vl", 0.0), ("qwen3-vl", 0.05), ("internvl-3", 0.0)]
)
def test_gradient_checkpointing_and_clipping_change_nothing(world, tmp_path, family, beta):
    """Old log-probs that differ, so that some ratios are clipped."""
    found = []
    for mode in ("off", "auto"):
        trainer = trainer_of(
            world, tmp_path, family, shared_prefix=mode, beta=beta, **TRAINED_VISION
        )
        batch = rollout(trainer)
        with torch.no_grad():
            batch["old_per_token_logps"] = noisy(logps(trainer, batch))
        if mode == "auto":
            trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(clipped_update(trainer, batch))
        assert trainer.packs == (mode == "auto")
    (expected, share, truth), (loss, clipped, gradients) = found
    assert 0.05 < share < 0.95
    assert (loss, clipped) == pytest.approx((expected, share), abs=1e-6)
    assert_same_gradients(gradients, truth)


def in_float64(model) -> None:
    """Float64 weights and rotations: TRL counts InternVL-3's positions from the padding, and in
    float32 the rotations of other positions round otherwise."""
    rotary = model.double().model.language_model.rotary_emb
    pairs = rotary.inv_freq.numel()
    theta = rotary.config.rope_parameters["rope_theta"]
    speeds_R = theta ** -(torch.arange(pairs, dtype=torch.float64) / pairs)

    def rotations(states, position_ids):
        angles_B_L_D = (position_ids[..., None] * speeds_R).repeat(1, 1, 2)
        return angles_B_L_D.cos(), angles_B_L_D.sin()

    rotary.forward = rotations


def test_in_float64_internvl_s_gradients_are_trl_s(world, tmp_path):
    """With KL, clipping and a trained tower; norms and head still compute in float32."""
    found = []
    for mode in ("off", "auto"):
        trainer = trainer_of(
            world, tmp_path, "internvl-3", shared_prefix=mode, beta=0.05, **TRAINED_VISION
        )
        in_float64(trainer.model), in_float64(trainer.ref_model)
        batch = rollout(trainer)
        batch["pixel_values"] = batch["pixel_values"].double()
        with torch.no_grad():
            batch["old_per_token_logps"] = noisy(logps(trainer, batch))
        found.append(clipped_update(trainer, batch))
        assert trainer.packs == (mode == "auto")
    (expected, _, truth), (loss, _, gradients) = found
    assert loss == pytest.approx(expected, abs=1e-8)
    assert_same_gradients(gradients, truth, 2e-7, 0.0)


class StandInVLLM:
    """Answers as TRL's VLLMGeneration does, with log-probs of the trainer's model.

    Its answers have 2 to 9 tokens, and the longest are cut off. In the trainer's process, vLLM gets
    one token for an image and expands it.
    """

    def __init__(self, trainer):
        self.trainer, self.number = trainer, itertools.count(1)
        self.top_p, self.top_k = 1.0, 0
        self.llm = SimpleNamespace(
            reset_encoder_cache=lambda: None, reset_prefix_cache=lambda: None
        )
        self.prompts: list[list[int]] = []
        session = SimpleNamespace(post=lambda url: SimpleNamespace(status_code=200))
        self.vllm_client = SimpleNamespace(base_url="", session=session)

    def sync_weights(self) -> None:
        pass

    @torch.no_grad()
    def generate(self, prompts, images, **kwargs):
        processor, model = self.trainer.processing_class, self.trainer.model
        end, image_token = processor.tokenizer.eos_token_id, processor.image_token_id
        in_process = self.trainer.vllm_mode == "colocate"
        read, answers, logps = [], [], []
        for ids, (image,) in zip(prompts, images, strict=True):
            vision = processor.image_processor(images=[image], return_tensors="pt")
            count = int(vision["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
            assert ids.count(image_token) == (1 if in_process else count)
            if in_process:
                place = ids.index(image_token)
                ids = [*ids[:place], *[image_token] * count, *ids[place + 1 :]]
            length = 2 + next(self.number) % 8
            answer = [40 + length] * (length - 1) + [end if length < 8 else 41]
            row = torch.tensor([[*ids, *answer]])
            logits = model(
                input_ids=row, mm_token_type_ids=(row == image_token).long(), **vision
            ).logits[0, len(ids) - 1 : -1]
            scored = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer)[:, None])
            read.append(ids), answers.append(answer), logps.append(scored.tolist())
        self.prompts += read
        return read, answers, logps, None


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_groups_that_vllm_sampled_are_packed_too(world, tmp_path, monkeypatch, mode):
    """Sampler and trainer agree, groups stay together, and clipping and gradients are TRL's."""

    def start(trainer, *args, **kwargs):
        plain(trainer, *args, **kwargs)
        trainer.use_vllm, trainer.vllm_mode = True, mode
        trainer.vllm_generation, trainer._last_loaded_step = StandInVLLM(trainer), -1

    plain = grpo_trl.TimedGRPO.__init__
    monkeypatch.setattr(grpo_trl.TimedGRPO, "__init__", start)
    found = []
    for way in ("off", "auto"):
        trainer = trainer_of(
            world,
            tmp_path,
            shared_prefix=way,
            beta=0.05,
            mask_truncated_completions=True,
            per_device_train_batch_size=16,
            **TRAINED_VISION,
        )
        del trainer._generate_single_turn  # TRL's own, which asks vLLM
        trainer.model.train()
        rows = [row for row in trainer.train_dataset for _ in range(4)]
        torch.manual_seed(0)
        batch = trainer._prepare_inputs(rows)
        lengths = batch["completion_mask"].sum(dim=1)
        assert (lengths == 0).any() and lengths.unique().numel() > 3
        trainer._compare_policies(batch)  # raises if vLLM read other prompts
        assert trainer.checked
        if way == "auto":
            prompts = batch["prompt_ids"].view(4, 4, -1)
            assert (prompts == prompts[:, :1]).all()
        # By the completion, since TRL shuffles rows
        noise = torch.where(batch["completion_ids"] % 2 == 0, 0.3, -0.3)
        batch["old_per_token_logps"] = batch["old_per_token_logps"] + noise
        found.append(clipped_update(trainer, batch))
        assert trainer.packs == (way == "auto")
    (expected, share, truth), (loss, clipped, gradients) = found
    assert 0.05 < share < 0.95
    assert (loss, clipped) == pytest.approx((expected, share), abs=1e-6)
    assert any("visual" in name for name in truth)
    assert_same_gradients(gradients, truth)


def test_half_precision_differs_by_its_rounding(world, tmp_path):
    """bfloat16 under autocast over float32 weights: no farther from float32 than TRL's path is."""

    def gradient_of(mode: str, dtype: str | None):
        changes = {"shared_prefix": mode, "compute_dtype": dtype, "beta": 0.0, **TRAINED_VISION}
        trainer = trainer_of(world, tmp_path, **changes)
        _, gradients = step(trainer)
        assert trainer.packs == (mode == "auto")
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    truth = gradient_of("off", None)
    trl, packed = (gradient_of(mode, "bfloat16") for mode in ("off", "auto"))
    error_trl, error = ((g - truth).norm() / truth.norm() for g in (trl, packed))
    assert 0 < error < 1.5 * error_trl < 0.1


def test_an_image_is_encoded_once_a_group_and_passes_keep_the_budget(world, tmp_path, monkeypatch):
    budget, seen, patches = 200, [], []
    plain = packed_groups.pack

    def watched(*args):
        row = plain(*args)
        seen.append(row.ids_1_L.shape[1])
        return row

    monkeypatch.setattr(packed_groups, "pack", watched)
    trainer = trainer_of(world, tmp_path, micro_batch_tokens=budget, beta=0.0)
    trainer.model.model.visual.register_forward_pre_hook(
        lambda module, args: patches.append(len(args[0]))
    )
    step(trainer)
    seen.clear(), patches.clear()
    trainer._step = 0
    step(trainer)
    image = 64  # 64 x 64 pixels in patches of 8
    assert len(seen) > 2 and max(seen) <= budget
    # Two accumulation steps of two groups; a group that goes on in another pass is read again
    assert 4 * image <= sum(patches) <= (4 + len(seen)) * image < 16 * image


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 200}, {"lora": Lora(r=2, alpha=4)}])
def test_the_kl_s_reference_reads_packed_groups_too(world, tmp_path, monkeypatch, changes):
    """From the second rollout of a session on: the first is compared with TRL's path."""
    trainer = trainer_of(world, tmp_path, **changes)
    step(trainer)
    assert trainer.packs
    calls, plain = [], grpo_trl.packed_logps

    def watched(model, bare, batch):
        calls.append(torch.is_grad_enabled())
        return plain(model, bare, batch)

    monkeypatch.setattr(grpo_trl, "packed_logps", watched)
    batch = rollout(trainer)
    assert calls and not any(calls)
    trainer.packs = False
    with torch.no_grad():
        if trainer.ref_model is None:
            with trainer.model.disable_adapter():
                expected = logps(trainer, batch, batch_size=8)
        else:
            expected = logps(trainer, batch, trainer.ref_model, batch_size=8)
    kept = batch["completion_mask"].bool()
    torch.testing.assert_close(
        batch["ref_per_token_logps"][kept], expected[kept], atol=1e-5, rtol=0
    )


def test_without_a_kl_no_reference_is_run(world, tmp_path):
    trainer = trainer_of(world, tmp_path, beta=0.0)
    assert trainer.ref_model is None and "ref_per_token_logps" not in rollout(trainer)


def test_where_packing_gives_other_numbers_trl_s_path_goes_on(world, tmp_path, monkeypatch, capsys):
    """Positions that restart wrongly: only the comparison at the start can tell."""
    plain = packed_groups._positions
    monkeypatch.setattr(packed_groups, "_positions", lambda *args: [p * 2 for p in plain(*args)])
    broken = trainer_of(world, tmp_path)
    loss, gradients = step(broken)
    told = capsys.readouterr().out
    assert not broken.packs
    assert "other numbers than TRL's own path, which is used instead" in told
    assert "Set grpo.shared_prefix to off" in told and SAME not in told
    expected_loss, expected = step(trainer_of(world, tmp_path, shared_prefix="off"))
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("alike", [False, True])
def test_the_comparison_leaves_no_trace(world, tmp_path, alike, capsys):
    """Neither in the metrics nor in the gradient; it also works where all advantages are zero."""
    reward = (lambda completions, **kwargs: [1.0] * len(completions)) if alike else half_right
    trainer = trainer_of(world, tmp_path, beta=0.0, reward=reward)
    loss, gradients = step(trainer)
    assert trainer.packs and len(trainer._metrics["train"]["entropy"]) == 2
    told = capsys.readouterr().out
    assert SAME in told and "gradient norm" in told
    if alike:
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


def test_groups_that_a_batch_divides_read_their_own_prompts(world, tmp_path, capsys):
    changes = {"per_device_train_batch_size": 2, "beta": 0.0}
    trainer = trainer_of(world, tmp_path, **changes)
    assert not trainer.packing_unchecked
    assert (
        "grpo.per_device_train_batch_size = 2 is not a multiple of grpo.num_generations = 4"
        in capsys.readouterr().out
    )
    assert isinstance(trainer, GRPOTrainer)


def test_the_stored_model_does_not_name_our_attention(world, tmp_path):
    trainer = trainer_of(world, tmp_path, beta=0.0)
    trainer.model.save_pretrained(tmp_path / "stored")
    assert packed_groups.ATTENTION not in (tmp_path / "stored" / "config.json").read_text()
