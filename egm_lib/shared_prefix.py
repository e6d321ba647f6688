"""Many completions of few prompts, each prompt read once: their log-probs (with gradient) and their sampling.

A group of G completions shares picture and prompt, which are most of its tokens. So the prefix runs once per prompt,
its keys and values are repeated to the group, and only the completions run G times. Results equal a plain forward's.
Qwen3-VL's picture comes from the vision cache; everything here is transformers' own model code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from trl.kernels import ChunkedLogProbFunction

from egm_lib.vision_cache import Features, VisionCache, as_encoder_output

VOCABULARY_CHUNK = 32768  # TRL's own choice for the chunked LM head
SMALL_LOGITS = 2**25  # tokens x vocabulary that may be held (128 MiB): faster than the chunked head on a CPU


@dataclass(frozen=True)
class Prompt:
    """One chat up to the assistant's turn: its tokens, their 3-D positions, the picture.

    The first picture_end tokens end with the token after the picture: what prompts of one picture have in common.
    """

    ids: list[int]
    positions_3_T: Tensor
    picture: Path
    picture_end: int

    def upto_picture(self) -> Prompt:
        end = self.picture_end
        return Prompt(self.ids[:end], self.positions_3_T[:, :end], self.picture, end)


class Reader:
    """Turns (picture file, chat text) into a Prompt, and picture files into features; each picture is processed once.

    processor, model: of the Qwen3-VL family, the model's vision frozen by `freeze_vision` with this cache.
    """

    def __init__(self, processor, model, cache: VisionCache, open_image: Callable[[Path], Image.Image]):
        self.processor, self.model, self.cache, self.open_image = processor, model, cache, open_image
        self._keys: dict[Path, bytes] = {}
        self._grids: dict[Path, Tensor] = {}
        self._heads: dict[tuple[str, tuple[int, int, int]], tuple[list[int], Tensor]] = {}

    def prompt(self, picture: Path, text: str) -> Prompt:
        """text: the chat as `apply_chat_template` writes it, with one image placeholder."""
        before, after = text.split(self.processor.image_token)
        head_ids, head_3_T = self._head(before, tuple(self._grid(picture).tolist()))
        tail_ids = self._tokens(after)
        start = int(head_3_T.max()) + 1
        tail_3_T = torch.arange(start, start + len(tail_ids)).expand(3, -1)
        return Prompt([*head_ids, *tail_ids], torch.cat([head_3_T, tail_3_T], dim=1), picture, len(head_ids) + 1)

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _head(self, before: str, grid: tuple[int, int, int]) -> tuple[list[int], Tensor]:
        """Tokens up to the end of the picture, and their positions: the same for every picture of a size."""
        if (before, grid) not in self._heads:
            image_token = self.model.config.image_token_id
            count = math.prod(grid) // self.processor.image_processor.merge_size**2
            ids = self._tokens(before) + [image_token] * count
            ids_1_T = torch.tensor([ids])
            positions_3_1_T, _ = self.model.model.get_rope_index(
                ids_1_T, mm_token_type_ids=(ids_1_T == image_token).int(), image_grid_thw=torch.tensor([grid])
            )
            self._heads[before, grid] = ids, positions_3_1_T[:, 0]
        return self._heads[before, grid]

    def features(self, pictures: Sequence[Path]) -> list[Features]:
        """Features of picture files, from the cache where it still holds them."""
        found = {path: self.cache.get(self._keys[path]) if path in self._keys else None for path in pictures}
        new = [path for path, features in found.items() if features is None]
        for start in range(0, len(new), 32):
            found.update(self._look(new[start : start + 32]))
        return [found[path] for path in pictures]

    def _grid(self, picture: Path) -> Tensor:
        if picture not in self._grids:
            self.features([picture])
        return self._grids[picture]

    def _look(self, pictures: list[Path]) -> dict[Path, Features]:
        inputs = self.processor.image_processor([self.open_image(path) for path in pictures], return_tensors="pt")
        visual, grids = self.model.model.visual, inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].to(visual.dtype)
        for path, rows_P_D, grid_3 in zip(pictures, pixels.split(grids.prod(dim=-1).tolist()), grids, strict=True):
            self._keys[path], self._grids[path] = visual.digests(rows_P_D, grid_3), grid_3
        output = visual(pixels.to(visual.device), grid_thw=grids.to(visual.device))
        sizes = (grids.prod(dim=-1) // visual.spatial_merge_size**2).tolist()
        layers = [tensor.split(sizes) for tensor in (output.pooler_output, *output.deepstack_features)]
        seen = zip(pictures, zip(*layers, strict=True), strict=True)
        return {path: Features(merged, tuple(deepstack)) for path, (merged, *deepstack) in seen}


@dataclass
class Prefix:
    """Prompts that a model has read: cache and mask_N_P of all but the last token, which starts every completion."""

    cache: DynamicCache
    mask_N_P: Tensor
    last_N: Tensor
    position_N: Tensor  # of the last token


def read_prefix(model, prompts: Sequence[Prompt], features: list[Features]) -> Prefix:
    """Runs all but the last token of each prompt; features: of the prompts' pictures, in order."""
    device = model.device
    ids_N_P = pad_sequence([torch.tensor(p.ids[:-1]) for p in prompts], batch_first=True, padding_side="left")
    mask_N_P = pad_sequence(
        [torch.ones(len(p.ids) - 1, dtype=torch.long) for p in prompts], batch_first=True, padding_side="left"
    )
    positions = [p.positions_3_T[:, :-1].T for p in prompts]
    positions_3_N_P = pad_sequence(positions, batch_first=True, padding_side="left").permute(2, 0, 1)
    cache = DynamicCache()
    model.model(
        input_ids=ids_N_P.to(device), attention_mask=mask_N_P.to(device), position_ids=positions_3_N_P.to(device),
        past_key_values=cache, use_cache=True, mm_encoder_outputs={"image": as_encoder_output(features, split=True)},
    )  # fmt: skip
    return Prefix(
        cache, mask_N_P.to(device), torch.tensor([p.ids[-1] for p in prompts], device=device),
        torch.tensor([int(p.positions_3_T[0, -1]) for p in prompts], device=device),
    )  # fmt: skip


