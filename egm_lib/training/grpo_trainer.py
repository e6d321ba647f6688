"""TRL's GRPOTrainer with our clock and log, the base of both GRPO trainers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from egm_lib.training.clock import Clock, TimedSchedule
from egm_lib.training.group_keeper import GroupKeeper
from egm_lib.training.model_setup import TrainingError

# In nats a token, for tokens that are sampled without top-p and top-k. The same policy gives 1e-4
# in float32 and about 0.01 in half precision. Misplaced image positions gave 0.01 to 0.04, features
# of old weights 0.15, and another prompt about 1.
MAX_LOGP_GAP = 0.02


def answer_texts(completions: Sequence) -> list[str]:
    """Completions as texts. TRL gives those of a chat as messages; one without content is empty."""
    texts = [
        completion[-1]["content"] if isinstance(completion, list) else completion
        for completion in completions
    ]
    return [text or "" for text in texts]


def check_same_policy(trainer_logps: Tensor, sampler_logps: Tensor) -> float:
    """Mean |log p(trainer) - log p(sampler)| over tokens.

    sampler_logps: those of a sampler without top-p and top-k. A truncated distribution is
    renormalised, and differs from the trainer's by up to -log(top_p).
    Raises TrainingError above MAX_LOGP_GAP.
    """
    gap = (trainer_logps - sampler_logps).abs().mean().item()
    if not gap <= MAX_LOGP_GAP:  # also if it is nan
        raise TrainingError(
            "trainer and sampler disagree: mean log-prob of the sampled tokens "
            f"{trainer_logps.mean().item():.4f} by the trainer, "
            f"{sampler_logps.mean().item():.4f} by the sampler, mean difference {gap:.4f} "
            f"(limit {MAX_LOGP_GAP}). Their prompts or their weights differ: compare the prompt "
            "ids that both get."
        )
    return gap


class EpochSampler(RepeatSampler):
    """TRL's sampler, shuffled by seed and epoch.

    So a run that is resumed in a later epoch sees the same order of prompts.
    """

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class TimedGRPO(TimedSchedule, GRPOTrainer):
    """GRPOTrainer with our clock and log, and an order of prompts that survives interruptions."""

    def __init__(
        self,
        *args,
        clock: Clock,
        keeper: GroupKeeper,
        check_steps: int,
        **kwargs,
    ):
        """check_steps: trainer and sampler are compared in the first step, then after so many."""
        self.clock, self.keeper = clock, keeper
        self.check_steps = check_steps
        self.checked, self.checked_step = False, 0  # whether a comparison is recent; its step
        # Seconds of all rollouts and rewards so far; of forward and backward in this step
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
        if loss.is_cuda:
            torch.cuda.synchronize()  # the backward pass goes on after the call
        self.update_s += time.perf_counter() - began - (self.sampling_s - before)
        if self.accelerator.sync_gradients:
            self._note(**{"time/update": self.update_s})
            self.update_s = 0.0
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Rewards of held-out prompts, logged as eval_*; what their loss is says nothing."""
        with torch.no_grad():
            self._score_held_out(inputs)
        return None, None, None

    def _score_held_out(self, rows: list[dict]) -> None:
        """Answers each row once and notes the rewards."""
        raise NotImplementedError

    def _plan_check(self) -> None:
        """Before a rollout: plans a comparison of trainer and sampler if the last is too old."""
        if self.state.global_step - self.checked_step >= self.check_steps:
            self.checked = False

    def _check_policy(self, trainer_logps: Tensor, sampler_logps: Tensor) -> float:
        gap = check_same_policy(trainer_logps, sampler_logps)
        self.checked, self.checked_step = True, self.state.global_step
        return gap

    def _bare(self, model):
        """A model without what accelerate and peft have put around it."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def _note(self, **metrics: float) -> None:
        noted = self._metrics["train" if self.model.training else "eval"]
        for name, value in metrics.items():
            noted[name].append(value)

    def _note_rollout(self, completions: Sequence[Sequence[int]], seconds: float) -> None:
        self.sampling_s += seconds
        self._note(
            **{"time/rollout": seconds, "tokens_per_second": sum(map(len, completions)) / seconds}
        )

    def _note_rewards(
        self, rows: Sequence[Mapping], texts: Sequence[str], rewards_B: Tensor, seconds: float
    ) -> None:
        """Logs the metrics of the rewards, and keeps some groups.

        rewards_B: those of all processes, one group after the other, the main process first.
        rows, texts: those of this process.
        """
        self.sampling_s += seconds
        if not self.model.training:  # held-out prompts, each answered once
            return
        group_std = rewards_B.view(-1, self.num_generations).std(dim=1).mean().item()
        self._note(**{"time/reward": seconds, "group_std": group_std})
        samples = [row["sample"] for row in rows]
        self.keeper.keep(
            self.state.global_step + 1, samples, texts, rewards_B, self.num_generations
        )
