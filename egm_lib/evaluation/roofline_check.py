"""The roofline held against measurements: those of others (data/latency/public.json), and those of
`make latency-scale` (results/latency-scale/).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from egm_lib.evaluation.roofline import (
    DEVICES,
    Device,
    Serving,
    decode_ms,
    prefill_ms,
    same_experts,
    vision_ms,
)
from egm_lib.files import project_root, read_json
from egm_lib.model_shapes import SHAPES, ModelShape, TextShape, shape_of

PUBLIC = project_root() / "data" / "latency" / "public.json"
MEASURED = project_root() / "results" / "latency-scale"
PROBED = "measured"
PRECISION_OF = {"float32": "float32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Point:
    """A measured pass, and what predicts it.

    phase: "vision", "prefill" or "decode"; tokens: of the image, of the prompt, or before the
    decoded one; fitted: whether constants of the roofline were fitted to it.
    """

    source: str
    label: str
    shape: ModelShape
    serving: Serving
    phase: str
    tokens: int
    ms: float
    fitted: bool = False

    def predicted_ms(self, device: Device | None = None) -> float:
        """By the roofline; device: in place of the point's."""
        serving = replace(self.serving, device=device or self.serving.device)
        passes = {"vision": vision_ms, "prefill": prefill_ms, "decode": decode_ms}
        return passes[self.phase](self.shape, self.tokens, serving)

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_ms() / self.ms - 1

    @property
    def faster_than_peak(self) -> bool:
        """Whether the device's data sheet rules the measurement out (a cached prompt, for one).

        A probe is no data sheet: what it reached can be surpassed.
        """
        if self.serving.device.source == PROBED:
            return False
        fewest = replace(self, shape=same_experts(self.shape))
        return self.ms < fewest.predicted_ms(self.serving.device.bound())


@dataclass(frozen=True)
class Errors:
    """Errors of some points, as shares; worst keeps its sign."""

    count: int
    median: float
    worst: float
    worst_label: str


def errors(points: Iterable[Point]) -> Errors | None:
    """Of the points that the data sheet allows; None for none."""
    found = [point for point in points if not point.faster_than_peak]
    if not found:
        return None
    worst = max(found, key=lambda point: abs(math.log1p(point.error)))
    median = statistics.median(abs(point.error) for point in found)
    return Errors(len(found), median, worst.error, worst.label)


def public_points(path: Path = PUBLIC) -> list[Point]:
    """Measurements of others. Those of 16-bit models while decoding are what the constants of GPUs
    are fitted to."""
    record = read_json(path)
    points = []
    for row in record["rows"]:
        serving = Serving(
            device=DEVICES[row["device"]],
            precision=row["precision"],
            tensor_parallel=row["tensor_parallel"],
            concurrency=row["requests"],
        )
        count = f"{row['tensor_parallel']} x " if row["tensor_parallel"] > 1 else ""
        points.append(
            Point(
                row["source"],
                f"{row['model']}, {count}{row['device']}, {row['precision']}, "
                f"{row['requests']} at a time, {row['phase']} at {row['tokens']:,}",
                _shape(row["model"], record["texts"]),
                serving,
                row["phase"],
                row["tokens"],
                row["ms"],
                fitted=row["phase"] == "decode" and row["precision"] == "bf16",
            )
        )
    return points


def _shape(name: str, texts: dict) -> ModelShape:
    """A shape by name; the vision tower of a language model without one is never asked for."""
    if name in SHAPES:
        return SHAPES[name]
    text = TextShape(**texts[name])
    return ModelShape(name=name, text=text, vision=SHAPES["Qwen3-VL-8B"].vision)


SHARES = [share / 100 for share in range(50, 101, 5)]
LAYER_US = range(0, 101, 5)
REDUCE_US = range(0, 31, 5)


def fit(points: Sequence[Point]) -> tuple[float, float, float]:
    """(bandwidth_share, layer_us, reduce_us) with the least squared error of the logarithm.

    points: of decoding, which waits for memory: its time is a sum in which each constant has a term
    of its own.
    """
    terms = [(_terms(point), point.ms) for point in points]

    def loss(constants: tuple[float, float, float]) -> float:
        share, layer_us, reduce_us = constants
        return sum(
            math.log((read / share + layer * layer_us + reduce * reduce_us + links) / ms) ** 2
            for (read, layer, reduce, links), ms in terms
        )

    return min(itertools.product(SHARES, LAYER_US, REDUCE_US), key=loss)


