"""GRPO whose rollouts and update read each image and prompt once a group."""

from __future__ import annotations

import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from egm_lib.inference.loading import image_token_ids
from egm_lib.inference.shared_prefix import Reader, SamplingOptions, rollout_rows, sample
from egm_lib.loss import group_advantages, grpo_loss
from egm_lib.training.grpo_trainer import TimedGRPO
from egm_lib.training.model_setup import chat_text
from egm_lib.training.prefix_logps import suffix_logps


class SharedPrefixGRPO(TimedGRPO):
    """GRPOTrainer whose rollouts and update read each image and prompt once a group.

    It needs a single process and a frozen vision tower.
    """

    def __init__(self, *args, reader: Reader, rollout_dtype: str, **kwargs):
        self.reader, self.rollout_dtype, self.waiting = reader, rollout_dtype, []
        super().__init__(*args, **kwargs)

    def _prepare_inputs(self, generation_batch):
        if not self.waiting:
            self.waiting = self._roll_out(generation_batch)
        return self.waiting.pop(0)

    def _roll_out(self, rows: list[dict]) -> list[dict]:
        """Samples a step's groups and computes rewards and advantages.

        Returns one part for each accumulation step.
        """
        self._plan_check()
        prompts, completions, logps, rewards_B = self._answer(rows, self.num_generations)
        self._count_tokens(prompts, completions)
        advantages_B = group_advantages(rewards_B, self.num_generations)
        return self._parts(prompts, completions, logps, advantages_B)

    def _score_held_out(self, rows: list[dict]) -> None:
        self._answer(rows, self.num_generations_eval)

    def _answer(
        self, rows: list[dict], group_size: int
    ) -> tuple[list, list[list[int]], list[list[float]], Tensor]:
        """Prompts, one a group, and completions, log-probs and rewards, one a row; notes what they
        tell.
        """
        began, processor = time.perf_counter(), self.processing_class
        prompts = [
            self.reader.prompt(Path(row["image"]), chat_text(processor, row["prompt"]))
            for row in rows[::group_size]
        ]
        completions, logps = self._sample(prompts, group_size)
        sampled = time.perf_counter()
        self._note_rollout(completions, sampled - began)
        texts = processor.tokenizer.batch_decode(completions, skip_special_tokens=True)
        columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
        columns["log_metric"] = lambda name, value: self._note(**{name: value})
        rewards_B = torch.tensor(self.reward_funcs[0](completions=texts, **columns))
        self._note_rewards(rows, texts, rewards_B, time.perf_counter() - sampled)
        self._note_rollouts(rewards_B, completions, group_size)
        return prompts, completions, logps, rewards_B

    def _sample(self, prompts, group_size: int) -> tuple[list[list[int]], list[list[float]]]:
        """All completions of all prompts, in order; `rollout_rows` at a time."""
        options = SamplingOptions(
            self.max_completion_length,
            self.temperature,
            self.top_p,
            self.top_k,
            image_token_ids(self.model.config),
        )
        policy, completions, logps = self._bare(self.model), [], []
        on_gpu = self.accelerator.device.type != "cpu"
        step = max(1, rollout_rows(on_gpu) // group_size)
        dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(self.rollout_dtype)
        cast = (
            nullcontext() if dtype is None else torch.autocast(self.accelerator.device.type, dtype)
        )
        was_training = policy.training
        policy.eval()
        with cast:
            for start in range(0, len(prompts), step):
                part = prompts[start : start + step]
                features = self.reader.features([prompt.image for prompt in part])
                tokens, scores = sample(
                    policy, part, features, group_size, options, self.eos_token_ids
                )
                completions += tokens
                logps += scores
        policy.train(was_training)
        return completions, logps

    def _note_rollouts(
        self, rewards_B: Tensor, completions: list[list[int]], group_size: int
    ) -> None:
        """Logs what TRL's trainer logs, under the same names."""
        groups = rewards_B.view(-1, group_size)
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

    def _count_tokens(self, prompts, completions: list[list[int]]) -> None:
        """Adds each completion with its prompt to `num_tokens`, as TRL counts them."""
        read = self.num_generations * sum(len(prompt.ids) for prompt in prompts)
        self.state.num_input_tokens_seen += read + sum(map(len, completions))
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]

    def _is_truncated(self, tokens: list[int]) -> bool:
        return tokens[-1] not in self.eos_token_ids

    def _trained_rows(
        self, completions: list[list[int]], advantages_B: Tensor
    ) -> dict[int, list[int]]:
        """Completions to train on, by group.

        These are the completions of groups with unequal rewards, without truncated ones if those
        are masked.
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
        """The groups in as many parts as there are accumulation steps.

        Groups of similar length are put together, so that little is padded.
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
        if not inputs["prompts"]:  # no group with unequal rewards in this part
            return sum(p.sum() for p in model.parameters() if p.requires_grad) * 0.0
        prompts, mask = inputs["prompts"], inputs["mask"]
        features = self.reader.features([prompt.image for prompt in prompts])
        batch = (prompts, features, inputs["group"], inputs["completion"], mask, mask)
        with self.accelerator.autocast():
            entropy = "gradient" if self.entropy_coef else "value"
            logps, entropy = suffix_logps(
                self._bare(model), *batch, temperature=self.temperature, entropy=entropy
            )
        if not self.checked:
            keep = mask.bool()
            # `sample` states log-probs before top-p and top-k
            gap = self._check_policy(logps.detach()[keep], inputs["sampler"][keep])
            self._note(**{"sampling/sampling_logp_difference/mean": gap})
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
        reference = self._bare(model) if adapter else self.ref_model
        without = (
            self.accelerator.unwrap_model(model).disable_adapter() if adapter else nullcontext()
        )
        with without, self.accelerator.autocast():
            return suffix_logps(reference, *batch, temperature=self.temperature)[0]
