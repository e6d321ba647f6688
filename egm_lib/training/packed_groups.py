"""Log-probs of completions that share a prompt, by one forward pass that reads the prompt once.

The rows of a group have one image and one prompt. They are packed into one row without padding: the
prompt without its last token, then for each completion the prompt's last token and all of the
completion but its last. So every token that is scored is predicted at a place of its own.
A completion attends to its prompt and to itself, and its positions continue those of the prompt.
The image is encoded once, and its gradient is the sum over the group's completions.

The attention is a function registered with transformers. No keys and values are kept, so gradient
checkpointing, weights divided among processes and a trained vision tower all work as in any other
forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import split_pixel_values_by_grid

ATTENTION = "sdpa_packed_groups"
IGNORED = -100  # a place without a target, in the labels of transformers


@dataclass(frozen=True)
class Group:
    """Where one prompt and its completions stand in a packed row.

    places_N_T: the inputs of each completion. Padding, on the right, names places of others.
    kept_K: what is no padding, in places_N_T row by row. mask_T_S: what a completion attends to,
    its prompt and itself. Every layer needs both: made once, they do not make a GPU wait in each.
    """

    prompt: slice
    places_N_T: Tensor
    kept_K: Tensor
    mask_T_S: Tensor

    def attend(self, module: nn.Module, query, key, value, **kwargs) -> list[Tensor]:
        """Attention of the prompt (1, P, heads, D) and of the completions (1, tokens, heads, D).

        query, key, value: of the packed row, (1, heads, L, D).
        """
        prompt = [states[:, :, self.prompt] for states in (query, key, value)]
        attended = [sdpa_attention_forward(module, *prompt, None, is_causal=True, **kwargs)[0]]
        count = len(self.places_N_T)
        if not count:
            return attended

        def rows(states: Tensor) -> Tensor:
            return states[0][:, self.places_N_T].transpose(0, 1)

        keys, values = (
            torch.cat([shared.expand(count, -1, -1, -1), rows(states)], dim=2)
            for shared, states in zip(prompt[1:], (key, value), strict=True)
        )
        rows_N_T, _ = sdpa_attention_forward(
            module, rows(query), keys, values, self.mask_T_S[None, None], **kwargs
        )
        return [*attended, rows_N_T.flatten(0, 1)[self.kept_K][None]]


def packed_attention(
    module, query, key, value, attention_mask, packed_groups: Sequence[Group] = (), **kwargs
) -> tuple[Tensor, None]:
    """transformers' SDPA attention; where packed_groups are given, that of a packed row."""
    if not packed_groups:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    parts = [
        part
        for group in packed_groups
        for part in group.attend(module, query, key, value, **kwargs)
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_packed_attention(model: nn.Module) -> bool:
    """Gives the language model of `model` the attention of packed rows; ordinary rows keep theirs.

    Returns False, and changes nothing, where its attention is another than SDPA.
    """
    config = model.model.language_model.config
    if config._attn_implementation == "sdpa":
        config._attn_implementation = ATTENTION
    return config._attn_implementation == ATTENTION


@dataclass(frozen=True)
class PackedRow:
    """One row for the model, and the target of each place (IGNORED where there is none).

    positions: 3 rows for M-RoPE, else 1.
    """

    ids_1_L: Tensor
    positions_A_L: Tensor
    targets_1_L: Tensor
    groups: list[Group]


def pack(
    prompts: Sequence[Tensor],
    positions: Sequence[Tensor],
    completions: Sequence[Sequence[Tensor]],
) -> PackedRow:
    """Packs groups, one after another.

    prompts: token ids (P) of each group's prompt. positions: their positions (A, P). completions:
    token ids of each completion of each group; an empty one takes no place.
    """
    ids, places, targets, groups, start = [], [], [], [], 0
    for prompt_P, positions_A_P, rows in zip(prompts, positions, completions, strict=True):
        rows = [row for row in rows if len(row)]
        device, first = prompt_P.device, start
        ids.append(prompt_P[:-1])
        places.append(positions_A_P[:, :-1])
        targets.append(torch.full_like(prompt_P[:-1], IGNORED))
        start += len(prompt_P) - 1
        prompt, at = slice(first, start), []
        for row in rows:
            ids += [prompt_P[-1:], row[:-1]]
            places.append(positions_A_P[:, -1:] + torch.arange(len(row), device=device))
            targets.append(row)
            at.append(torch.arange(start, start + len(row), device=device))
            start += len(row)
        places_N_T = pad_sequence(at, True, -1) if at else prompt_P.new_zeros(0, 0)
        # Padding names different places: a GPU adds up the gradients of one place serially
        others = torch.arange(places_N_T.numel(), device=device).view_as(places_N_T) % max(start, 1)
        keep_N_T, width = places_N_T >= 0, places_N_T.shape[1]
        length = len(prompt_P) - 1
        # Causal to the lower right. Padding comes after all that is kept, so nothing else is masked
        mask_T_S = torch.ones(width, length + width, dtype=torch.bool, device=device).tril(length)
        kept_K = keep_N_T.flatten().nonzero()[:, 0]
        groups.append(Group(prompt, places_N_T.where(keep_N_T, others), kept_K, mask_T_S))
    return PackedRow(
        torch.cat(ids)[None], torch.cat(places, dim=1), torch.cat(targets)[None], groups
    )


def shared_runs(prompts: Sequence[Tensor], images: Sequence[Tensor]) -> list[range]:
    """Runs of neighbouring rows whose prompt and image are the same."""
    starts = [
        row
        for row in range(len(prompts))
        if row == 0
        or not torch.equal(prompts[row], prompts[row - 1])
        or not torch.equal(images[row], images[row - 1])
    ]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def packed_logps(model: nn.Module, bare: nn.Module, batch: dict) -> tuple[Tensor, Tensor | None]:
    """Log-probs (B, C) of TRL's batch and the entropies there; zeros where completion_mask is 0.

    TRL's head of the KL's reference computes no entropies: None.
    model: as it is trained, perhaps wrapped, with TRL's fused head; bare: the same without wrappers
    and adapters. batch: under TRL's keys. One forward pass, whatever the rows are.
    """
    batch = split_pixel_values_by_grid(batch)
    prompt_mask, mask_B_C = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    prompts = [ids[keep] for ids, keep in zip(batch["prompt_ids"], prompt_mask, strict=True)]
    rows = [ids[keep] for ids, keep in zip(batch["completion_ids"], mask_B_C, strict=True)]
    runs = shared_runs(prompts, batch["pixel_values"])
    first = [run[0] for run in runs]
    images = {"pixel_values": torch.cat([batch["pixel_values"][row] for row in first])}
    if "image_grid_thw" in batch:
        images["image_grid_thw"] = torch.cat([batch["image_grid_thw"][row] for row in first])
    packed = pack(
        [prompts[row] for row in first],
        _positions(bare, batch, first, images),
        [[rows[row] for row in run] for run in runs],
    )
    positions = packed.positions_A_L
    output = model(
        input_ids=packed.ids_1_L,
        attention_mask=torch.ones_like(packed.ids_1_L),
        position_ids=positions if len(positions) == 1 else positions[:, None],
        shift_labels=packed.targets_1_L,
        fused_lm_head=True,
        packed_groups=packed.groups,
        **images,
    )
    scored_1_L = packed.targets_1_L != IGNORED

    def spread(values_1_L: Tensor | None) -> Tensor | None:
        if values_1_L is None:
            return None
        zeros_B_C = values_1_L.new_zeros(mask_B_C.shape)
        return zeros_B_C.masked_scatter(mask_B_C, values_1_L[scored_1_L])

    return spread(output.log_probs), spread(output.entropy)


def _positions(bare: nn.Module, batch: dict, rows: list[int], images: dict) -> list[Tensor]:
    """Positions (A, P) of the prompts of some rows: M-RoPE's where the model has it."""
    ids_N_P, mask_N_P = batch["prompt_ids"][rows], batch["prompt_mask"][rows].bool()
    if not hasattr(bare.model, "get_rope_index"):
        return [torch.arange(int(n), device=ids_N_P.device)[None] for n in mask_N_P.sum(dim=1)]
    positions_3_N_P, _ = bare.model.get_rope_index(
        ids_N_P,
        mm_token_type_ids=batch["mm_token_type_ids"][rows, : ids_N_P.shape[1]],
        image_grid_thw=images["image_grid_thw"],
        attention_mask=mask_N_P,
    )
    return [positions_3_N_P[:, row, keep] for row, keep in enumerate(mask_N_P)]
