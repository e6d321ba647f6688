"""Log-probs, with gradient, of many completions whose prompts are read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction

from egm_lib.inference.shared_prefix import Prompt, read_prefix
from egm_lib.inference.vision_cache import Features

VOCABULARY_CHUNK = 32768  # TRL's own choice for the chunked LM head
# Tokens x vocabulary that may be held (128 MiB): faster than the chunked head on a CPU
SMALL_LOGITS = 2**25


def suffix_logps(
    model,
    prefixes: Sequence[Prompt],
    features: list[Features],
    group_B: Tensor,
    suffix_B_T: Tensor,
    attend_B_T: Tensor,
    keep_B_T: Tensor,
    *,
    temperature: float = 1.0,
    entropy: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the tokens after each prefix, and their entropies where asked for.

    Both are zero where keep_B_T is 0.
    group_B: index of each row's prefix, whose last token predicts the first of the suffix.
    attend_B_T: 0 on padding (right); keep_B_T: the tokens to score.
    """
    prefix = read_prefix(model, prefixes, features)
    for layer in prefix.cache.layers:
        layer.keys, layer.values = layer.keys[group_B], layer.values[group_B]
    inputs_B_T = torch.cat([prefix.last_N[group_B, None], suffix_B_T[:, :-1]], dim=1)
    position_B_T = prefix.position_N[group_B, None] + torch.arange(
        inputs_B_T.shape[1], device=inputs_B_T.device
    )
    hidden_B_T_W = model.model(
        input_ids=inputs_B_T,
        attention_mask=torch.cat([prefix.mask_N_P[group_B], attend_B_T.long()], dim=1),
        position_ids=position_B_T.expand(3, -1, -1),
        past_key_values=prefix.cache,
    ).last_hidden_state
    keep = keep_B_T.bool()
    logps, entropies = head_logps(model, hidden_B_T_W[keep], suffix_B_T[keep], temperature, entropy)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(keep.shape).masked_scatter(keep, values)

    return spread(logps), None if entropies is None else spread(entropies)


def head_logps(
    model, hidden_K_W: Tensor, target_K: Tensor, temperature: float, entropy: str | None
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (float32) of the targets, and entropies. Large logits are never held whole.

    entropy: None (not computed), "value" (to log) or "gradient" (to train on).
    """
    head = model.get_output_embeddings()
    if len(target_K) * head.weight.shape[0] > SMALL_LOGITS:
        logps_K, entropy_K, *_ = ChunkedLogProbFunction.apply(
            hidden_K_W,
            head.weight,
            head.bias,
            target_K,
            temperature,
            VOCABULARY_CHUNK,
            None,
            1.0,
            ("entropy",) if entropy else (),
        )
        return logps_K, entropy_K.detach() if entropy == "value" else entropy_K
    all_K_V = (head(hidden_K_W).float() / temperature).log_softmax(dim=-1)
    logps_K = all_K_V.gather(1, target_K[:, None])[:, 0]
    if entropy is None:
        return logps_K, None
    known_K_V = all_K_V if entropy == "gradient" else all_K_V.detach()
    return logps_K, -(known_K_V.exp() * known_K_V).sum(dim=-1)
