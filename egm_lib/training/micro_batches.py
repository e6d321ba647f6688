"""GRPO's rows in micro-batches of at most so many tokens, padding included.

TRL pads all rows of a rollout to the longest prompt and the longest completion among them. Here
rows of similar length go together, and each micro-batch is padded to its longest row. All ranks
form micro-batches of the same numbers of rows. Otherwise a rank with fewer micro-batches would
leave the others waiting, under ZeRO-3 and in TRL's metrics.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

# TRL's keys, by what their columns are
PROMPT = ("prompt_ids", "prompt_mask")
COMPLETION = (
    "completion_ids",
    "completion_mask",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
)
BOTH = ("mm_token_type_ids", "token_type_ids")


def by_length(batch: dict) -> list[int]:
    """Rows of TRL's batch, the longest first."""
    lengths_B = batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)
    return lengths_B.argsort(descending=True, stable=True).tolist()


def row_lengths(batch: dict) -> Tensor:
    """Tokens of prompts and of completions, (2, B), the longest row first."""
    masks = (batch["prompt_mask"], batch["completion_mask"])
    return torch.stack([mask.sum(dim=1) for mask in masks])[:, by_length(batch)]


def row_counts(prompts: Iterable[int], completions: Iterable[int], budget: int) -> list[int]:
    """How many rows each micro-batch takes, of rows in this order.

    prompts, completions: tokens of each row. budget: tokens of a micro-batch, which is as wide as
    its longest prompt and its longest completion together. A row beyond the budget stands alone.
    """
    counts, longest_prompt, longest_completion = [0], 0, 0
    for prompt, completion in zip(prompts, completions, strict=True):
        wide = max(longest_prompt, prompt), max(longest_completion, completion)
        if counts[-1] and (counts[-1] + 1) * sum(wide) > budget:
            counts.append(0)
            wide = prompt, completion
        longest_prompt, longest_completion = wide
        counts[-1] += 1
    return counts


def micro_batches(batch: dict, lengths_2_B: Tensor, budget: int) -> list[dict]:
    """TRL's batch in micro-batches of at most `budget` tokens.

    lengths_2_B: `row_lengths`, the greatest of all ranks.
    """
    split, order = split_pixel_values_by_grid(batch), by_length(batch)
    parts, start = [], 0
    for count in row_counts(*lengths_2_B.tolist(), budget):
        rows = order[start : start + count]
        part = {key: _rows_of(value, rows) for key, value in split.items()}
        parts.append(_unpadded(unsplit_pixel_values_by_grid(part)))
        start += count
    return parts


def _rows_of(value: object, rows: list[int]) -> object:
    if isinstance(value, list):
        return [value[row] for row in rows]
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def _unpadded(part: dict) -> dict:
    """Without the columns that are padding in every row: prompts are padded left, completions
    right.
    """
    width = part["prompt_ids"].shape[1]
    first = width - int(part["prompt_mask"].sum(dim=1).max())
    last = max(1, int(part["completion_mask"].sum(dim=1).max()))  # all may be masked
    columns = dict.fromkeys(PROMPT, slice(first, None))
    columns |= dict.fromkeys(COMPLETION, slice(last))
    columns |= dict.fromkeys(BOTH, slice(first, width + last))
    return {
        key: value[:, columns[key]] if key in columns and value is not None else value
        for key, value in part.items()
    }
