"""Shapes of the models that the paper uses: numbers only, no weights and no torch.

A shape says how many parameters a model has, how many bytes a token of its KV cache takes, and how
many tokens an image becomes. `shape_of("Qwen/Qwen3-VL-8B-Thinking")` reads the table below;
`shape_from_config` reads a transformers configuration.

Sources of the table: the models' own config.json. Tests hold the counts against transformers'
models on the meta device, and against the totals that the model cards state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

from egm_lib.errors import EgmError

# InternVL-3's preprocessor_config.json: an image is cut into 1 to 12 tiles; a small copy of the
# whole is added to several
MAX_TILES = 12


class ShapeError(EgmError, ValueError):
    """A model whose shape is not known; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class TextShape:
    """The language model, under the names of config.json.

    intermediate: of the MLP, or of one expert where there are experts.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 128
    vocabulary: int = 151_936
    tied: bool = False  # the head is the embedding
    attention_bias: bool = False  # of query, key and value
    qk_norm: bool = True
    experts: int = 0
    active_experts: int = 0  # a token's
    context: int = 262_144  # max_position_embeddings

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; an untied head has as many again."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Parameters of one layer's attention."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        bias = (queries + 2 * keys) * self.attention_bias
        norms = 2 * self.head_dim * self.qk_norm
        return 2 * self.hidden * (queries + keys) + bias + norms

    @property
    def mlp(self) -> int:
        """Parameters of one gated MLP, or of one expert."""
        return 3 * self.hidden * self.intermediate

    def layer(self, experts: int | None = None) -> int:
        """Parameters of one layer; experts: so many of its experts instead of all."""
        experts = self.experts if experts is None else experts
        router = self.experts * self.hidden
        norms = 2 * self.hidden
        return self.attention + self.mlp * (experts if self.experts else 1) + router + norms

    @property
    def parameters(self) -> int:
        head = 0 if self.tied else self.embedding
        return self.embedding + head + self.layers * self.layer() + self.hidden

    @property
    def active_parameters(self) -> int:
        """Parameters that one token is multiplied with: those of the head, not the embedding."""
        return self.layers * self.layer(self.active_experts) + self.hidden + self.embedding

    def kv_bytes(self, bytes_per_value: int = 2) -> int:
        """Bytes of the KV cache a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_value


@dataclass(frozen=True, kw_only=True)
class QwenVision:
    """Qwen3-VL's vision tower, its merger and the mergers of its deepstack."""

    depth: int
    hidden: int
    intermediate: int
    out_hidden: int  # the language model's width
    heads: int = 16
    patch: int = 16
    temporal_patch: int = 2
    merge: int = 2
    positions: int = 2304
    deepstack: int = 3  # layers whose features enter the language model
    # preprocessor_config.json: smaller images are enlarged, larger ones are shrunk
    min_pixels: int = 65_536
    max_pixels: int = 16_777_216

    @property
    def token_edge(self) -> int:
        """Pixels of the side of the square that becomes one token."""
        return self.patch * self.merge

    @property
    def merger(self) -> int:
        """Parameters of all mergers."""
        wide = self.merge**2 * self.hidden
        layers = wide * wide + wide + wide * self.out_hidden + self.out_hidden
        return layers + 2 * self.hidden + self.deepstack * (layers + 2 * wide)

    @property
    def block(self) -> int:
        """Parameters of one block."""
        attention = 4 * (self.hidden**2 + self.hidden)
        mlp = 2 * self.hidden * self.intermediate + self.hidden + self.intermediate
        return attention + mlp + 4 * self.hidden

    @property
    def tower(self) -> int:
        """Parameters without the mergers."""
        pixels = 3 * self.temporal_patch * self.patch**2
        embedding = pixels * self.hidden + self.hidden + self.positions * self.hidden
        return embedding + self.depth * self.block

    def image_tokens(self, width: int, height: int, max_pixels: int | None = None) -> int:
        """Tokens of an image of width x height px, after the resize of Qwen's image processor.

        max_pixels: a limit of one's own; smaller images are then not enlarged to the model's least.
        """
        edge, least, most = self.token_edge, self.min_pixels, self.max_pixels
        if max_pixels is not None:
            least, most = edge**2, min(max_pixels, most)
        rows, columns = round(height / edge), round(width / edge)
        if rows * columns * edge**2 > most:
            scale = math.sqrt(width * height / most) * edge
            rows, columns = max(1, int(height / scale)), max(1, int(width / scale))
        elif rows * columns * edge**2 < least:
            scale = math.sqrt(least / (width * height)) / edge
            rows, columns = math.ceil(height * scale), math.ceil(width * scale)
        return rows * columns

    def tower_tokens(self, image_tokens: int) -> int:
        """Patches that the tower reads for so many tokens of the language model."""
        return image_tokens * self.merge**2

    def pixel_values(self, image_tokens: int) -> int:
        """Numbers in `pixel_values` for so many tokens of the language model."""
        return self.tower_tokens(image_tokens) * 3 * self.temporal_patch * self.patch**2


