"""How long an answer takes on given hardware, from the shape of the model alone.

    predict(SHAPES["Qwen3-VL-8B"], Request(answer_tokens=101), Serving(device=DEVICES["L20"]))

A roofline (Williams et al. 2009): a pass through a model takes as long as its bytes need to be read
or its operations need to be done, whichever is longer. What a device reaches is a share of what its
data sheet states; `Device.bound` is the same device at its peak and without overheads: nothing that
writes one token after another in that precision can be faster. docs/efficiency.md holds the
predictions against measurements.

Units: GB and GB/s are powers of ten; operations as in `egm_lib.devices`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from egm_lib.devices import DATA_SHEETS, DataSheet
from egm_lib.errors import EgmError
from egm_lib.model_shapes import InternVision, ModelShape, TextShape

Precision = Literal["float32", "bf16", "fp8", "nvfp4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# nvfp4: four bits, and a scale of eight bits for every 16 weights
WEIGHT_BYTES = {"float32": 4, "bf16": 2, "fp8": 1, "nvfp4": 0.5625}
CACHE_BYTES = {"float32": 4, "bf16": 2, "fp8": 2, "nvfp4": 2}  # keys, values and activations
# A tenth of the memory stays free for activations and the KV cache, as vLLM's default leaves it.
MEMORY_SHARE = 0.9

# What software reaches of a data sheet: fitted by `roofline_check.fit` to the decoding of 16-bit
# models in data/latency/public.json. COMPUTE_SHARE is ours: prefill varies too much to fit it.
# docs/efficiency.md says how far measurements are from it, those that were not fitted too.
BANDWIDTH_SHARE = 0.8
COMPUTE_SHARE = 0.6
LAYER_US = 50.0  # launches, norms and softmax of a layer in one pass
REDUCE_US = 5.0  # one all-reduce between GPUs, beside its bytes


class RooflineError(EgmError, ValueError):
    """What cannot be predicted, and why."""


@dataclass(frozen=True, kw_only=True)
class Device(DataSheet):
    """A device, and the share of its data sheet that software reaches."""

    bandwidth_share: float = BANDWIDTH_SHARE
    compute_share: float = COMPUTE_SHARE
    layer_us: float = LAYER_US
    reduce_us: float = REDUCE_US

    def bound(self) -> Device:
        """The device at its peak, without overheads, and with links that take no time."""
        return replace(
            self,
            bandwidth_share=1.0,
            compute_share=1.0,
            layer_us=0.0,
            reduce_us=0.0,
            link_gbs=self.link_gbs and math.inf,
        )

    def peak_flops(self, precision: Precision) -> float:
        """Operations a second. What a device lacks is computed in the next longer format.

        float32 counts as 16 bits, as on a device whose tflops were measured in float32.
        """
        eight = self.tflops_fp8 or self.tflops
        peaks = {"fp8": eight, "nvfp4": self.tflops_fp4 or eight}
        return 1e12 * peaks.get(precision, self.tflops) * self.compute_share

    def bytes_per_s(self) -> float:
        return 1e9 * self.bandwidth_gbs * self.bandwidth_share


DEVICES = {name: Device(**vars(sheet)) for name, sheet in DATA_SHEETS.items()}


def device_of(name: str) -> Device:
    """A device by its name, in any case. Raises RooflineError for another one."""
    for known, device in DEVICES.items():
        if known.lower() == name.lower():
            return device
    raise RooflineError(f"No device {name!r}: use one of {', '.join(DEVICES)}.")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: an image, words, and the tokens of the answer (reasoning included).

    prompt_tokens: tokens of the prompt beside the image, with those of the chat template.
    """

    image_wh: tuple[int, int] = (640, 480)  # COCO's usual image
    prompt_tokens: int = 30  # Fig. 7 with the chat template, counted by Qwen's tokenizer
    answer_tokens: int

    def __post_init__(self):
        if min(*self.image_wh, self.prompt_tokens, self.answer_tokens) < 1:
            raise RooflineError(
                "A request needs an image, a prompt and an answer of at least 1 px or token: "
                f"{self}"
            )


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How requests are answered: `concurrency` at a time on `tensor_parallel` devices."""

    device: Device
    precision: Precision = "bf16"
    tensor_parallel: int = 1
    concurrency: int = 1

    def __post_init__(self):
        if min(self.tensor_parallel, self.concurrency) < 1:
            raise RooflineError("At least one device and one request at a time are needed.")
        if self.tensor_parallel > 1 and not self.device.link_gbs:
            raise RooflineError(f"{self.device.name} has no link to another device.")


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the request to parts of its answer; at a concurrency, a mean request's.

    token_ms: a token of the answer, at the middle of it.
    """

    vision_ms: float
    prefill_ms: float
    token_ms: float
    answer_tokens: int

    @property
    def first_token_ms(self) -> float:
        """The prefill writes the first token."""
        return self.vision_ms + self.prefill_ms

    @property
    def total_ms(self) -> float:
        return self.first_token_ms + (self.answer_tokens - 1) * self.token_ms