def _terms(point: Point) -> tuple[float, float, float, float]:
    """Milliseconds of reading at the full bandwidth, of a microsecond a layer and a reduction, and
    of the links."""

    def at(*constants: float) -> float:
        return point.predicted_ms(_with(point.serving.device, constants))

    base = at(1, 0, 0)
    read = at(0.5, 0, 0) - base
    return read, at(1, 1, 0) - base, at(1, 0, 1) - base, base - read


def held_out(points: Sequence[Point]) -> list[Point]:
    """The points, each predicted with constants that were fitted to the other sources."""
    found = []
    for source in dict.fromkeys(point.source for point in points):
        constants = fit([point for point in points if point.source != source])
        found += [
            replace(
                point,
                serving=replace(point.serving, device=_with(point.serving.device, constants)),
            )
            for point in points
            if point.source == source
        ]
    return found


def _with(device: Device, constants: tuple[float, float, float]) -> Device:
    share, layer_us, reduce_us = constants
    return replace(device, bandwidth_share=share, layer_us=layer_us, reduce_us=reduce_us)


def measured_points(record: dict) -> list[Point]:
    """Points of a file of `make latency-scale`.

    The device is the data sheet's, where it is a GPU with one; else what the probe beside the
    measurement reached, by precision and by rows of the matrix products. One constant is fitted:
    the overhead of a layer, to the decoding of one request.
    """
    points = []
    for row in record["rows"]:
        if row.get("not_run"):
            continue
        whole = shape_of(row["model"])
        shape = replace(
            whole,
            text=replace(whole.text, layers=row["layers"]),
            vision=replace(whole.vision, depth=row["depth"]),
        )
        image = shape.vision.image_tokens(*record["image_wh"])
        prompt = image + record["prompt_tokens"]
        middle = prompt + statistics.median(row["answers"]) // 2
        for phase, tokens in (("vision", image), ("prefill", prompt), ("decode", middle)):
            rows = row["requests"] if phase == "decode" else row["requests"] * tokens
            device = _device_of(record, row["dtype"], rows)
            serving = Serving(
                device=device, precision=PRECISION_OF[row["dtype"]], concurrency=row["requests"]
            )
            part = "" if row["share"] == 1 else f", {row['layers']} of {whole.text.layers} layers"
            label = f"{row['model']}{part}, {row['dtype']}, {row['requests']} at a time, {phase}"
            ms = row["token_ms" if phase == "decode" else f"{phase}_ms"]
            one = phase == "decode" and row["requests"] == 1
            points.append(
                Point(record["machine"]["name"], label, shape, serving, phase, int(tokens), ms, one)
            )
    layer_us = _layer_us([point for point in points if point.fitted])
    return [_with_overhead(point, layer_us) for point in points]


def _device_of(record: dict, dtype: str, rows: int) -> Device:
    name = record["machine"]["name"]
    known = record["machine"]["device"] == "cuda"
    sheet = next((DEVICES[key] for key in DEVICES if known and key in name.split()), None)
    return probed_device(record, dtype, rows) if sheet is None else replace(sheet, layer_us=0.0)


def probed_device(record: dict, dtype: str, rows: int) -> Device:
    """The device as the probes of a record found it, for products with so many rows."""
    reached = [probe[dtype] for probe in record["probes"]]
    counts = [int(count) for count in reached[0]["gflops"]]
    nearest = min(counts, key=lambda count: abs(math.log(count / rows)))
    return Device(
        name=record["machine"]["name"],
        memory_gb=0,
        bandwidth_gbs=statistics.median(probe["gbs"] for probe in reached),
        tflops=statistics.median(probe["gflops"][str(nearest)] for probe in reached) / 1000,
        bandwidth_share=1.0,
        compute_share=1.0,
        layer_us=0.0,
        reduce_us=0.0,
        source=PROBED,
    )


def _layer_us(points: Sequence[Point]) -> float:
    """What a layer takes beside its bytes and operations: the median over some points."""
    left = [1000 * (point.ms - point.predicted_ms()) / point.shape.text.layers for point in points]
    return max(0.0, statistics.median(left)) if left else 0.0


def _with_overhead(point: Point, layer_us: float) -> Point:
    device = replace(point.serving.device, layer_us=layer_us)
    return replace(point, serving=replace(point.serving, device=device))


def records() -> list[dict]:
    """The files of `make latency-scale`."""
    return [read_json(path) for path in sorted(MEASURED.glob("*.json"))]