@dataclass(frozen=True, kw_only=True)
class InternVision:
    """InternVL-3's vision tower and projector."""

    depth: int
    hidden: int
    intermediate: int
    out_hidden: int
    heads: int
    attention_bias: bool = True
    qk_norm: bool = False
    rms_norm: bool = False  # instead of LayerNorm, which has a bias
    patch: int = 14
    tile: int = 448  # px
    merge: int = 2  # 1 / downsample_ratio

    @property
    def merger(self) -> int:
        """Parameters of the projector."""
        wide, out = self.merge**2 * self.hidden, self.out_hidden
        return 2 * wide + wide * out + out + out * out + out

    @property
    def block(self) -> int:
        """Parameters of one block."""
        attention = 4 * self.hidden**2 + self.hidden + 3 * self.hidden * self.attention_bias
        mlp = 2 * self.hidden * self.intermediate + self.hidden + self.intermediate
        norms = (2 if self.rms_norm else 4) * self.hidden + 2 * self.hidden * self.qk_norm
        return attention + mlp + norms + 2 * self.hidden  # and a scale for each half

    @property
    def tower(self) -> int:
        """Parameters without the projector."""
        patches = (self.tile // self.patch) ** 2
        embedding = 3 * self.patch**2 * self.hidden + self.hidden
        positions = (patches + 1) * self.hidden + self.hidden  # and the class token
        return embedding + positions + self.depth * self.block

    @property
    def tile_tokens(self) -> int:
        """Tokens that the language model reads for a tile."""
        return (self.tile // self.patch // self.merge) ** 2

    def tiles(self, width: int, height: int) -> int:
        """Tiles of an image of width x height px: the grid nearest to its aspect ratio.

        Among equally near grids the larger one is taken, as long as the image has more than half
        of its pixels.
        """
        best, nearest = 1, math.inf
        for columns, rows in _grids():
            distance = abs(width / height - columns / rows)
            enough = width * height > 0.5 * self.tile**2 * columns * rows
            if distance < nearest or distance == nearest and enough:
                best, nearest = columns * rows, distance
        return best + (best > 1)

    def image_tokens(self, width: int, height: int, max_pixels: int | None = None) -> int:
        """Tokens of an image of width x height px. max_pixels has no effect on tiles."""
        return self.tiles(width, height) * self.tile_tokens

    def tower_tokens(self, image_tokens: int) -> int:
        """Patches and class tokens that the tower reads for so many of the language model's."""
        tiles = image_tokens // self.tile_tokens
        return tiles * ((self.tile // self.patch) ** 2 + 1)

    def pixel_values(self, image_tokens: int) -> int:
        """Numbers in `pixel_values` for so many tokens of the language model."""
        return image_tokens // self.tile_tokens * 3 * self.tile**2


@cache
def _grids() -> list[tuple[int, int]]:
    """(columns, rows) of at most MAX_TILES tiles, the smaller grids first."""
    sides = range(1, MAX_TILES + 1)
    grids = [(c, r) for c in sides for r in sides if c * r <= MAX_TILES]
    return sorted(grids, key=lambda grid: grid[0] * grid[1])


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A vision-language model."""

    name: str
    text: TextShape
    vision: QwenVision | InternVision

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.text.parameters + self.vision.tower + self.vision.merger

    @property
    def active_parameters(self) -> int:
        """Parameters that a token of the language model multiplies with."""
        return self.text.active_parameters


def _qwen3(layers: int, hidden: int, heads: int, intermediate: int, **more) -> TextShape:
    return TextShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        intermediate=intermediate,
        **{"kv_heads": 8} | more,
    )


def _qwen25(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, head_dim: int = 128
) -> TextShape:
    """Qwen2.5 as InternVL-3 has it: with tokens for images, and never tied."""
    return TextShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=intermediate,
        head_dim=head_dim,
        vocabulary=151_674,
        attention_bias=True,
        qk_norm=False,
        context=32_768,
    )


# Qwen3 with 128 experts of width 1,536, eight of them for a token
_QWEN3_235B = _qwen3(94, 4096, 64, 1536, kv_heads=4, experts=128, active_experts=8)


def _qwen_small(out_hidden: int) -> QwenVision:
    return QwenVision(depth=24, hidden=1024, intermediate=4096, out_hidden=out_hidden)


def _qwen_large(out_hidden: int) -> QwenVision:
    return QwenVision(depth=27, hidden=1152, intermediate=4304, out_hidden=out_hidden)


def _intern_300m(out_hidden: int) -> InternVision:
    return InternVision(depth=24, hidden=1024, intermediate=4096, heads=16, out_hidden=out_hidden)


def _intern_6b(out_hidden: int) -> InternVision:
    return InternVision(
        depth=45,
        hidden=3200,
        intermediate=12_800,
        heads=25,
        out_hidden=out_hidden,
        attention_bias=False,
        qk_norm=True,
        rms_norm=True,
    )


def _table(*rows: tuple[str, TextShape, QwenVision | InternVision]) -> dict[str, ModelShape]:
    return {name: ModelShape(name=name, text=text, vision=vision) for name, text, vision in rows}


SHAPES = _table(
    ("Qwen3-VL-2B", _qwen3(28, 2048, 16, 6144, tied=True), _qwen_small(2048)),
    ("Qwen3-VL-4B", _qwen3(36, 2560, 32, 9728, tied=True), _qwen_small(2560)),
    ("Qwen3-VL-8B", _qwen3(36, 4096, 32, 12_288), _qwen_large(4096)),
    ("Qwen3-VL-32B", _qwen3(64, 5120, 64, 25_600), _qwen_large(5120)),
    ("Qwen3-VL-235B-A22B", _QWEN3_235B, _qwen_large(4096)),
    ("InternVL3-1B", _qwen25(24, 896, 14, 2, 4864, head_dim=64), _intern_300m(896)),
    ("InternVL3-2B", _qwen25(28, 1536, 12, 2, 8960), _intern_300m(1536)),
    ("InternVL3-8B", _qwen25(28, 3584, 28, 4, 18_944), _intern_300m(3584)),
    ("InternVL3-14B", _qwen25(48, 5120, 40, 8, 13_824), _intern_300m(5120)),
    ("InternVL3-38B", _qwen25(64, 5120, 40, 8, 27_648), _intern_6b(5120)),
    ("InternVL3-78B", _qwen25(80, 8192, 64, 8, 29_568), _intern_6b(8192)),
    ("InternVL3_5-241B-A28B", replace(_QWEN3_235B, context=40_960), _intern_6b(4096)),
)
# The published EGM models are trained from these
ALIASES = {"EGM-4B": "Qwen3-VL-4B", "EGM-8B": "Qwen3-VL-8B"}


def shape_of(path: str) -> ModelShape:
    """The shape of a model by its id on the hub, such as "Qwen/Qwen3-VL-8B-Thinking".

    Raises ShapeError for a model that the table lacks.
    """
    name = path.rpartition("/")[2]
    for ending in ("-Thinking", "-Instruct", "-hf", "-HF"):
        name = name.removesuffix(ending)
    name = ALIASES.get(name, name)
    if name not in SHAPES:
        raise ShapeError(
            f"The shape of {path} is not known: use a folder that holds its config.json, or one of "
            f"{', '.join(SHAPES)}."
        )
    return SHAPES[name]


def _side(value: int | Iterable[int]) -> int:
    """InternVL's sizes are (height, width) of a square."""
    return value if isinstance(value, int) else next(iter(value))


def shape_from_config(config) -> ModelShape:
    """The shape of a transformers configuration of Qwen3-VL (dense or with experts) or InternVL-3.

    Raises ShapeError for another architecture.
    """
    text, vision = config.text_config, config.vision_config
    experts = getattr(text, "num_experts", 0) or 0
    text_shape = TextShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        intermediate=text.moe_intermediate_size if experts else text.intermediate_size,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        tied=bool(config.tie_word_embeddings),
        attention_bias=text.model_type == "qwen2",
        qk_norm=text.model_type != "qwen2",
        experts=experts,
        active_experts=text.num_experts_per_tok if experts else 0,
        context=text.max_position_embeddings,
    )
    if config.model_type in ("qwen3_vl", "qwen3_vl_moe"):
        vision_shape = QwenVision(
            depth=vision.depth,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            out_hidden=vision.out_hidden_size,
            heads=vision.num_heads,
            patch=vision.patch_size,
            temporal_patch=vision.temporal_patch_size,
            merge=vision.spatial_merge_size,
            positions=vision.num_position_embeddings,
            deepstack=len(vision.deepstack_visual_indexes),
        )
    elif config.model_type == "internvl":
        vision_shape = InternVision(
            depth=vision.num_hidden_layers,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            out_hidden=text.hidden_size,
            heads=vision.num_attention_heads,
            attention_bias=vision.attention_bias,
            qk_norm=vision.use_qk_norm,
            rms_norm=vision.norm_type == "rms_norm",
            patch=_side(vision.patch_size),
            tile=_side(vision.image_size),
            merge=round(1 / config.downsample_ratio),
        )
    else:
        raise ShapeError(
            f"The shape of a model of type {config.model_type!r} is not known: qwen3_vl, "
            "qwen3_vl_moe and internvl are."
        )
    return ModelShape(name=config.model_type, text=text_shape, vision=vision_shape)
