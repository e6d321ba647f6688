"""Groups of completions whose prompt is read once: sampling them, and what their log-probs need.

A group of G completions shares image and prompt, which make up most of its tokens. So the prefix
goes through the model once per prompt, its keys and values are repeated for the group, and only the
completions go through it G times. The results equal those of a plain forward pass. Qwen3-VL's image
features come from the vision cache. The model code is that of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from egm_lib.inference.decode_loop import Prefix, SamplingOptions, complete
from egm_lib.inference.vision_cache import Features, VisionCache, as_encoder_output


def rollout_rows(on_gpu: bool) -> int:
    """Completions that are sampled together.

    More are no faster on a CPU. A GPU has to hold their keys and values: 16 GB for 64 completions
    of 1,024 tokens by a 2B, in float32.
    """
    return 64 if on_gpu else 512


@dataclass(frozen=True)
class Prompt:
    """One chat up to the assistant's turn: its tokens, their 3-D positions and its image.

    image: the file, or another name of the image.
    image_end: tokens that prompts of one image have in common; the last one follows the image.
    """

    ids: list[int]
    positions_3_T: Tensor
    image: Hashable
    image_end: int

    def upto_image(self) -> Prompt:
        end = self.image_end
        return Prompt(self.ids[:end], self.positions_3_T[:, :end], self.image, end)


class Reader:
    """Turns an image and a chat text into a Prompt, and images into features.

    Each image is processed once. It has a name, such as its file, that open_image opens.
    processor, model: of the Qwen3-VL family. `freeze_vision` must have frozen the model's vision
    with this cache.
    """

    def __init__(
        self, processor, model, cache: VisionCache, open_image: Callable[[Hashable], Image.Image]
    ):
        self.processor, self.model, self.cache, self.open_image = (
            processor,
            model,
            cache,
            open_image,
        )
        self._keys: dict[Hashable, bytes] = {}
        self._grids: dict[Hashable, Tensor] = {}
        self._heads: dict[tuple[str, tuple[int, int, int]], tuple[list[int], Tensor]] = {}

    def prompt(self, image: Hashable, text: str) -> Prompt:
        """text: the chat as `apply_chat_template` writes it, with one image placeholder."""
        before, after = text.split(self.processor.image_token)
        head_ids, head_3_T = self._head(before, tuple(self._grid(image).tolist()))
        tail_ids = self._tokens(after)
        start = int(head_3_T.max()) + 1
        tail_3_T = torch.arange(start, start + len(tail_ids)).expand(3, -1)
        return Prompt(
            [*head_ids, *tail_ids],
            torch.cat([head_3_T, tail_3_T], dim=1),
            image,
            len(head_ids) + 1,
        )

    def _tokens(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _head(self, before: str, grid: tuple[int, int, int]) -> tuple[list[int], Tensor]:
        """Tokens up to the end of the image, and their positions.

        They are the same for all images of one size.
        """
        if (before, grid) not in self._heads:
            image_token = self.model.config.image_token_id
            count = math.prod(grid) // self.processor.image_processor.merge_size**2
            ids = self._tokens(before) + [image_token] * count
            ids_1_T = torch.tensor([ids])
            positions_3_1_T, _ = self.model.model.get_rope_index(
                ids_1_T,
                mm_token_type_ids=(ids_1_T == image_token).int(),
                image_grid_thw=torch.tensor([grid]),
            )
            self._heads[before, grid] = ids, positions_3_1_T[:, 0]
        return self._heads[before, grid]

    def features(self, images: Sequence[Hashable]) -> list[Features]:
        """Features of images, in order; from the cache if it still holds them."""
        found = {
            path: self.cache.get(self._keys[path]) if path in self._keys else None
            for path in images
        }
        new = [path for path, features in found.items() if features is None]
        for start in range(0, len(new), 32):
            found.update(self._encode(new[start : start + 32]))
        return [found[path] for path in images]

    def _grid(self, image: Hashable) -> Tensor:
        if image not in self._grids:
            self.features([image])
        return self._grids[image]

    def _encode(self, images: list[Hashable]) -> dict[Hashable, Features]:
        inputs = self.processor.image_processor(
            [self.open_image(path) for path in images], return_tensors="pt"
        )
        visual, grids = self.model.model.visual, inputs["image_grid_thw"]
        pixels = inputs["pixel_values"].to(visual.dtype)
        for path, rows_P_D, grid_3 in zip(
            images, pixels.split(grids.prod(dim=-1).tolist()), grids, strict=True
        ):
            self._keys[path], self._grids[path] = visual.digests(rows_P_D, grid_3), grid_3
        output = visual(pixels.to(visual.device), grid_thw=grids.to(visual.device))
        sizes = (grids.prod(dim=-1) // visual.spatial_merge_size**2).tolist()
        layers = [
            tensor.split(sizes) for tensor in (output.pooler_output, *output.deepstack_features)
        ]
        seen = zip(images, zip(*layers, strict=True), strict=True)
        return {path: Features(merged, tuple(deepstack)) for path, (merged, *deepstack) in seen}


def read_prefix(model, prompts: Sequence[Prompt], features: list[Features]) -> Prefix:
    """Puts all but the last token of each prompt through the model.

    features: those of the prompts' images, in order.
    """
    device = model.device
    ids_N_P = pad_sequence(
        [torch.tensor(p.ids[:-1]) for p in prompts], batch_first=True, padding_side="left"
    )
    mask_N_P = pad_sequence(
        [torch.ones(len(p.ids) - 1, dtype=torch.long) for p in prompts],
        batch_first=True,
        padding_side="left",
    )
    positions = [p.positions_3_T[:, :-1].T for p in prompts]
    positions_3_N_P = pad_sequence(positions, batch_first=True, padding_side="left").permute(
        2, 0, 1
    )
    cache = DynamicCache()
    model.model(
        input_ids=ids_N_P.to(device),
        attention_mask=mask_N_P.to(device),
        position_ids=positions_3_N_P.to(device),
        past_key_values=cache,
        use_cache=True,
        mm_encoder_outputs={"image": as_encoder_output(features, split=True)},
    )
    if not cache.layers:
        raise RuntimeError(
            "the model kept no keys and values of the prompts: gradient checkpointing drops them"
        )
    return Prefix(
        cache,
        mask_N_P.to(device),
        torch.tensor([p.ids[-1] for p in prompts], device=device),
        torch.tensor([int(p.positions_3_T[0, -1]) for p in prompts], device=device),
        [p.ids for p in prompts],
    )


@torch.no_grad()
def sample(
    model,
    prompts: Sequence[Prompt],
    features: list[Features],
    group_size: int,
    options: SamplingOptions,
    eos_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """(tokens, log-probs) of group_size completions of each prompt, in order.

    End tokens are included. The log-probs are those of `decode_loop.complete`.
    """
    done = complete(
        model, read_prefix(model, prompts, features), group_size, options, eos_ids, generator
    )
    return done.tokens, done.logps
