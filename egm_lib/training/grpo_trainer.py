"""TRL's GRPOTrainer under our clock and log; both GRPO trainers build on it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from datasets import Dataset
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from egm_lib.training.clock import Clock, TimedSchedule
from egm_lib.training.groups import GroupKeeper
from egm_lib.training.model_setup import (
    TrainingError,
)

# Nats: bf16 and kernels differ by about 0.01, a top-p of 0.9 by 0.1 at most, another prompt by
# about 1.
MAX_LOGP_GAP = 0.1


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
            "trainer and sampler disagree: mean log-prob of the sampled tokens "
            f"{trainer_logps.mean().item():.4f} by "
            f"the trainer, {sampler_logps.mean().item():.4f} by the sampler, mean difference "
            f"{gap:.4f} "
            f"(limit {MAX_LOGP_GAP}). They see other prompts or other weights: compare the prompt "
            "ids that both get."
        )
    return gap


class EpochSampler(RepeatSampler):
    """TRL's sampler, shuffled by seed and epoch: a run that is resumed in a later epoch sees the
    same order.
    """

    def set_epoch(self, epoch: int) -> None:
        if self.shuffle:
            self.generator.manual_seed(self.seed + epoch)


class TimedGRPO(TimedSchedule, GRPOTrainer):
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
