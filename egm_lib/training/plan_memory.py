"""What each GPU holds in a training, part by part, with the arithmetic.

A step has up to three phases: the rollout (GRPO), the update (forward and backward passes) and the
optimizer's step. A part counts in every phase during which it is held; the fullest phase decides.
Sizes of activations are those of transformers' own layers under scaled dot-product attention.
A test compares them with the tensors that autograd really keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from egm_lib.inference.shared_prefix import rollout_rows
from egm_lib.model_shapes import InternVision, ModelShape, QwenVision, TextShape
from egm_lib.profile import GRPO, SFT
from egm_lib.training.hardware import GIB, Hardware
from egm_lib.training.model_setup import rollout_context
from egm_lib.training.prefix_logps import SMALL_LOGITS, VOCABULARY_CHUNK

Phase = Literal["rollout", "update", "optimizer"]
ALL: tuple[Phase, ...] = ("rollout", "update", "optimizer")
UPDATE: tuple[Phase, ...] = ("update",)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# float32 values that TRL's chunked head holds of a tile of logits: on a GPU its kernel works in
# place; without Triton its backward pass holds the tile, eight steps of its gradient and a mask
TILE_COPIES_GPU, TILE_COPIES_CPU = 1, 8.25
# float32 copies of full logits where they are small: the logits, their log-softmax, two gradients
SMALL_LOGITS_COPIES = 4
# Gradients of a tied embedding at the end of the backward pass, before they are accumulated: the
# head's, the embedding's, and their sum
TIED_GRADIENTS = 3
# float32 copies of the next token's logits: themselves, sorted, softmax, cumulative sum
SAMPLING_COPIES = 4
# Ours: the CUDA context, cuBLAS' workspaces and NCCL's buffers take 1 to 2 GiB
CONTEXT_BYTES = 1.5 * GIB
# Ours: vLLM's CUDA graphs, which stand beside its share and stay while it sleeps, take 0.5 to 1.5
GRAPHS_BYTES = 1.0 * GIB


@dataclass(frozen=True)
class Part:
    """One part of the memory. how: its arithmetic."""

    name: str
    bytes: float
    how: str
    phases: tuple[Phase, ...] = ALL


@dataclass(frozen=True, kw_only=True)
class Row:
    """Tokens of one row. answer: the mean; longest: what a batch is padded to."""

    image: int
    question: int
    answer: int
    longest: int

    @property
    def prompt(self) -> int:
        return self.image + self.question


# DeepSpeed 0.19's defaults (runtime/zero/config.py); accelerate's configuration states none
ZERO_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How several GPUs divide a model.

    zero: sizes of DeepSpeed's buffers, in numbers of values.
    """

    kind: Literal["none", "zero-3"] = "none"
    offload_optimizer: bool = False
    offload_weights: bool = False
    zero: Mapping[str, int] = field(default_factory=lambda: ZERO_DEFAULTS)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All that decides what a stage holds.

    shared_prefix: whether our own trainer runs, which reads a prompt once (model_setup).
    """

    options: SFT | GRPO
    shape: ModelShape
    row: Row
    hardware: Hardware
    sharding: Sharding
    shared_prefix: bool

    @property
    def shards(self) -> int:
        return 1 if self.sharding.kind == "none" else self.hardware.count

    @property
    def compute(self) -> int:
        """Bytes of a value that forward and backward compute with."""
        dtype = getattr(self.options, "compute_dtype", None) or self.options.dtype
        return BYTES[dtype]

    @property
    def checkpointing(self) -> bool:
        """Gradient checkpointing: on a GPU, except where rows share keys and values."""
        return self.hardware.device.is_gpu and not self.shared_prefix

    @property
    def packs(self) -> bool:
        """Whether TRL's trainer reads the prompt of a group once (packed_groups)."""
        options = self.options
        return (
            isinstance(options, GRPO)
            and options.shared_prefix == "auto"
            and not self.shared_prefix
            and options.per_device_train_batch_size % options.num_generations == 0
        )

    @property
    def trained(self) -> int:
        """Parameters that are trained."""
        if self.options.lora:
            return lora_parameters(self.shape.text, self.options.lora.r)
        vision = self.shape.vision
        frozen = vision.tower * self.options.freeze_vision
        return self.shape.parameters - frozen - vision.merger * self.options.freeze_merger

    @property
    def rows(self) -> int:
        """Rows of one forward and backward pass, of the mean length."""
        rows = self.options.per_device_train_batch_size
        budget = getattr(self.options, "micro_batch_tokens", None)
        if budget is None or self.shared_prefix:
            return rows
        reads = 1 / self.options.num_generations if self.packs else 1  # of a prompt, for each row
        return max(1, min(rows, int(budget // (self.row.prompt * reads + self.row.answer))))

    @property
    def prompts(self) -> int:
        """Prompts of one forward and backward pass that are read: each row's, or once a group."""
        if not (self.shared_prefix or self.packs):
            return self.rows
        together = getattr(self.options, "num_generations", max(1, self.rows // 4))
        return -(-self.rows // together)

    @property
    def answer_tokens(self) -> int:
        """Tokens of the answers of one forward and backward pass, each as long as the longest."""
        return min(self.rows * self.row.longest, self.tokens)

    @property
    def tokens(self) -> int:
        """Tokens of one forward and backward pass, padded; at most the budget's."""
        tokens = self.prompts * self.row.prompt + self.rows * self.row.longest
        budget = getattr(self.options, "micro_batch_tokens", None)
        if budget is None or self.shared_prefix:
            return tokens
        return min(tokens, max(budget, self.row.prompt + self.row.longest))

    @property
    def step_rows(self) -> int:
        """GRPO's completions of a step on one GPU."""
        options = self.options
        return -(-options.prompts_per_step * options.num_generations // self.hardware.count)


def lora_parameters(text: TextShape, rank: int) -> int:
    """Parameters of LoRA on every linear layer of the language model."""
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    sides = (
        2 * (text.hidden + queries)
        + 2 * (text.hidden + keys)
        + 3 * (text.hidden + text.intermediate)
    )
    return text.layers * rank * sides


def text_layer_bytes(text: TextShape, value: int, length: int) -> int:
    """Bytes a token that autograd keeps of one layer of the language model.

    value: bytes of a value that is computed with; norms compute in float32. length: of a row.
    """
    queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim
    # A norm keeps its input in float32, the normalised input and its output
    norms = 2 * text.hidden * (4 + 2 * value)
    head_norms = (4 + value) * (queries + keys) * text.qk_norm
    # Keys and values, repeated for the queries that share them; queries and output; the mask
    repeated = queries if text.kv_heads < text.heads else keys
    attention = value * (2 * queries + 2 * repeated + length)
    mlp = 4 * value * text.intermediate  # gate, its activation, up, their product
    return norms + head_norms + attention + mlp


def language_layer_bytes(setting: Setting) -> float:
    """Bytes a token that autograd keeps of one layer of the language model in a pass."""
    text, value, row, tokens = setting.shape.text, setting.compute, setting.row, setting.tokens
    # Packed rows have no padding, and their masks are small
    kept = text_layer_bytes(text, value, 0 if setting.packs else row.prompt + row.longest)
    if setting.prompts == setting.rows:
        return kept
    # Every answer attends to a copy of its prompt's keys and values
    repeated = text.heads if text.kv_heads < text.heads else text.kv_heads
    copies = 2 * repeated * setting.rows * row.prompt
    if setting.packs:  # queries and output of the answers are taken out of the row, and put back
        copies += 2 * text.heads * (tokens - setting.prompts * row.prompt)
    return kept + value * text.head_dim * copies / tokens


def block_bytes(vision: QwenVision | InternVision, value: int) -> int:
    """Bytes a patch that autograd keeps of one block of the vision tower."""
    if isinstance(vision, QwenVision):
        # Two norms, two inputs of layers; queries, keys and values before and after their rotation
        # (five: values are not rotated); output of attention, before and after its parts are joined
        return value * (11 * vision.hidden + 2 * vision.intermediate)
    norms = (4 + value) * 2 * vision.hidden * vision.qk_norm
    # Two norms, two inputs; queries, keys, values, output; each half before it is scaled
    return norms + value * (10 * vision.hidden + 2 * vision.intermediate)


def memory_parts(setting: Setting) -> list[Part]:
    """Every part of the memory of one GPU."""
    parts = states(setting) + _buffers(setting) + _activations(setting) + _rollout(setting)
    return [part for part in parts if part.bytes]


def total_bytes(parts: list[Part], phase: Phase) -> float:
    return sum(part.bytes for part in parts if phase in part.phases)


def fullest(parts: list[Part]) -> Phase:
    """The phase that needs most."""
    return max(ALL, key=lambda phase: total_bytes(parts, phase))


def states(setting: Setting) -> list[Part]:
    """What lives as long as the training does."""
    sharding, lora, shards = setting.sharding, setting.options.lora, setting.shards
    all_of, trained = setting.shape.parameters, setting.trained
    over = f" / {shards} GPUs" if shards > 1 else ""
    zero = sharding.kind == "zero-3"
    # Without DeepSpeed the float32 weights are the master weights (sft.run_sft, grpo.run_grpo)
    value = BYTES[setting.options.dtype] if lora else setting.compute if zero else 4
    gradient = setting.compute if zero else 4

    def part(name: str, count: int, width: int, unit: str = "parameters") -> Part:
        return Part(name, count * width / shards, f"{count:,} {unit} x {width} bytes{over}")

    here = 0 if sharding.offload_optimizer else trained
    parts = [
        part("weights", 0 if sharding.offload_weights else all_of, value),
        # DeepSpeed keeps them in float32 training too
        part("master weights", here if zero else 0, 4, "trained"),
        part("adapters", trained if lora else 0, 4, "of LoRA"),
        part("optimizer's moments", here, 8, "trained"),
        part("gradients", trained, gradient, "trained"),
    ]
    if getattr(setting.options, "beta", 0) and not lora:
        parts.append(part("reference for the KL", all_of, value))
    return parts


def _buffers(setting: Setting) -> list[Part]:
    """What the framework sets aside beside the model."""
    value, sharding = setting.compute, setting.sharding
    all_of, parts = setting.shape.parameters, []
    if setting.hardware.device.is_gpu:
        parts.append(Part("CUDA context, cuBLAS, NCCL", CONTEXT_BYTES, "ours"))
    if sharding.kind == "zero-3":
        bucket, sub_group = (
            sharding.zero[name] for name in ("reduce_bucket_size", "sub_group_size")
        )
        live = min(all_of, sharding.zero["stage3_max_live_parameters"])
        stepped = min(setting.trained // setting.shards, sub_group)
        parts += [
            Part("ZeRO's bucket of gradients", bucket * value, f"{bucket:,} x {value} bytes"),
            Part("ZeRO's gathered weights", live * value, f"{live:,} x {value} bytes", UPDATE),
            Part(
                "float32 gradients of a sub-group",
                stepped * (4 + value),
                f"{stepped:,} x (4 + {value}) bytes",
                ("optimizer",),
            ),
        ]
    elif (cast := _autocast(setting)) and not setting.checkpointing:
        how = f"{cast // value:,} trained parameters x {value} bytes, cast once a pass"
        parts.append(Part("autocast's weights", cast, how, UPDATE))
    return parts


def _autocast(setting: Setting) -> int:
    """Bytes of the weights that autocast keeps in half precision until a forward pass ends.

    With gradient checkpointing they are gone by then; else the backward pass needs them too. The
    embedding is only looked up, and TRL's head casts its own tiles.
    """
    value, text = setting.compute, setting.shape.text
    if value == 4 or setting.options.lora or setting.sharding.kind == "zero-3":
        return 0
    return (setting.trained - text.embedding * (1 if text.tied else 2)) * value


def _activations(setting: Setting) -> list[Part]:
    """What forward and backward passes hold."""
    shape, value, tokens = setting.shape, setting.compute, setting.tokens
    text, vision, row = shape.text, shape.vision, setting.row
    layer = language_layer_bytes(setting)
    kept = value * text.hidden if setting.checkpointing else layer
    what = "input" if setting.checkpointing else "all activations"
    parts = [
        Part(
            "activations, language",
            tokens * text.layers * kept,
            f"{tokens:,} tokens x {text.layers} layers x {kept:,.0f} bytes ({what})",
            UPDATE,
        )
    ]
    patches = setting.prompts * vision.tower_tokens(row.image)
    block = block_bytes(vision, value)
    reads_tower = not (setting.options.freeze_vision or setting.options.lora)
    if reads_tower:
        kept = value * vision.hidden if setting.checkpointing else block
        how = f"{patches:,} patches x {vision.depth} blocks x {kept:,} bytes ({what})"
        parts.append(Part("activations, vision", patches * vision.depth * kept, how, UPDATE))
    activations = sum(part.bytes for part in parts)
    parts.append(_images(setting))
    # The largest of four moments: the end of the forward pass, the backward passes of the head, of
    # one layer, of the embedding
    head, head_how = _head(setting)
    inside = layer if setting.checkpointing else 0
    passing = tokens * (inside + value * (3 * text.intermediate + 2 * text.hidden))
    if reads_tower and setting.checkpointing:
        passing = max(passing, patches * (block + value * 2 * vision.intermediate))
    embedding, embedding_how = _embedding(setting, activations)
    cast, (tile, tile_how) = _autocast(setting), _tile(setting)
    forward = cast + tile if setting.checkpointing else 0
    if forward > max(head, passing, embedding):
        how = f"{cast:,} bytes of weights that autocast has cast, {tile_how}"
        parts.append(Part("end of the forward pass", forward, how, UPDATE))
    elif embedding > max(head, passing):
        parts.append(Part("backward pass of embedding", embedding, embedding_how, UPDATE))
    elif head >= passing:
        parts.append(Part("backward pass of the head", head, head_how, UPDATE))
    else:
        how = f"{passing / tokens:,.0f} bytes a token, recomputed and its gradients"
        parts.append(Part("backward pass of a layer", passing, how, UPDATE))
    return parts


def _images(setting: Setting) -> Part:
    """`pixel_values`: GRPO holds those of a whole step. DeepSpeed's trainer casts them."""
    grpo = isinstance(setting.options, GRPO)
    rows = setting.step_rows if grpo and not setting.shared_prefix else setting.prompts
    value = setting.compute if setting.sharding.kind == "zero-3" else 4
    values = setting.shape.vision.pixel_values(setting.row.image)
    how = f"{rows:,} rows x {values:,} values x {value} bytes"
    return Part("images of a step" if grpo else "images", rows * values * value, how)


def _head(setting: Setting) -> tuple[float, str]:
    """Bytes of the head's backward pass: tiles of logits, gradients of hidden states and weight."""
    text, scored = setting.shape.text, _scored(setting)
    trains_head = 0 if setting.options.lora else text.embedding
    if setting.shared_prefix and scored * text.vocabulary <= SMALL_LOGITS:
        size = SMALL_LOGITS_COPIES * 4 * scored * text.vocabulary
        how = (
            f"{SMALL_LOGITS_COPIES} x {scored:,} tokens x {text.vocabulary:,} x 4 bytes, "
            f"{trains_head:,} gradients x 4 bytes"
        )
        return size + trains_head * 4, how
    norm = setting.tokens * text.hidden * (4 + 2 * setting.compute)
    hidden = scored * text.hidden * (4 + setting.compute)
    tile, tile_how = _tile(setting)
    how = f"{tile_how}, {scored:,} hidden states, {trains_head:,} gradients x 4 bytes"
    return tile + hidden + norm + trains_head * 4, how


def _scored(setting: Setting) -> int:
    """Positions that the head scores. Without Triton, TRL's scores every one."""
    gpu = setting.hardware.device.is_gpu
    return setting.answer_tokens if gpu or setting.shared_prefix else setting.tokens


def _tile(setting: Setting) -> tuple[float, str]:
    """Bytes of the logits that the chunked head holds at a time."""
    text = setting.shape.text
    copies = TILE_COPIES_GPU if setting.hardware.device.is_gpu else TILE_COPIES_CPU
    width = min(text.vocabulary, VOCABULARY_CHUNK)
    height = min(_scored(setting), TOKEN_CHUNK_SIZE)
    return copies * height * width * 4, f"{copies:g} x {height:,} x {width:,} logits x 4 bytes"


def _embedding(setting: Setting, activations: float) -> tuple[float, str]:
    """Bytes of the embedding's gradients beyond those of the activations, freed by then."""
    text = setting.shape.text
    if setting.options.lora:
        return 0.0, ""
    copies = TIED_GRADIENTS if text.tied else 1
    value = setting.compute if setting.sharding.kind == "zero-3" else 4
    how = f"{copies} x {text.embedding:,} gradients x {value} bytes, less the activations"
    return max(0.0, copies * text.embedding * value - activations), how


def vllm_need(setting: Setting) -> tuple[float, float]:
    """Bytes that a colocated vLLM cannot do without (weights, one whole context), and its share."""
    options, shape = setting.options, setting.shape
    value = BYTES[options.rollout_dtype]
    tokens = min(rollout_context(options), shape.text.context)
    context = tokens * shape.text.kv_bytes(value)
    share = options.vllm_gpu_memory_utilization * setting.hardware.device.memory_gib * GIB
    return shape.parameters * value + context, share


def _rollout(setting: Setting) -> list[Part]:
    """What sampling holds: vLLM's share of the GPU, or the KV cache of transformers."""
    options, text = setting.options, setting.shape.text
    if not isinstance(options, GRPO) or options.rollout == "vllm-server":
        return []
    if options.rollout == "vllm-colocate":
        awake: tuple[Phase, ...] = ("rollout",) if options.vllm_sleep else ALL
        need, share = vllm_need(setting)
        value = BYTES[options.rollout_dtype]
        how = (
            f"{options.vllm_gpu_memory_utilization:g} x {setting.hardware.device.memory_gib:g} "
            f"GiB: {setting.shape.parameters:,} weights x {value} bytes, "
            f"the rest for the KV cache, {text.kv_bytes(value):,} bytes a token"
        )
        return [
            Part("vLLM's share", max(share, need), how, awake),
            Part("vLLM's CUDA graphs", GRAPHS_BYTES, "ours"),
        ]
    rows = setting.step_rows
    if setting.shared_prefix:
        rows = min(rows, rollout_rows(setting.hardware.device.is_gpu))
    length = setting.row.prompt + setting.row.longest
    cached, value = rows * length * text.kv_bytes(setting.compute), setting.compute
    return [
        Part(
            "KV cache",
            cached,
            f"{rows:,} rows x {length:,} tokens x {text.kv_bytes(value):,} bytes",
            ("rollout",),
        ),
        Part(
            "logits of the next token",
            SAMPLING_COPIES * rows * text.vocabulary * 4,
            f"{SAMPLING_COPIES} x {rows:,} rows x {text.vocabulary:,} x 4 bytes",
            ("rollout",),
        ),
    ]
