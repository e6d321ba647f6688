"""Fig. 5 under several protocols: what the roofline says the paper's models would take, if their
latency had been measured in one way or another.

The paper says "total GPU latency on L20". Its released script sends 64 requests at a time to eight
replicas. Neither says on how many GPUs a model runs, in which precision, or whether a time is that
of a client or of the GPUs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from egm_lib.evaluation.paper_models import DIRECT_MODEL, EGM_MODEL, PaperModel, paper_models
from egm_lib.evaluation.results import paper
from egm_lib.evaluation.roofline import (
    DEVICES,
    Device,
    Precision,
    Request,
    Serving,
    fits,
    predict,
    same_experts,
)
from egm_lib.model_shapes import InternVision, ModelShape

GPU = "L20"
GPUS = 8  # of the released script
REQUESTS = 64  # of the released script
MOST_GPUS = 16


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """A way to measure.

    gpus: at least so many work on it; a model that they cannot hold gets twice as many, and so on.
    split: all of them work on each request (tensor parallel); otherwise each of the fewest that
    hold the model is a replica. requests: at a time, over all replicas. gpu_time: the time is
    multiplied by the GPUs and divided by the requests that share them.
    """

    name: str
    gpus: int = 1
    split: bool = False
    requests: int = 1
    precision: Precision = "bf16"
    gpu_time: bool = False


PROTOCOLS = (
    Protocol(name="one request"),
    Protocol(name="one request, 8-bit weights", precision="fp8"),
    Protocol(name="one request, 8 GPUs", gpus=GPUS, split=True),
    Protocol(name="one request, GPU time", gpu_time=True),
    Protocol(name="one request, 8-bit weights, GPU time", precision="fp8", gpu_time=True),
    Protocol(name="64 requests on 8 GPUs, client's time", gpus=GPUS, requests=REQUESTS),
    Protocol(name="64 requests on 8 GPUs, GPU time", gpus=GPUS, requests=REQUESTS, gpu_time=True),
)


@dataclass(frozen=True)
class Setup:
    """How a model is served under a protocol: `replicas` of `serving`."""

    serving: Serving
    replicas: int

    @property
    def gpus(self) -> int:
        return self.replicas * self.serving.tensor_parallel


def setup(model: PaperModel, protocol: Protocol, device: Device, request: Request) -> Setup | None:
    """The setup of a model; None where even MOST_GPUS do not hold it."""
    gpus = protocol.gpus
    while gpus <= MOST_GPUS:
        sizes = [2**power for power in range(gpus.bit_length())]
        for parallel in reversed(sizes) if protocol.split else sizes:
            replicas = 1 if protocol.split else gpus // parallel
            replicas = 1 if protocol.requests == 1 else replicas
            serving = Serving(
                device=device,
                precision=protocol.precision,
                tensor_parallel=parallel,
                concurrency=math.ceil(protocol.requests / replicas),
            )
            if fits(model.shape, request, serving):
                return Setup(serving, replicas)
        gpus *= 2
    return None


def protocol_ms(
    model: PaperModel,
    protocol: Protocol,
    device: Device,
    *,
    tokens: int | None = None,
    one_tile: bool = False,
) -> float | None:
    """What a protocol would report for a model, in ms; None where it cannot be served.

    tokens: of the answer, where they are not the model's own. one_tile: InternVL's images are one
    tile, not 12 and a small copy.
    """
    request = request_of(model, tokens, one_tile)
    found = setup(model, protocol, device, request)
    return None if found is None else _reported_ms(model.shape, request, found, protocol)


def bound_ms(
    model: PaperModel, protocol: Protocol, device: Device, *, one_tile: bool = False
) -> float | None:
    """The least that a protocol could report: at the data sheet's peak, without overheads, and with
    the same experts for all tokens. None where the model cannot be served."""
    request = request_of(model, None, one_tile)
    found = setup(model, protocol, device, request)
    if found is None:
        return None
    at_peak = replace(found, serving=replace(found.serving, device=device.bound()))
    return _reported_ms(same_experts(model.shape), request, at_peak, protocol)


def request_of(model: PaperModel, tokens: int | None, one_tile: bool) -> Request:
    """The request that a model answers: an image of COCO's usual size, or one tile of it."""
    tokens = tokens or model.answer_tokens
    if one_tile and _is_intern(model):
        side = model.shape.vision.tile
        return Request(image_wh=(side, side), answer_tokens=tokens)
    return Request(answer_tokens=tokens)


def _is_intern(model: PaperModel) -> bool:
    return isinstance(model.shape.vision, InternVision)


