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


def by_group(batch: dict, group_size: int) -> list[int]:
    """Rows of TRL's batch, groups side by side: the longest group first, in it the longest row."""
    completions_N_G = batch["completion_mask"].sum(dim=1).view(-1, group_size)
    groups_N = batch["prompt_mask"].sum(dim=1)[::group_size] + completions_N_G.sum(dim=1)
    rows_N_G = completions_N_G.argsort(dim=1, descending=True, stable=True)
    rows_N_G += group_size * torch.arange(len(rows_N_G), device=rows_N_G.device)[:, None]
    return rows_N_G[groups_N.argsort(descending=True, stable=True)].flatten().tolist()


def row_lengths(batch: dict, order: list[int]) -> Tensor:
    """Tokens of prompts and of completions, (2, B), of the rows in this order."""
    masks = (batch["prompt_mask"], batch["completion_mask"])
    return torch.stack([mask.sum(dim=1) for mask in masks])[:, order]


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


def packed_row_counts(
    prompts: Iterable[int], completions: Iterable[int], group_size: int, budget: int
) -> list[int]:
    """How many rows each micro-batch takes where the rows of a group are packed, without padding.

    A prompt counts once in a micro-batch. A group that does not fit continues in the next one,
    which reads its prompt again.
    """
    counts, tokens, started = [0], 0, None
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        group = row // group_size
        tokens += completion + (prompt if group != started else 0)
        if counts[-1] and tokens > budget:
            counts.append(0)
            tokens = prompt + completion
        started = group
        counts[-1] += 1
    return counts


def micro_batches(batch: dict, order: list[int], counts: list[int]) -> list[dict]:
    """TRL's batch in micro-batches: of its rows in this order, each takes its count."""
    split = split_pixel_values_by_grid(batch)
    parts, start = [], 0
    for count in counts:
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
