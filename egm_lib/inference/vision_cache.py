"""A cache of the outputs of a frozen vision tower, so that each image is encoded once.

Without it, a group of 16 rollouts encodes the same image 16 times, and so does every epoch. If the
tower is frozen, its merged embeddings and deepstack features never change. `freeze_vision(model)`
makes the tower take them from the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

GIB = 2**30
# Patches that go through the tower together. With more, a CPU's caches overflow (1.7 times slower).
CPU_PATCHES = 2048


@dataclass(frozen=True)
class Features:
    """What a language model gets of one image.

    merged_T_W, and one deepstack_T_W for each of its early layers.
    """

    merged: Tensor
    deepstack: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.merged, *self.deepstack))


@dataclass
class VisionCache:
    """Features by tower and image. Above max_bytes, the least recently used are dropped."""

    max_bytes: int = GIB
    hits: int = 0
    misses: int = 0
    nbytes: int = 0
    _entries: OrderedDict[bytes, Features] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Features | None:
        features = self._entries.get(key)
        if features is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return features

    def put(self, key: bytes, features: Features) -> None:
        if key in self._entries:
            return
        self._entries[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self.nbytes -= oldest.nbytes


def tower_digest(visual: nn.Module) -> bytes:
    """A digest of the names and values of all weights and buffers of a vision tower."""
    digest = xxhash.xxh3_128()
    for name, tensor in visual.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes(tensor))
    return digest.digest()


def image_digest(tower: bytes, pixels_P_D: Tensor, grid_3: Tensor) -> bytes:
    """The key of an image: a digest of the tower's digest, the grid, and the image's patches."""
    digest = xxhash.xxh3_128(tower)
    digest.update(repr((grid_3.tolist(), pixels_P_D.dtype)).encode())
    digest.update(_bytes(pixels_P_D))
    return digest.digest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def freeze_vision(model: nn.Module, cache: VisionCache | None = None) -> VisionCache:
    """Freezes the vision tower and mergers of a Qwen3-VL, and lets its forward use the cache.

    The names of parameters do not change, so checkpoints do not either. Returns the cache.
    Raises ValueError for a model without `model.visual`.
    """
    visual = getattr(getattr(model, "model", None), "visual", None)
    if visual is None:
        raise ValueError(
            f"{type(model).__name__} has no model.visual: the vision cache works for the Qwen3-VL "
            "family only"
        )
    cache = VisionCache() if cache is None else cache
    visual.requires_grad_(False)
    visual.eval()
    tower, encode, merge = tower_digest(visual), visual.forward, visual.spatial_merge_size**2

    def forward(
        hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any
    ) -> BaseModelOutputWithDeepstackFeatures:
        pixels = hidden_states.split(grid_thw.prod(dim=-1).tolist())
        keys = [
            image_digest(tower, rows_P_D, grid_3)
            for rows_P_D, grid_3 in zip(pixels, grid_thw, strict=True)
        ]
        found = {key: cache.get(key) for key in dict.fromkeys(keys)}
        new = [key for key, features in found.items() if features is None]
        for part in _parts(
            new, [len(pixels[keys.index(key)]) for key in new], hidden_states.device
        ):
            first = [keys.index(key) for key in part]
            grid_N_3 = grid_thw[first]
            with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
                seen = encode(torch.cat([pixels[i] for i in first]), grid_thw=grid_N_3, **kwargs)
            sizes = (grid_N_3.prod(dim=-1) // merge).tolist()
            layers = [
                tensor.split(sizes) for tensor in (seen.pooler_output, *seen.deepstack_features)
            ]
            for key, (merged, *deepstack) in zip(part, zip(*layers, strict=True), strict=True):
                # Cloned: a slice would keep the whole batch alive.
                found[key] = Features(merged.clone(), tuple(tensor.clone() for tensor in deepstack))
                cache.put(key, found[key])
        return as_encoder_output([found[key] for key in keys])

    visual.forward = forward
    visual.digests = lambda pixels, grid_3: image_digest(tower, pixels, grid_3)
    return cache


def _parts(keys: list[bytes], sizes: list[int], device: torch.device) -> list[list[bytes]]:
    """The images in order, on a CPU in parts of at most CPU_PATCHES patches, or of one image."""
    if device.type != "cpu":
        return [keys] if keys else []
    parts: list[list[bytes]] = []
    room = 0
    for key, size in zip(keys, sizes, strict=True):
        if size > room or not parts:
            parts.append([])
            room = CPU_PATCHES
        parts[-1].append(key)
        room -= size
    return parts


def as_encoder_output(
    features: list[Features], split: bool = False
) -> BaseModelOutputWithDeepstackFeatures:
    """Features of images, in order, as the tower returns them.

    split: as `model.forward(mm_encoder_outputs=...)` takes them.
    """
    merged, deepstack = (
        [f.merged for f in features],
        list(zip(*(f.deepstack for f in features), strict=True)),
    )
    if split:
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=merged, deepstack_features=deepstack
        )
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=torch.cat(merged),
        deepstack_features=[torch.cat(layer) for layer in deepstack],
    )
