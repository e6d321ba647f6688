"""Token-by-token decoding: the one loop behind rollouts and answers.

Greedy completions equal those of `model.generate`. The loop is faster for three reasons. A prompt
is read once for all its completions, keys and values are written in place, and completions that
have ended leave the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

# What a processor returns for each token
BY_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled.

    temperature 0 is greedy. top_k 0, top_p 1 and repetition_penalty 1 have no effect. Tokens of
    suppress_ids are never sampled.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    suppress_ids: tuple[int, ...] = ()
    repetition_penalty: float = 1.0


class Form(Protocol):
    """A constraint on the output: sets all but the `keep` likeliest admissible tokens to -inf."""

    def bind(self, written: list[int], logits_V: Tensor, keep: int) -> Tensor: ...


@dataclass
class Prefix:
    """Prompts that a model has read, without their last token, which starts every completion."""

    cache: DynamicCache
    mask_N_P: Tensor
    last_N: Tensor
    position_N: Tensor  # of the last token
    ids: list[list[int]]  # of each prompt, whole


@dataclass
class Completions:
    """Tokens, end token included, and their log-probs: one list a completion.

    first_token_at: the value of time.perf_counter when the first tokens were there.
    """

    tokens: list[list[int]]
    logps: list[list[float]]
    first_token_at: float


@torch.no_grad()
def read_inputs(model, inputs: Mapping[str, Tensor]) -> Prefix:
    """The prefix of a left-padded batch as a processor returns it.

    This works for every model family of transformers.
    """
    ids_N_T, mask_N_T = inputs["input_ids"], inputs["attention_mask"]
    by_token = {name: inputs[name][:, :-1] for name in BY_TOKEN if name in inputs}
    if not _has_3d_positions(model):  # Qwen-VL computes its positions itself
        by_token["position_ids"] = (mask_N_T.cumsum(dim=-1) - 1).clamp(min=0)[:, :-1]
    cache = DynamicCache()
    model.model(**{**inputs, **by_token}, past_key_values=cache, use_cache=True)
    position_N = mask_N_T.sum(dim=-1) - 1
    if _has_3d_positions(model):  # an image takes fewer positions than tokens
        position_N = position_N + model.model.rope_deltas[:, 0]
    ids = [row[mask.bool()].tolist() for row, mask in zip(ids_N_T, mask_N_T, strict=True)]
    return Prefix(cache, mask_N_T[:, :-1], ids_N_T[:, -1], position_N, ids)


def _has_3d_positions(model) -> bool:
    return hasattr(model.model, "get_rope_index")


class _RoomyLayer(DynamicLayer):
    """A cache layer that reserves room for all tokens to come and writes them in place.

    transformers' DynamicLayer copies all that it holds at each token.
    """

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int):
        super().__init__()
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.length = keys.shape[2]
        shape = (len(rows), keys.shape[1], self.length + room, keys.shape[3])
        self.room_keys, self.room_values = keys.new_empty(shape), values.new_empty(shape)
        self.room_keys[:, :, : self.length] = keys[rows]
        self.room_values[:, :, : self.length] = values[rows]
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (
            self.room_keys[:, :, : self.length],
            self.room_values[:, :, : self.length],
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        self.room_keys[:, :, self.length : end] = key_states
        self.room_values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        self.room_keys, self.room_values = self.room_keys[rows], self.room_values[rows]
        self._show()


@torch.no_grad()
def complete(
    model,
    prefix: Prefix,
    group_size: int,
    options: SamplingOptions,
    eos_ids: Sequence[int],
    generator: torch.Generator | None = None,
    form: Form | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> Completions:
    """group_size completions of each prompt, in order.

    on_token: called with (completion, token) for every token as it is written, end tokens included.
    The log-probs are those of the policy at the temperature, before suppression, form, penalty,
    top_k and top_p. These are the ones that a trainer computes.
    """
    device, length = model.device, options.max_new_tokens
    rows = torch.arange(len(prefix.ids), device=device).repeat_interleave(group_size)
    layers = [_RoomyLayer(x.keys, x.values, rows, length) for x in prefix.cache.layers]
    cache = DynamicCache()
    cache.layers = layers
    mask_R_T, token_R, position_R = (
        prefix.mask_N_P[rows],
        prefix.last_N[rows],
        prefix.position_N[rows],
    )
    mask_R_T = torch.cat([mask_R_T, mask_R_T.new_ones(len(rows), length)], dim=1)
    # What is written lies on the CPU, and so does what says which row it belongs to
    start, answer_R = prefix.mask_N_P.shape[1], torch.arange(len(rows))
    going_R = torch.ones(len(rows), dtype=torch.bool, device=device)
    tokens_B_T, logps_B_T = torch.full((len(rows), length), -1), torch.zeros((len(rows), length))
    eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
    first_token_at = 0.0
    for step in range(length):
        position_R_1 = (position_R + step)[:, None]
        hidden_R_1_W = model.model(
            input_ids=token_R[:, None],
            attention_mask=mask_R_T[:, : start + step + 1],
            position_ids=position_R_1.expand(3, -1, -1)
            if _has_3d_positions(model)
            else position_R_1,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits_R_V = model.get_output_embeddings()(hidden_R_1_W[:, -1]).float()
        allowed_R_V = logits_R_V.clone()
        allowed_R_V[:, list(options.suppress_ids)] = -torch.inf
        if form is not None:  # before top_k, which could leave no admissible token
            keep = 1 if options.temperature == 0 else (options.top_k or logits_R_V.shape[1])
            for r in going_R.nonzero()[:, 0].tolist():
                allowed_R_V[r] = form.bind(
                    tokens_B_T[answer_R[r], :step].tolist(), allowed_R_V[r], keep
                )
        if options.repetition_penalty != 1:
            seen = [
                prefix.ids[b // group_size] + tokens_B_T[b, :step].tolist()
                for b in answer_R.tolist()
            ]
            _penalise(allowed_R_V, seen, options.repetition_penalty)
        token_R = _pick(allowed_R_V, options, generator)
        tokens_B_T[answer_R, step] = token_R.cpu()
        logps_B_T[answer_R, step] = _logps(logits_R_V, token_R, options.temperature).cpu()
        if step == 0:
            first_token_at = time.perf_counter()
        if on_token is not None:
            for r in going_R.nonzero()[:, 0].tolist():
                on_token(int(answer_R[r]), int(token_R[r]))
        going_R = going_R & ~torch.isin(token_R, eos)
        count = int(going_R.sum())
        if count == 0:
            break
        # Removing rows copies the cache, so it is not done for every row that ends.
        if count < 0.9 * len(token_R):
            kept = going_R.nonzero()[:, 0]
            answer_R = answer_R[kept.cpu()]
            going_R, token_R, position_R, mask_R_T = (
                x[kept] for x in (going_R, token_R, position_R, mask_R_T)
            )
            for layer in layers:
                layer.keep(kept)
    return Completions(*_until_end(tokens_B_T, logps_B_T, eos.cpu()), first_token_at)


def _penalise(logits_R_V: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> None:
    """transformers' repetition penalty, in place.

    Tokens that occur in the prompt or the completion become less likely.
    """
    for logits_V, ids in zip(logits_R_V, seen, strict=True):
        known = torch.tensor(sorted(set(ids)), device=logits_V.device)
        values = logits_V[known]
        logits_V[known] = torch.where(values < 0, values * penalty, values / penalty)


def _pick(
    allowed_R_V: Tensor, options: SamplingOptions, generator: torch.Generator | None
) -> Tensor:
    """One token for each row, at the temperature, within top_k and top_p."""
    if options.temperature == 0:
        return allowed_R_V.argmax(dim=-1)
    allowed_R_V = allowed_R_V / options.temperature
    if options.top_k:
        kth_R_1 = allowed_R_V.topk(min(options.top_k, allowed_R_V.shape[1])).values[:, -1:]
        allowed_R_V = allowed_R_V.masked_fill(allowed_R_V < kth_R_1, -torch.inf)
    probs_R_V = allowed_R_V.softmax(dim=-1)
    if options.top_p < 1.0:
        sorted_R_V, order_R_V = probs_R_V.sort(dim=-1, descending=True)
        # The token that crosses top_p is kept
        cut_R_V = sorted_R_V.cumsum(dim=-1) - sorted_R_V >= options.top_p
        probs_R_V = probs_R_V.scatter(1, order_R_V, sorted_R_V.masked_fill(cut_R_V, 0.0))
    # By the inverse distribution function, with one random number a row: torch.multinomial draws
    # one for every token of the vocabulary.
    cumulative_R_V = probs_R_V.cumsum(dim=-1)
    draw_R_1 = (
        torch.rand(len(probs_R_V), 1, generator=generator, device=probs_R_V.device)
        * cumulative_R_V[:, -1:]
    )
    token_R = torch.searchsorted(cumulative_R_V, draw_R_1, right=True)[:, 0]
    # A draw that is rounded up to the whole sum would fall behind the last possible token.
    return token_R.minimum((probs_R_V > 0).cumsum(dim=-1).argmax(dim=-1))


def _logps(logits_R_V: Tensor, token_R: Tensor, temperature: float) -> Tensor:
    scaled_R_V = logits_R_V / (temperature or 1.0)
    return scaled_R_V.gather(1, token_R[:, None])[:, 0] - scaled_R_V.logsumexp(dim=-1)


def _until_end(
    tokens_B_T: Tensor, logps_B_T: Tensor, eos: Tensor
) -> tuple[list[list[int]], list[list[float]]]:
    """Rows up to their first end token, which is included.

    A row may have stayed in the batch after it; what was written then is cut off.
    """
    ended_B_T = torch.isin(tokens_B_T, eos)
    length_B = torch.where(
        ended_B_T.any(dim=1), ended_B_T.int().argmax(dim=1) + 1, (tokens_B_T >= 0).sum(dim=1)
    ).tolist()
    pairs = zip(tokens_B_T.tolist(), logps_B_T.tolist(), length_B, strict=True)
    cut = [(tokens[:length], logps[:length]) for tokens, logps, length in pairs]
    return [tokens for tokens, _ in cut], [logps for _, logps in cut]
