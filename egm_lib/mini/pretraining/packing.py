"""Several questions of one image in one row, each seeing the image and itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from egm_lib.mini.models import CELLS


@dataclass(frozen=True)
class Packed:
    """Images and their questions as one ragged row of N tokens, and which tokens belong together.

    prefix_B_P indexes each image's prefix; each bucket is (image of question, token index Q_L,
    valid Q_L). labels_N is -100 outside answers; segments_N numbers the questions, -1 in prefixes.
    """

    ids_N: Tensor
    labels_N: Tensor
    segments_N: Tensor
    positions_3_N: Tensor
    prefix_B_P: Tensor
    buckets: list[tuple[Tensor, Tensor, Tensor]]


def pack(prompts_answers: list[list[tuple[str, str]]], tokenizer, buckets: int = 4) -> Packed:
    """Tokenises each image's (prompt, answer) pairs; every question follows the image."""
    ids = tokenizer.convert_tokens_to_ids
    opening = ids(["<|im_start|>", "user\n", "<|vision_start|>"])
    prefix = opening + [ids("<|image_pad|>")] * CELLS**2 + ids(["<|vision_end|>"])
    start, cells = len(opening), torch.arange(CELLS**2)
    image = torch.stack([torch.zeros_like(cells), cells // CELLS, cells % CELLS]) + start
    lead, after = torch.arange(start).expand(3, -1), torch.full((3, 1), start + CELLS)
    turn = ids(["<|im_end|>", "\n", "<|im_start|>", "assistant\n", "<think>", "\n"])
    encoded = iter(
        tokenizer([t for pairs in prompts_answers for pair in pairs for t in pair]).input_ids
    )
    tokens, labels, segments, positions, prefixes, spans = [], [], [], [], [], []
    for number, pairs in enumerate(prompts_answers):
        prefixes.append(range(len(tokens), len(tokens) + len(prefix)))
        tokens += prefix
        labels += [-100] * len(prefix)
        segments += [-1] * len(prefix)
        positions.append(torch.cat([lead, image, after], dim=1))
        for _ in pairs:
            question, answer = next(encoded) + turn, next(encoded) + ids(["<|im_end|>"])
            length = len(question) + len(answer)
            segments += [len(spans)] * length
            spans.append((number, len(tokens), length))
            tokens += question + answer
            labels += [-100] * len(question) + answer
            positions.append((torch.arange(length) + start + CELLS + 1).expand(3, -1))
    by_length = sorted(spans, key=lambda span: span[2])
    chunks = [
        by_length[i * len(spans) // buckets : (i + 1) * len(spans) // buckets]
        for i in range(buckets)
    ]
    return Packed(
        torch.tensor(tokens),
        torch.tensor(labels),
        torch.tensor(segments),
        torch.cat(positions, dim=1),
        torch.tensor([list(p) for p in prefixes]),
        [_bucket(chunk) for chunk in chunks if chunk],
    )


def _bucket(spans: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    owner, begin, length = torch.tensor(spans).T
    offset = torch.arange(int(length.max()))
    valid = offset < length[:, None]
    return owner, torch.where(valid, begin[:, None] + offset, begin[:, None]), valid


def _attend(q, k, v, scaling: float) -> Tensor:
    """Causal attention, with the last query at the last key.

    Plain matrix products are faster here than the fused CPU kernel.
    """
    length, seen = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    hidden = torch.ones(length, seen, dtype=torch.bool).triu(seen - length + 1)
    scores = ((q * scaling) @ k.transpose(-1, -2)).masked_fill(hidden, -1e4)
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def packed_attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, *, packed: Packed, **kwargs
):
    """Attention in which a question sees its image's prefix and itself.

    query: 1 x heads x N x d.
    """
    groups = query.shape[1] // key.shape[1]
    # N x heads x d
    q, k, v = query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    prefix_k, prefix_v = k[packed.prefix_B_P], v[packed.prefix_B_P]
    outputs = [_attend(q[packed.prefix_B_P], prefix_k, prefix_v, scaling).flatten(0, 1)]
    indices = [packed.prefix_B_P.flatten()]
    for owner, index_Q_L, valid_Q_L in packed.buckets:
        keys = torch.cat([prefix_k[owner], k[index_Q_L]], dim=1)
        values = torch.cat([prefix_v[owner], v[index_Q_L]], dim=1)
        outputs.append(_attend(q[index_Q_L], keys, values, scaling)[valid_Q_L])
        indices.append(index_Q_L[valid_Q_L])
    return torch.cat(outputs)[torch.cat(indices).argsort()][None], None


ALL_ATTENTION_FUNCTIONS.register("packed", packed_attention)


def packed_loss(
    model, packed: Packed, merged_B_64_W: Tensor, deepstack: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over answer tokens, and their scores (M x vocabulary, float32)."""
    lm = model.model.language_model
    lm.config._attn_implementation = "packed"
    image = packed.ids_N == model.config.image_token_id
    x = lm.embed_tokens(packed.ids_N)
    x = x.masked_scatter(image[:, None], merged_B_64_W.to(x.dtype).reshape(-1, x.shape[-1]))
    hidden = lm(
        inputs_embeds=x[None],
        position_ids=packed.positions_3_N[:, None],
        visual_pos_masks=image[None],
        attention_mask=torch.ones(1, 1, 1, 1),
        packed=packed,
        use_cache=False,
        deepstack_visual_embeds=[d.to(x.dtype).flatten(0, 1) for d in deepstack],
    ).last_hidden_state[0]
    wanted = packed.labels_N[1:]
    scores = model.lm_head(hidden[:-1][wanted != -100]).float()
    return F.cross_entropy(scores, wanted[wanted != -100]), scores
