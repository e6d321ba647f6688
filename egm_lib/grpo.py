"""GRPO (Sec. 4.2) through TRL's GRPOTrainer, with the reward of Eq. 8 and the objective of Eq. 3-7.

`python -m egm_lib.grpo --profile mini --seed 0 --task vanilla` reads the run's RL samples and its
`small-sft`, and writes `small-egm`. Logged a step (TRL's names where it has one): reward and its
parts (acc_at_50, mean_iou), group_std and frac_reward_zero_std (groups that teach nothing),
completions/*, kl, entropy, clip_ratio/*, seconds of rollout, reward and update (time/*),
tokens_per_second (sampled). Some of the last groups are kept to be read (egm_lib.groups).

Deviations from TRL, with rollouts by transformers on one process:
1. A group's prompt is read once, in sampling and in the update.
2. Groups whose rewards are all equal are not trained on: their advantages are zero; their KL and
   entropy terms are lost, and their tokens do not count in the token-level mean.
3. With mask_truncated_completions a truncated completion leaves the update's batch, where TRL
   carries it along masked. With vLLM, its weight for tokens that the sampler finds more or less
   likely than the trainer is off: Eq. 3 has none. The first step of every sitting compares the
   trainer's log-probs with the sampler's and stops where they disagree.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from trl.trainer.utils import RepeatSampler

from egm_lib.data import open_image, read_samples, resolve_image
from egm_lib.engines import MAX_MODEL_LEN, VLLM_LIMITS, vllm_pictures
from egm_lib.groups import SAMPLE_FIELDS, GroupKeeper
from egm_lib.loss import group_advantages, grpo_loss
from egm_lib.models import picture_tokens
from egm_lib.profile import GRPO, Profile, Run
from egm_lib.prompts import FAMILIES, Family
from egm_lib.reward import egm_reward
from egm_lib.shared_prefix import ROLLOUT_ROWS, Reader, SamplingOptions, sample, suffix_logps
from egm_lib.training import (
    Clock,
    TimedSchedule,
    TrainingError,
    chat_text,
    check_device,
    check_memory,
    common_options,
    freeze_tower,
    is_finished,
    load_start,
    lora_config,
    require_checkpoint,
    require_file,
    stage_command,
    train_to,
    work_folder,
)
from egm_lib.vision_cache import freeze_vision

MODEL = "small-egm"
# Nats: bf16 and kernels differ by about 0.01, a top-p of 0.9 by 0.1 at most, another prompt by
# about 1.
MAX_LOGP_GAP = 0.1


def grpo_options(options: GRPO, work: Path, seed: int, num_processes: int = 1) -> dict:
    """A profile's `grpo` section as TRL's GRPOConfig takes it."""
    rows = options.prompts_per_step * options.num_generations
    per_step = options.per_device_train_batch_size * num_processes
    if rows % per_step:
        raise TrainingError(
            f"prompts_per_step x num_generations = {rows} does not divide into batches of {per_step} "
            f"({num_processes} processes): change grpo.per_device_train_batch_size."
        )
    return common_options(work, seed, options.dtype) | {
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.per_device_train_batch_size,
        "gradient_accumulation_steps": rows // per_step,
        "num_generations": options.num_generations,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_steps,
        "max_completion_length": options.max_completion_length,
        "mask_truncated_completions": options.mask_truncated_completions,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or 0,
        "loss_type": "dapo",  # token-level mean, Eq. 3
        "beta": options.beta,
        # TRL's default multiplies the KL by the ratio; the paper's does not
        "use_bias_correction_kl": False,
        "epsilon": options.epsilon,
        "entropy_coef": options.entropy_coef,
        "scale_rewards": "group",  # Eq. 7
        "importance_sampling_level": options.ratio_level,
        "use_vllm": options.rollout != "transformers",
        "vllm_mode": "server" if options.rollout == "vllm-server" else "colocate",
        "vllm_gpu_memory_utilization": options.vllm_gpu_memory_utilization,
    }


def question_rows(samples: Iterable[Mapping], family: Family, root: Path) -> Iterator[dict]:
    """TRL's prompt rows of samples; `image` is a file, and what the reward needs stands beside
    it.
    """
    for sample_ in samples:
        yield {
            "prompt": [
                {"role": "user", "content": family.prompt(sample_["expression"], sample_["task"])}
            ],
            "image": str(resolve_image(sample_, root)),
            "gt_box": list(sample_["gt_box"]),
            "image_wh": [sample_["width"], sample_["height"]],
            "sample": {field: sample_[field] for field in SAMPLE_FIELDS},
        }


def begun_answer(processor, family: Family) -> str:
    """What the chat template has begun of every answer: `<think>`, or nothing."""
    begun = chat_text(processor, [{"role": "user", "content": "?"}]).endswith(
        family.reasoning_opener
    )
    return family.reasoning_opener if begun else ""


def make_reward(processor, family: Family, weight: float) -> Callable[..., list[float]]:
    """TRL's reward function; puts back what the chat template has begun before parsing."""
    opener = begun_answer(processor, family)

    def reward(completions, gt_box, image_wh, **kwargs) -> list[float]:
        texts = [opener + text for text in answer_texts(completions)]
        return egm_reward(texts, gt_box, image_wh, frame=family.frame, weight=weight)

    return reward