def _reported_ms(shape: ModelShape, request: Request, found: Setup, protocol: Protocol) -> float:
    ms = predict(shape, request, found.serving).total_ms
    return ms * found.gpus / protocol.requests if protocol.gpu_time else ms


@dataclass(frozen=True)
class Fit:
    """How near a protocol comes to the published latencies.

    factor: the median of how many times the prediction is too high or too low. scale: what all
    predictions are multiplied by to come nearest, as a server does that is slower than the roofline
    (or, below 1, faster); spread: the largest factor that is then left. below_bound: models whose
    published latency is less than the bound. ratio: predicted latency of the large model over
    EGM's.
    """

    protocol: Protocol
    models: int
    factor: float
    scale: float
    spread: float
    below_bound: tuple[str, ...]
    ratio: float


def published_ms() -> dict[str, float]:
    """Fig. 5."""
    return {row["name"]: row["values"][0] for row in paper("fig5")["rows"]}


def qwen_models() -> list[PaperModel]:
    """Those of the compared models whose image tokens are certain too."""
    return [model for model in compared_models() if not _is_intern(model)]


def compared_models() -> list[PaperModel]:
    """The models of Fig. 5 whose answers have a known or likely length, in its order."""
    known = {model.name: model for model in paper_models() if model.answer_tokens}
    return [known[name] for name in published_ms() if name in known]


def published_over_predicted(
    protocol: Protocol,
    models: Sequence[PaperModel],
    device: Device = DEVICES[GPU],
    *,
    one_tile: bool = False,
) -> dict[str, float]:
    """Published latency over the predicted one, by model."""
    published = published_ms()
    return {
        model.name: published[model.name] / protocol_ms(model, protocol, device, one_tile=one_tile)
        for model in models
    }


def fit(
    protocol: Protocol,
    models: Sequence[PaperModel],
    device: Device = DEVICES[GPU],
    *,
    one_tile: bool = False,
) -> Fit:
    """How near a protocol comes over some models of Fig. 5, the two of `ratio` among them."""
    published = published_ms()
    found = published_over_predicted(protocol, models, device, one_tile=one_tile)
    logs = [math.log(ratio) for ratio in found.values()]
    predicted = {name: published[name] / ratio for name, ratio in found.items()}
    return Fit(
        protocol=protocol,
        models=len(models),
        factor=math.exp(statistics.median(map(abs, logs))),
        scale=math.exp((max(logs) + min(logs)) / 2),
        spread=math.exp((max(logs) - min(logs)) / 2),
        below_bound=tuple(
            model.name
            for model in models
            if published[model.name] < bound_ms(model, protocol, device, one_tile=one_tile)
        ),
        ratio=predicted[DIRECT_MODEL] / predicted[EGM_MODEL],
    )


@dataclass(frozen=True)
class TokenTime:
    """What a token costs by the difference of two published latencies of one shape.

    ms: published difference over the difference in tokens. bound_ms: the least that one GPU needs
    to read the weights.
    """

    size: str
    ms: float
    bound_ms: float


def token_times(device: Device = DEVICES[GPU]) -> list[TokenTime]:
    """Of each size that is published both as Instruct and as EGM.

    Image, prompt and shape are the same, so that all but the tokens cancels.
    """
    published, known = published_ms(), {model.name: model for model in compared_models()}
    found = []
    for name, egm in known.items():
        direct = known.get(f"{name.removeprefix('EGM-')}-Instruct")
        if egm.kind != "EGM" or direct is None:
            continue
        tokens = egm.answer_tokens - direct.answer_tokens
        ms = (published[name] - published[direct.name]) / tokens
        request = Request(answer_tokens=egm.answer_tokens)
        bound = predict(egm.shape, request, Serving(device=device.bound())).token_ms
        found.append(TokenTime(name.removeprefix("EGM-"), ms, bound))
    return found


def implied_tokens(
    model: PaperModel, protocol: Protocol, device: Device, most: int = 4096
) -> int | None:
    """Tokens of an answer that would take as long as published; None for none up to `most`.

    most: Table 8's longest answer.
    """
    target = published_ms()[model.name]
    low, high = 1, most
    if (protocol_ms(model, protocol, device, tokens=low) or math.inf) > target:
        return None
    if protocol_ms(model, protocol, device, tokens=high) < target:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if protocol_ms(model, protocol, device, tokens=middle) <= target:
            low = middle
        else:
            high = middle
    return low


def thinking_models() -> Sequence[PaperModel]:
    """The models of Fig. 5 that think at length, in its order."""
    known = {model.name: model for model in paper_models() if model.kind == "thinking"}
    shapes = published_ms()
    return [known[name] for name in shapes if name in known]