def suffix_logps(
    model, prefixes: Sequence[Prompt], features: list[Features], group_B: Tensor, suffix_B_T: Tensor,
    attend_B_T: Tensor, keep_B_T: Tensor, *, temperature: float = 1.0, entropy: str | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probs of the tokens after each prefix, and the entropies there where asked for; zeros where keep_B_T is 0.

    group_B: index of each row's prefix, whose last token predicts the first of the suffix.
    attend_B_T: 0 on padding (right); keep_B_T: the tokens to score.
    """
    prefix = read_prefix(model, prefixes, features)
    for layer in prefix.cache.layers:
        layer.keys, layer.values = layer.keys[group_B], layer.values[group_B]
    inputs_B_T = torch.cat([prefix.last_N[group_B, None], suffix_B_T[:, :-1]], dim=1)
    position_B_T = prefix.position_N[group_B, None] + torch.arange(inputs_B_T.shape[1], device=inputs_B_T.device)
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
    """Log-probs (float32) of the targets, and entropies; the logits are never held where they would be large.

    entropy: None (not computed), "value" (to look at) or "gradient" (to train on).
    """
    head = model.get_output_embeddings()
    if len(target_K) * head.weight.shape[0] > SMALL_LOGITS:
        logps_K, entropy_K, *_ = ChunkedLogProbFunction.apply(
            hidden_K_W, head.weight, head.bias, target_K, temperature, VOCABULARY_CHUNK, None, 1.0,
            ("entropy",) if entropy else (),
        )  # fmt: skip
        return logps_K, entropy_K
    all_K_V = (head(hidden_K_W).float() / temperature).log_softmax(dim=-1)
    logps_K = all_K_V.gather(1, target_K[:, None])[:, 0]
    if entropy is None:
        return logps_K, None
    known_K_V = all_K_V if entropy == "gradient" else all_K_V.detach()
    return logps_K, -(known_K_V.exp() * known_K_V).sum(dim=-1)


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for what comes: writes in place where DynamicLayer copies all it holds at each token."""

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
        self.keys, self.values = self.room_keys[:, :, : self.length], self.room_values[:, :, : self.length]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.length + key_states.shape[2]
        self.room_keys[:, :, self.length : end] = key_states
        self.room_values[:, :, self.length : end] = value_states
        self.length = end
        self._show()
        return self.keys, self.values

    def keep(self, rows: Tensor) -> None:
        self.room_keys, self.room_values = self.room_keys[rows], self.room_values[rows]
        self._show()


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 is greedy; top_k 0 and top_p 1 do not cut."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    suppress_ids: tuple[int, ...] = ()


@torch.no_grad()
def sample(
    model, prompts: Sequence[Prompt], features: list[Features], group_size: int, options: SamplingOptions,
    eos_ids: Sequence[int], generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """group_size completions of each prompt, in order, end token included; and the log-prob of each token.

    The log-probs are the policy's at the temperature, before suppression, top_k and top_p: what a trainer computes.
    Rows that have ended leave the batch. Greedy answers equal those of `model.generate`.
    """
    prefix = read_prefix(model, prompts, features)
    rows = torch.arange(len(prompts), device=model.device).repeat_interleave(group_size)
    layers = [_RoomyLayer(x.keys, x.values, rows, options.max_new_tokens) for x in prefix.cache.layers]
    cache = DynamicCache()
    cache.layers = layers
    mask_R_T, token_R, position_R = prefix.mask_N_P[rows], prefix.last_N[rows], prefix.position_N[rows]
    mask_R_T = torch.cat([mask_R_T, mask_R_T.new_ones(len(rows), options.max_new_tokens)], dim=1)
    start, alive_R = prefix.mask_N_P.shape[1], torch.arange(len(rows), device=model.device)
    tokens_B_T = torch.full((len(rows), options.max_new_tokens), -1)
    logps_B_T = torch.zeros((len(rows), options.max_new_tokens))
    eos = torch.tensor(list(eos_ids), device=model.device)
    for step in range(options.max_new_tokens):
        hidden_R_1_W = model.model(
            input_ids=token_R[:, None], attention_mask=mask_R_T[:, : start + step + 1],
            position_ids=(position_R + step).expand(3, 1, -1).transpose(1, 2), past_key_values=cache, use_cache=True,
        ).last_hidden_state  # fmt: skip
        token_R, logp_R = _pick(model.get_output_embeddings()(hidden_R_1_W[:, -1]).float(), options, generator)
        tokens_B_T[alive_R, step], logps_B_T[alive_R, step] = token_R.cpu(), logp_R.cpu()
        going_R = ~torch.isin(token_R, eos)
        count = int(going_R.sum())
        if count == 0:
            break
        if count < 0.9 * len(token_R):  # compacting copies the cache: not for every row that ends
            keep = going_R.nonzero()[:, 0]
            alive_R, token_R, position_R, mask_R_T = (x[keep] for x in (alive_R, token_R, position_R, mask_R_T))
            for layer in layers:
                layer.keep(keep)
    return _until_end(tokens_B_T, logps_B_T, eos.cpu())


def _pick(logits_R_V: Tensor, options: SamplingOptions, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A token of each row, and its log-prob under the uncut distribution at the temperature."""
    scaled_R_V = logits_R_V / (options.temperature or 1.0)
    norm_R = scaled_R_V.logsumexp(dim=-1)
    allowed_R_V = scaled_R_V.clone() if options.suppress_ids else scaled_R_V
    allowed_R_V[:, list(options.suppress_ids)] = -torch.inf
    if options.temperature == 0:
        token_R = allowed_R_V.argmax(dim=-1)
    else:
        if options.top_k:
            kth_R_1 = allowed_R_V.topk(min(options.top_k, allowed_R_V.shape[1])).values[:, -1:]
            allowed_R_V = allowed_R_V.masked_fill(allowed_R_V < kth_R_1, -torch.inf)
        probs_R_V = allowed_R_V.softmax(dim=-1)
        if options.top_p < 1.0:
            sorted_R_V, order_R_V = probs_R_V.sort(dim=-1, descending=True)
            cut_R_V = sorted_R_V.cumsum(dim=-1) - sorted_R_V >= options.top_p  # the token that crosses top_p stays
            probs_R_V = probs_R_V.scatter(1, order_R_V, sorted_R_V.masked_fill(cut_R_V, 0.0))
        # Inverse distribution function: torch.multinomial draws a random number for every token of the vocabulary.
        cumulative_R_V = probs_R_V.cumsum(dim=-1)
        draw_R_1 = torch.rand(len(probs_R_V), 1, generator=generator, device=probs_R_V.device) * cumulative_R_V[:, -1:]
        token_R = torch.searchsorted(cumulative_R_V, draw_R_1, right=True)[:, 0].clamp(max=probs_R_V.shape[1] - 1)
    return token_R, scaled_R_V.gather(1, token_R[:, None])[:, 0] - norm_R


def _until_end(tokens_B_T: Tensor, logps_B_T: Tensor, eos: Tensor) -> tuple[list[list[int]], list[list[float]]]:
    """Rows up to and with the first end token; rows that went on in the batch after it are cut."""
    ended_B_T = torch.isin(tokens_B_T, eos)
    length_B = torch.where(
        ended_B_T.any(dim=1), ended_B_T.int().argmax(dim=1) + 1, (tokens_B_T >= 0).sum(dim=1)
    ).tolist()
    pairs = zip(tokens_B_T.tolist(), logps_B_T.tolist(), length_B, strict=True)
    cut = [(tokens[:length], logps[:length]) for tokens, logps, length in pairs]
    return [tokens for tokens, _ in cut], [logps for _, logps in cut]