def predict(shape: ModelShape, request: Request, serving: Serving) -> Latency:
    """The time of an answer.

    At a concurrency, a request waits for the vision and the prefill of as many others as there are
    beside it, and shares every pass of the decoding with them. That holds for requests that start
    together and, on average, for a server that takes a new one as soon as one has ended.
    """
    image = shape.vision.image_tokens(*request.image_wh)
    prompt = image + request.prompt_tokens
    middle = prompt + request.answer_tokens // 2
    return Latency(
        vision_ms=vision_ms(shape, image, serving),
        prefill_ms=prefill_ms(shape, prompt, serving),
        token_ms=decode_ms(shape, middle, serving),
        answer_tokens=request.answer_tokens,
    )


def vision_ms(shape: ModelShape, image_tokens: int, serving: Serving) -> float:
    """The vision tower and its merger on an image for each request."""
    vision = shape.vision
    patches = vision.tower_tokens(image_tokens)
    # InternVL's tiles see only themselves, Qwen's patches the whole image.
    span = vision.tower_tokens(vision.tile_tokens) if isinstance(vision, InternVision) else patches
    flops = 2 * vision.depth * vision.block * patches + 2 * vision.merger * image_tokens
    flops += 4 * vision.depth * vision.hidden * patches * span
    weights = (vision.tower + vision.merger) * WEIGHT_BYTES[serving.precision]
    traffic = patches * vision.hidden * CACHE_BYTES[serving.precision] * serving.concurrency
    return _pass_ms(weights, flops * serving.concurrency, vision.depth, traffic, serving)


def prefill_ms(shape: ModelShape, prompt_tokens: int, serving: Serving) -> float:
    """The language model reads the prompts of all requests; the head writes one token of each."""
    text, tokens = shape.text, prompt_tokens * serving.concurrency
    flops = 2 * text.layers * text.layer(text.active_experts) * tokens
    flops += 2 * text.embedding * serving.concurrency
    causal = prompt_tokens / 2  # keys that a token sees, on average
    flops += _attention_flops(text, causal) * tokens
    read = _weights(text, tokens, serving) + tokens * _cache(text, serving)
    traffic = tokens * text.hidden * CACHE_BYTES[serving.precision]
    return _pass_ms(read, flops, text.layers, traffic, serving)


def decode_ms(shape: ModelShape, context_tokens: int, serving: Serving) -> float:
    """One more token of each request, each after so many tokens."""
    text, requests = shape.text, serving.concurrency
    flops = 2 * text.active_parameters + _attention_flops(text, context_tokens)
    read = _weights(text, requests, serving)
    read += requests * context_tokens * _cache(text, serving)
    traffic = requests * text.hidden * CACHE_BYTES[serving.precision]
    return _pass_ms(read, flops * requests, text.layers, traffic, serving)


def touched_experts(text: TextShape, tokens: float) -> float:
    """Experts of a layer that so many tokens need, if each token's are drawn at random."""
    if not text.experts:
        return 0.0
    return text.experts * (1 - (1 - text.active_experts / text.experts) ** tokens)


def same_experts(shape: ModelShape) -> ModelShape:
    """The shape if all tokens need the same experts: the fewest bytes that a pass can read."""
    if not shape.text.experts:
        return shape
    return replace(shape, text=replace(shape.text, experts=shape.text.active_experts))


def weight_gb(shape: ModelShape, precision: Precision) -> float:
    """Gigabytes of all weights."""
    return shape.parameters * WEIGHT_BYTES[precision] / 1e9


def fits(shape: ModelShape, request: Request, serving: Serving) -> bool:
    """Whether weights and KV cache fit in the memory of the devices, and the heads divide."""
    if shape.text.heads % serving.tensor_parallel:
        return False
    tokens = shape.vision.image_tokens(*request.image_wh)
    tokens += request.prompt_tokens + request.answer_tokens
    cache_gb = serving.concurrency * tokens * _cache(shape.text, serving) / 1e9
    need_gb = weight_gb(shape, serving.precision) + cache_gb
    return need_gb <= MEMORY_SHARE * serving.device.memory_gb * serving.tensor_parallel


def _weights(text: TextShape, tokens: float, serving: Serving) -> float:
    """Bytes of the weights that a pass with so many tokens reads, of all devices together."""
    read = text.layers * text.layer(touched_experts(text, tokens)) + text.embedding
    return read * WEIGHT_BYTES[serving.precision]


def _cache(text: TextShape, serving: Serving) -> float:
    """Bytes of a token's keys and values on all devices: heads beyond kv_heads are copies."""
    copies = max(1.0, serving.tensor_parallel / text.kv_heads)
    return text.kv_bytes(CACHE_BYTES[serving.precision]) * copies


def _attention_flops(text: TextShape, keys: float) -> float:
    """Operations of a token that attends to so many keys, in all layers."""
    return 4 * text.layers * text.heads * text.head_dim * keys


def _pass_ms(
    read_bytes: float, flops: float, layers: int, reduced_bytes: float, serving: Serving
) -> float:
    """One pass: the longer of reading and computing, the overheads, and two all-reduces a layer."""
    device, parts = serving.device, serving.tensor_parallel
    seconds = max(
        read_bytes / parts / device.bytes_per_s(),
        flops / parts / device.peak_flops(serving.precision),
    )
    seconds += layers * device.layer_us * 1e-6
    if parts > 1:  # a ring sends 2 (n - 1) / n of the bytes over each link
        sent = 2 * (parts - 1) / parts * reduced_bytes / (device.link_gbs * 1e9)
        seconds += 2 * layers * (device.reduce_us * 1e-6 + sent)
    return 1000 * seconds
