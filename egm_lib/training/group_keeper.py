"""Keeps the last GRPO groups of a training, and writes them to the file that `groups` reads.

The file is written whole whenever a checkpoint is saved and when the training ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import TrainerCallback

from egm_lib.files import write_jsonl
from egm_lib.loss import group_advantages
from egm_lib.training.groups import read_groups

MAX_GROUPS = 32  # kept of a run
STEP_GROUPS = 8  # kept of a step, so that the file covers the last four steps


class GroupKeeper(TrainerCallback):
    """Keeps the last groups and writes them to a file.

    A resumed run continues with the groups up to its checkpoint.
    """

    def __init__(self, path: Path, opener: str = ""):
        """opener: how the chat template begins each answer, such as `<think>`."""
        self.path, self.opener = path, opener
        self.groups: deque[dict] = deque(maxlen=MAX_GROUPS)

    def keep(
        self,
        step: int,
        samples: Sequence[Mapping],
        texts: Sequence[str],
        rewards_B: Tensor,
        size: int,
    ) -> None:
        """Keeps the first groups of a step.

        samples, texts, rewards_B: one for each completion; the `size` completions of a prompt
        follow each other. A text that is None counts as empty.
        """
        for start in range(0, min(len(texts), STEP_GROUPS * size) - size + 1, size):
            rewards_G = rewards_B[start : start + size].cpu()
            self.groups.append(
                {
                    **samples[start],
                    "step": step,
                    "completions": [
                        self.opener + (text or "") for text in texts[start : start + size]
                    ],
                    "rewards": rewards_G.tolist(),
                    "advantages": group_advantages(rewards_G, size).tolist(),
                }
            )

    def on_train_begin(self, args, state, control, **kwargs):
        known = read_groups(self.path) if state.global_step else []
        self.groups.extend(group for group in known if group["step"] <= state.global_step)

    def on_save(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not self.groups:
            return
        write_jsonl(self.path, self.groups)

    on_train_end = on_save