def answer_texts(completions: Sequence) -> list[str]:
    """Completions as texts; TRL gives those of a chat as messages."""
    return [each if isinstance(each, str) else each[-1]["content"] for each in completions]


def check_same_policy(trainer_logps: Tensor, sampler_logps: Tensor) -> float:
    """Mean |log p(trainer) - log p(sampler)| over tokens. Raises TrainingError where they are not
    the same policy.
    """
    gap = (trainer_logps - sampler_logps).abs().mean().item()
    if not gap <= MAX_LOGP_GAP:  # nan too
        raise TrainingError(
            f"trainer and sampler disagree: mean log-prob of the sampled tokens {trainer_logps.mean().item():.4f} by "
            f"the trainer, {sampler_logps.mean().item():.4f} by the sampler, mean difference {gap:.4f} "
            f"(limit {MAX_LOGP_GAP}). They see other prompts or other weights: compare the prompt ids that both get."
        )
    return gap


def collapse_picture_tokens(
    ids: Sequence[int], picture_token: int, ends: Collection[int] = ()
) -> list[int]:
    """Each run of picture tokens as one: vLLM in process expands them itself, and would see a
    longer prompt.

    ends: tokens before and after a picture that vLLM puts there too (InternVL-3's); they are left
    out.
    """
    runs = ((token, len(list(run))) for token, run in itertools.groupby(ids) if token not in ends)
    return [token for token, length in runs for _ in range(1 if token == picture_token else length)]


def check_same_prompts(trainer: Sequence[Sequence[int]], sampler: Sequence[Sequence[int]]) -> None:
    """Raises TrainingError where the sampler has read other tokens than the trainer: other answers
    would be trained.
    """
    for ours, theirs in zip(trainer, sampler, strict=True):
        if list(ours) != list(theirs):
            raise TrainingError(
                f"the sampler read a prompt of {len(theirs)} tokens, and the trainer has {len(ours)}: they expand a "
                "picture in different ways, which the checkpoint's processor and vLLM's model of it decide."
            )


class EpochSampler(RepeatSampler):
    """TRL's sampler, shuffled by seed and epoch: a run that is resumed in a later epoch sees the
    same order.
    """

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class _Timed(TimedSchedule, GRPOTrainer):
    """GRPOTrainer under our clock and log, with an order of prompts that survives an
    interruption.
    """

    def __init__(self, *args, clock: Clock, keeper: GroupKeeper, reward_weight: float, **kwargs):
        self.clock, self.keeper, self.reward_weight = clock, keeper, reward_weight
        self.checked = False  # trainer and sampler have been compared
        # In rollout and reward, ever; in forward and backward of this step
        self.sampling_s = self.update_s = 0.0
        super().__init__(*args, callbacks=[clock, keeper], **kwargs)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def training_step(self, model, inputs, num_items_in_batch=None):
        began, before = time.perf_counter(), self.sampling_s
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.update_s += time.perf_counter() - began - (self.sampling_s - before)
        if self.accelerator.sync_gradients:
            self._note(**{"time/update": self.update_s})
            self.update_s = 0.0
        return loss

    def _note(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def _note_rollout(self, completions: Sequence[Sequence[int]], seconds: float) -> None:
        self.sampling_s += seconds
        self._note(
            **{"time/rollout": seconds, "tokens_per_second": sum(map(len, completions)) / seconds}
        )

    def _note_rewards(
        self, rows: Sequence[Mapping], texts: Sequence[str], rewards_B: Tensor, seconds: float
    ) -> None:
        """rewards_B: of all processes, groups side by side; rows and texts: of this one; the main
        one's come first.
        """
        self.sampling_s += seconds
        # Eq. 8 is 0..(1-w)/2 for a miss and above w + (1-w)/2 for a hit: success and IoU can be
        # read off it.
        weight = self.reward_weight
        success_B = (rewards_B > weight + (1 - weight) / 2).float()
        group_std = rewards_B.view(-1, self.num_generations).std(dim=1).mean().item()
        self._note(
            **{"time/reward": seconds, "acc_at_50": success_B.mean().item(), "group_std": group_std}
        )
        if weight < 1:
            self._note(mean_iou=((rewards_B - weight * success_B) / (1 - weight)).mean().item())
        samples = [row["sample"] for row in rows]
        self.keeper.keep(
            self.state.global_step + 1, samples, texts, rewards_B, self.num_generations
        )


@contextmanager
def vllm_options(**options: object) -> Iterator[None]:
    """Within it TRL starts its vLLM with these options besides its own, which leave no place for
    them.
    """
    plain = getattr(vllm_generation, "LLM", None)  # None: vLLM is not installed
    if plain is None:
        yield
        return
    vllm_generation.LLM = partial(plain, **options)
    try:
        yield
    finally:
        vllm_generation.LLM = plain


class PlainGRPO(_Timed):
    """TRL's own rollouts and loss, which equals ours (a test); with the cure for vLLM and the first
    step's check.
    """

    def __init__(self, *args, rollout_dtype: str, **kwargs):
        with vllm_options(dtype=rollout_dtype, **vllm_pictures(kwargs["processing_class"])):
            super().__init__(*args, **kwargs)
        if self.use_vllm and self.vllm_mode == "colocate":
            self.vllm_generation.generate = partial(
                self._generate_in_process, self.vllm_generation.generate
            )

    def _generate(self, prompts):
        began = time.perf_counter()
        generated = super()._generate(prompts)
        self._note_rollout(generated[1], time.perf_counter() - began)
        return generated

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        began = time.perf_counter()
        rewards_B_1 = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._note_rewards(
            inputs, answer_texts(completions), rewards_B_1[:, 0], time.perf_counter() - began
        )
        return rewards_B_1

    def _generate_in_process(
        self, generate: Callable, prompts: list[list[int]], images: list | None, **kwargs
    ):
        """vLLM's `generate` with pictures as vLLM wants them; it must come to the prompts that the
        trainer has.
        """
        if images is None:
            return generate(prompts=prompts, images=None, **kwargs)
        processor = self.processing_class
        # InternVL-3's
        ends = [getattr(processor, f"{end}_image_token_id", None) for end in ("start", "end")]
        bare = [collapse_picture_tokens(ids, processor.image_token_id, ends) for ids in prompts]
        read, *sampled = generate(prompts=bare, images=images, **kwargs)
        check_same_prompts(prompts, read)
        return read, *sampled

    def _compute_loss(self, model, inputs):
        if not self.checked and "sampling_per_token_logps" in inputs:
            keep = inputs["completion_mask"].bool() & ~inputs["sampling_per_token_logps"].isnan()
            check_same_policy(
                inputs["old_per_token_logps"][keep], inputs["sampling_per_token_logps"][keep]
            )
            self.checked = True
            # TRL brings the trainer's log-probs along where it also weights the loss by exp(trainer
            # - sampler) summed over a completion. Eq. 3 has no such weight, and with top-p below 1
            # it is far below 1: the sampler's are those of a cut and renormalised distribution.
            self.vllm_importance_sampling_correction = False
        return super()._compute_loss(model, inputs)


class SharedPrefixGRPO(_Timed):
    """GRPOTrainer whose rollouts and update read each picture and prompt once a group. One process,
    frozen vision.
    """

    def __init__(self, *args, reader: Reader, rollout_dtype: str, **kwargs):
        self.reader, self.rollout_dtype, self.waiting = reader, rollout_dtype, []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        if not self.waiting:
            self.waiting = self._roll_out(generation_batch)
        return self.waiting.pop(0)

    def _policy(self, model):
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _roll_out(self, rows: list[dict]) -> list[dict]:
        """Samples, scores and normalises a step's groups; returns one part for each accumulation
        step.
        """
        group_size, began = self.num_generations, time.perf_counter()
        processor = self.processing_class
        first = rows[::group_size]
        prompts = [
            self.reader.prompt(Path(row["image"]), chat_text(processor, row["prompt"]))
            for row in first
        ]
        completions, logps = self._sample(prompts)
        sampled = time.perf_counter()
        self._note_rollout(completions, sampled - began)
        texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        rewards_B = torch.tensor(self.reward_funcs[0](completions=texts, **columns))
        self._note_rewards(rows, texts, rewards_B, time.perf_counter() - sampled)
        self._note_rollouts(rewards_B, completions)
        return self._parts(prompts, completions, logps, group_advantages(rewards_B, group_size))

    def _sample(self, prompts) -> tuple[list[list[int]], list[list[float]]]:
        """All completions of all prompts, in order; ROLLOUT_ROWS at a time."""
        options = SamplingOptions(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            picture_tokens(self.model.config),
        )
        policy, completions, logps = self._policy(self.model), [], []
        step = max(1, ROLLOUT_ROWS // self.num_generations)
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.rollout_dtype)
        cast = (
            nullcontext() if dtype is None else torch.autocast(self.accelerator.device.type, dtype)
        )
        policy.eval()
        with cast:
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                features = self.reader.features([prompt.picture for prompt in part])
                tokens, scores = sample(
                    policy, part, features, self.num_generations, options, self.eos_token_ids
                )
                completions += tokens
                logps += scores
        policy.train()
        return completions, logps

    def _note_rollouts(self, rewards_B: Tensor, completions: list[list[int]]) -> None:
        """What TRL notes itself, under its names."""
        groups = rewards_B.view(-1, self.num_generations)
        lengths_B = torch.tensor([len(tokens) for tokens in completions], dtype=torch.float)
        cut = sum(map(self._is_truncated, completions))
        self._note(
            **{
                "reward": rewards_B.mean().item(),
                "reward_std": rewards_B.std().item(),
                "frac_reward_zero_std": (groups.amax(dim=1) == groups.amin(dim=1))
                .float()
                .mean()
                .item(),
                "completions/mean_length": lengths_B.mean().item(),
                "completions/max_length": lengths_B.max().item(),
                "completions/clipped_ratio": cut / len(completions),
            }
        )

    def _is_truncated(self, tokens: list[int]) -> bool:
        return tokens[-1] not in self.eos_token_ids

    def _trained_rows(
        self, completions: list[list[int]], advantages_B: Tensor
    ) -> dict[int, list[int]]:
        """Completions to train on, by group: those of mixed groups, without truncated ones where
        they are masked.
        """
        size, trained = self.num_generations, {}
        for group in advantages_B.view(-1, size).ne(0).any(dim=1).nonzero()[:, 0].tolist():
            rows = range(group * size, (group + 1) * size)
            kept = [
                r
                for r in rows
                if not (self.mask_truncated_completions and self._is_truncated(completions[r]))
            ]
            trained |= {group: kept} if kept else {}
        return trained

    def _parts(self, prompts, completions, logps, advantages_B: Tensor) -> list[dict]:
        """The groups in as many parts as there are accumulation steps, of like lengths, so that
        little is padded.
        """
        device, trained = self.accelerator.device, self._trained_rows(completions, advantages_B)
        groups = sorted(
            trained, key=lambda group: max(len(completions[row]) for row in trained[group])
        )
        count = self.args.gradient_accumulation_steps
        num_tokens = sum(len(completions[row]) for rows in trained.values() for row in rows)
        parts = []
        for number in range(count):
            chosen = groups[number * len(groups) // count : (number + 1) * len(groups) // count]
            rows = [row for group in chosen for row in trained[group]]
            part = {
                "prompts": [prompts[group] for group in chosen],
                "num_tokens": float(num_tokens),
            }
            if rows:
                tokens = [torch.tensor(completions[row]) for row in rows]
                sizes = torch.tensor([len(trained[group]) for group in chosen], device=device)
                part |= {
                    "group": torch.arange(len(chosen), device=device).repeat_interleave(sizes),
                    "completion": pad_sequence(tokens, batch_first=True).to(device),
                    "mask": pad_sequence([torch.ones(len(t)) for t in tokens], batch_first=True).to(
                        device
                    ),
                    "sampler": pad_sequence(
                        [torch.tensor(logps[row]) for row in rows], batch_first=True
                    ).to(device),
                    "advantages": advantages_B[rows].to(device),
                }
            parts.append(part)
        return parts

    def _compute_loss(self, model, inputs):
        if not inputs["prompts"]:  # no mixed group in this part
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
        prompts, mask = inputs["prompts"], inputs["mask"]
        features = self.reader.features([prompt.picture for prompt in prompts])
        batch = (prompts, features, inputs["group"], inputs["completion"], mask, mask)
        with self.accelerator.autocast():
            entropy = "gradient" if self.entropy_coef else "value"
            logps, entropy = suffix_logps(
                self._policy(model), *batch, temperature=self.temperature, entropy=entropy
            )
        if not self.checked:
            keep = mask.bool()
            gap = check_same_policy(logps.detach()[keep], inputs["sampler"][keep])
            self._note(**{"sampling/sampling_logp_difference/mean": gap})
            self.checked = True
        loss, metrics = grpo_loss(
            logps,
            logps.detach(),
            inputs["advantages"],
            mask,
            ref_logps_B_T=self._reference_logps(model, batch),
            entropy_B_T=entropy,
            clip_ratio=self.epsilon_low,
            kl_weight=self.beta,
            entropy_weight=self.entropy_coef,
            ratio_level=self.importance_sampling_level,
            num_tokens=inputs["num_tokens"],
        )
        self._note(**metrics)
        return loss

    @torch.no_grad()
    def _reference_logps(self, model, batch) -> Tensor | None:
        if self.beta == 0.0:
            return None
        adapter = self.ref_model is None  # LoRA: the reference is the model without its adapter
        reference = self._policy(model) if adapter else self.ref_model
        without = (
            self.accelerator.unwrap_model(model).disable_adapter() if adapter else nullcontext()
        )
        with without, self.accelerator.autocast():
            return suffix_logps(reference, *batch, temperature=self.temperature)[0]


def make_trainer(
    model,
    processor,
    rows: Iterable[Mapping],
    family: Family,
    options: GRPO,
    *,
    work: Path,
    log: Path,
    groups: Path,
    seed: int,
    shared_prefix: bool | None = None,
    reward: Callable | None = None,
):
    """The trainer of the stage. rows: of `question_rows`. groups: file of the groups that are kept
    (egm_lib.groups).

    shared_prefix None: where it is possible. reward: another than Eq. 8.
    """
    dataset = Dataset.from_list(list(rows))
    if not len(dataset):
        raise TrainingError("there is no RL sample: the selection (notebook 05) kept none.")
    processes = max(
        1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    )
    config = GRPOConfig(**grpo_options(options, work, seed, processes))
    # Without it vLLM sets memory aside for all that the model could read, 262,144 tokens of
    # Qwen3-VL-Thinking.
    config.vllm_max_model_length = min(
        MAX_MODEL_LEN, model.config.get_text_config().max_position_embeddings
    )
    if config.use_vllm:  # with transformers TRL sees to it itself
        config.generation_kwargs = {
            "logit_bias": dict.fromkeys(picture_tokens(model.config), -100.0)
        }
    # TRL drops what does not fill a step: it would train on nothing
    if len(dataset) < options.prompts_per_step:
        repeats = -(-options.prompts_per_step // len(dataset))
        print(
            f"{len(dataset)} RL samples for steps of {options.prompts_per_step}: each stands {repeats} times in one"
        )
        dataset = Dataset.from_list(list(dataset) * repeats)
    clock, keeper = (
        Clock(log, options.max_minutes),
        GroupKeeper(groups, begun_answer(processor, family)),
    )
    arguments = {
        "model": model,
        "args": config,
        "processing_class": processor,
        "clock": clock,
        "keeper": keeper,
    }
    arguments |= {"peft_config": lora_config(options.lora), "rollout_dtype": options.rollout_dtype}
    arguments |= {"reward_weight": options.reward_weight}
    arguments |= {"reward_funcs": reward or make_reward(processor, family, options.reward_weight)}
    possible = family.name == "qwen3-vl" and options.freeze_vision and options.freeze_merger
    possible = possible and options.rollout == "transformers" and config.world_size == 1
    if possible if shared_prefix is None else shared_prefix:
        config.gradient_checkpointing = False  # it drops the keys and values that the group shares
        reader = Reader(processor, model, freeze_vision(model), open_image)
        return SharedPrefixGRPO(train_dataset=dataset, reader=reader, **arguments)
    freeze_tower(model, family, tower=options.freeze_vision, merger=options.freeze_merger)
    return PlainGRPO(train_dataset=dataset.cast_column("image", Image()), **arguments)


def check_rollout(options: GRPO) -> None:
    """Raises TrainingError, before anything long starts, where this machine cannot sample as the
    profile says.
    """
    if options.rollout == "transformers":
        return
    if not torch.cuda.is_available():
        raise TrainingError(
            f"grpo.rollout is {options.rollout!r}, and PyTorch sees no GPU here: run it on a GPU machine, "
            "or set grpo.rollout to transformers."
        )
    if importlib.util.find_spec("vllm") is None:
        raise TrainingError(
            f"grpo.rollout is {options.rollout!r}, and vLLM is missing: `pip install -e .[gpu]`."
        )


def run_grpo(run: Run, task: str, *, output: str | None = None) -> Path:
    """Trains a run's EGM model from its SFT model; returns its folder. A finished one is left as it
    is.
    """
    profile, out = run.profile, run.checkpoint(task, output or MODEL)
    if is_finished(out):
        return out
    family, options = FAMILIES[profile.models.small.family], profile.grpo
    check_rollout(options)
    check_device(options.dtype, "grpo")
    start = str(
        require_checkpoint(run, task, "small-sft", f"`python -m egm_lib.sft --task {task}`")
    )
    check_memory(profile, "grpo", start)
    samples = read_samples(require_file(run.samples(f"rl_{task}"), "notebook 05"))
    # A folder's name, not a model in memory: TRL loads the KL's reference from it.
    model, processor = load_start(
        start, profile.models.small, options.dtype if options.lora else "float32"
    )
    try:
        trainer = make_trainer(
            model,
            processor,
            question_rows(samples, family, profile.data.path),
            family,
            options,
            work=work_folder(out),
            log=run.log(f"grpo-{task}.jsonl"),
            groups=run.groups(task),
            seed=run.seed,
        )
    except OSError as error:  # a server that does not answer is one; TRL has waited for it
        if options.rollout != "vllm-server":
            raise
        raise TrainingError(
            f"{error} Start one, on GPUs of its own: `{server_command(start, options)}`"
        ) from error
    return train_to(trainer, processor, out)


def server_command(model: str, options: GRPO) -> str:
    """What starts a vLLM server that TRL can sample from and bring new weights to (grpo.rollout:
    vllm-server).
    """
    own = f"--dtype {options.rollout_dtype} --max-model-len {MAX_MODEL_LEN}"
    return f"trl vllm-serve --model {model} {own} --limit-mm-per-prompt '{json.dumps(VLLM_LIMITS)}'"


def dry_run(profile: Profile, seed: int, task: str, output: str | None) -> dict:
    """What would be trained, under TRL's own option names; loads no model."""
    run = Run(profile, seed)
    out = run.checkpoint(task, output or MODEL)
    own = {
        "stage": "grpo",
        "task": task,
        "model": str(run.checkpoint(task, "small-sft")),
        "output": str(out),
    }
    own |= {"samples": str(run.samples(f"rl_{task}")), "max_minutes": profile.grpo.max_minutes}
    own |= {
        "prompts_per_step": profile.grpo.prompts_per_step,
        "reward_weight": profile.grpo.reward_weight,
    }
    return own | grpo_options(profile.grpo, work_folder(out), seed, profile.launch.num_processes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.grpo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--output", help=f"name of the model; {MODEL} where it is not given")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved options as JSON")

    def act(run: Run, args: argparse.Namespace) -> object:
        if args.dry_run:
            return json.dumps(dry_run(run.profile, run.seed, args.task, args.output), indent=2)
        return run_grpo(run, args.task, output=args.output)

    return stage_command(parser, argv, act)


if __name__ == "__main__":
    sys.exit(main())
