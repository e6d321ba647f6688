"""Tables of efficiency, each a function of the planner's device."""

from __future__ import annotations

from collections.abc import Sequence

from egm_lib.evaluation.latency_protocols import (
    DIRECT_MODEL,
    EGM_MODEL,
    GPU,
    PROTOCOLS,
    compared_models,
    fit,
    implied_tokens,
    protocol_ms,
    published_ms,
    qwen_models,
    thinking_models,
    token_times,
)
from egm_lib.evaluation.plan_latency import Option, plan
from egm_lib.evaluation.results import paper
from egm_lib.evaluation.roofline import DEVICES, Device
from egm_lib.evaluation.roofline_check import (
    Errors,
    Point,
    errors,
    held_out,
    measured_points,
    public_points,
    records,
)
from egm_lib.model_shapes import shape_of
from egm_lib.reports.tables.cells import NOT_REPORTED, Cell, Number, Row, Table


def protocols(device: Device) -> Table:
    """How near each protocol comes to the published latencies."""
    published, every, qwen = published_ms(), compared_models(), qwen_models()
    table = Table(
        "fig5_protocols",
        f"Fig. 5 under several protocols, on {GPU}",
        [
            "Qwen3-VL: median factor",
            "published / predicted",
            "remaining factor",
            "below the bound",
            "all, 13 tiles: remaining factor",
            "below the bound",
            "all, one tile: remaining factor",
            "below the bound",
            "235B / EGM-8B",
        ],
    )
    ratio = published[DIRECT_MODEL] / published[EGM_MODEL]
    table.rows.append(Row("published", "paper", [*[""] * 8, Number(ratio)]))
    for protocol in PROTOCOLS:
        alone = fit(protocol, qwen)
        cells = [_times(alone.factor), _times(alone.scale)]
        for found in (alone, fit(protocol, every), fit(protocol, every, one_tile=True)):
            cells += [_times(found.spread), f"{len(found.below_bound)} of {found.models}"]
        table.rows.append(Row(protocol.name, "predicted", [*cells, Number(alone.ratio)]))
    table.notes += [
        "Median factor: how many times a prediction is above or below the published latency, in "
        "the median. Published / predicted: the one factor that brings all predictions closest to "
        "the published latencies. It is above 1 for a server slower than the roofline; below 1, "
        "the server would have to be faster. Remaining factor: the largest one that is left once "
        "all predictions are multiplied by this factor.",
        "The bound is the data sheet's peak without any overhead. A published latency below it "
        "cannot have been measured under that protocol, in that precision, with that many tokens.",
        "Tiles: InternVL cuts an image of 640 x 480 px into 12 tiles and adds a thumbnail. The "
        "paper does not say whether this was switched on.",
        "GPU time: the time multiplied by the GPUs that work on it and divided by the requests "
        "that share them. Weights have 16 bits unless the row says otherwise. A model that does "
        "not fit the GPUs of a protocol gets more of them.",
    ]
    return table


def latencies(device: Device) -> Table:
    """Every model of Fig. 5 under every protocol, in ms."""
    published, l20 = published_ms(), DEVICES[GPU]
    table = Table(
        "fig5_latencies",
        f"Fig. 5, ms an answer: published, and predicted on {GPU}",
        ["published", "answer tokens", *(protocol.name for protocol in PROTOCOLS)],
    )
    for model in compared_models():
        times = [protocol_ms(model, protocol, l20) for protocol in PROTOCOLS]
        tokens = f"{model.answer_tokens}{'' if model.tokens_stated else ', assumed'}"
        cells = [Number(published[model.name], decimals=0), tokens, *map(_ms, times)]
        table.rows.append(Row(model.name, "predicted", cells))
    for model in thinking_models():
        tokens = [implied_tokens(model, protocol, l20) for protocol in PROTOCOLS]
        cells = [f"= {count:,} tokens" if count else "none fit" for count in tokens]
        row = [Number(published[model.name], decimals=0), NOT_REPORTED, *cells]
        table.rows.append(Row(model.name, "predicted", row))
    table.notes += [
        f"Published: {paper('fig5')['source']}. Stated tokens: {paper('teaser')['source']}; "
        "assumed tokens: those of the same form of answer.",
        "Thinking models: the length of their answers is not reported, so the table gives the "
        "length whose predicted time is the published one.",
        "InternVL-3-32B is assumed to be InternVL3-38B. InternVL's images are 12 tiles and a "
        "thumbnail here: 3,328 tokens.",
    ]
    return table


def tokens(device: Device) -> Table:
    """What a token costs, from two published latencies of one shape."""
    table = Table(
        "fig5_tokens",
        "What one more token costs, from the difference of two published latencies",
        [
            "EGM - Instruct, ms",
            "tokens",
            "ms a token",
            "least time on one L20, ms",
            "least / published",
        ],
    )
    published = published_ms()
    for found in token_times():
        egm, direct = (published[f"EGM-{found.size}"], published[f"{found.size}-Instruct"])
        table.rows.append(
            Row(
                found.size,
                "paper",
                [
                    Number(egm - direct, decimals=0),
                    Number((egm - direct) / found.ms, decimals=0),
                    Number(found.ms),
                    Number(found.bound_ms),
                    _times(found.bound_ms / found.ms),
                ],
            )
        )
    table.notes.append(
        "Image, prompt and shape are the same, so everything but the tokens cancels. Least time: "
        "reading the weights of the language model once, in 16 bits at 864 GB/s, and the KV cache. "
        "101 and 42 tokens are stated for EGM-8B and 235B-Instruct and assumed for the other sizes."
    )
    return table


def planner(device: Device) -> Table:
    """EGM models on a device, and the cheapest direct model that is as accurate."""
    asked = ("accuracy", "devices", "ms, one request", "images a second")
    table = Table(
        "planner",
        f"EGM and direct models of the same accuracy on {device.name}",
        [
            *(f"EGM: {name}" for name in asked),
            "direct model, as accurate",
            *(f"direct: {name}" for name in asked),
        ],
    )
    for found in plan(device):
        rival = [found.rival.name, Number(found.rival.accuracy)] if found.rival else ["none", ""]
        cells = [Number(found.model.accuracy), *_option(found.egm)]
        table.rows.append(
            Row(found.model.name, "predicted", [*cells, *rival, *_option(found.direct)])
        )
    table.notes += [
        "Images of 640 x 480 px, 16 bits, on the fewest devices that hold the model. Images a "
        "second: those devices together, at nine tenths of the highest rate. EGM's answers: 101 "
        "tokens; direct ones: 42, InternVL's 30. Accuracy: the paper's, mean of Table 4's splits.",
        "python -m egm_lib.evaluation.plan_latency answers for another device, image size, "
        "precision or budget.",
    ]
    return table


def _option(found: Option | None) -> list[Cell]:
    if found is None:
        return ["does not fit", "", ""]
    return [
        Number(found.devices, decimals=0),
        Number(found.alone_ms, decimals=0),
        Number(found.per_second),
    ]


def roofline(device: Device) -> Table:
    """How far the roofline is from measurements, by kind."""
    table = Table(
        "roofline",
        "The roofline against measurements",
        ["n", "error, median", "error, worst", "worst measurement"],
    )
    for name, source, points in groups():
        found = errors(points)
        table.rows.append(Row(name, source, _errors(found)))
    table.notes += [
        "Error: predicted divided by measured time, minus 1. Fitted: three constants for all GPUs "
        "(share of the bandwidth, overhead of a layer, overhead of an all-reduce). Left out: each "
        "source is predicted with constants fitted to the other sources. A measurement that is "
        "faster than the data sheet's peak (a cached prompt, for example) is not counted; "
        "roofline_points lists it.",
        "Sources: data/latency/public.json; results/latency-scale/.",
    ]
    return table


def groups() -> list[tuple[str, str, list[Point]]]:
    """Measurements by kind: (what they are, whose, points)."""
    public = public_points()
    fitted = [point for point in public if point.fitted]
    rest = [point for point in public if not point.fitted]

    def of(phase: str, short: bool, experts: bool) -> list[Point]:
        return [
            point
            for point in rest
            if point.phase == phase
            and (point.serving.precision == "nvfp4") == short
            and bool(point.shape.text.experts) == experts
        ]

    found = [
        ("decoding, 16 bits, fitted", "public", fitted),
        ("decoding, 16 bits, left out", "public", held_out(fitted)),
        ("decoding, 4 bits, Qwen3-VL, not fitted", "public", of("decode", True, False)),
        ("decoding, 4 bits, experts, not fitted", "public", of("decode", True, True)),
        ("prefill, 16 bits, not fitted", "public", of("prefill", False, False)),
        (
            "prefill, 4 bits, not fitted",
            "public",
            of("prefill", True, False) + of("prefill", True, True),
        ),
    ]
    for record in records():
        points, name = measured_points(record), record["machine"]["name"]
        alone = [point for point in points if point.fitted]
        several = [point for point in points if point.phase == "decode" and not point.fitted]
        found += [
            (f"decoding, {name}, one request, fitted", "ours", alone),
            (f"decoding, {name}, several requests", "ours", several),
        ]
        for phase in ("prefill", "vision"):
            chosen = [point for point in points if point.phase == phase]
            found.append((f"{phase}, {name}", "ours", chosen))
    return found


def points(device: Device) -> Table:
    """Every measurement and its prediction."""
    table = Table(
        "roofline_points",
        "Every measurement and what the roofline predicts",
        ["measured, ms", "predicted, ms", "error", "not counted"],
    )
    ours = [point for record in records() for point in measured_points(record)]
    for source, chosen in (("public", public_points()), ("ours", ours)):
        for point in chosen:
            cells = [
                Number(point.ms),
                Number(point.predicted_ms()),
                _share(point.error),
                "faster than the data sheet" if point.faster_than_peak else "",
            ]
            table.rows.append(Row(point.label, source, cells))
    return table


def measured(device: Device) -> Table:
    """What `make latency-scale` measured, and what it did not run."""
    columns = ["at a time", "first token, ms", "vision alone, ms", "ms a token", "of it the GPU's"]
    columns += ["ms, whole answer", "measured on"]
    table = Table("measured", "Random weights in real shapes", columns)
    for record in records():
        machine = record["machine"]
        for row in record["rows"]:
            whole = shape_of(row["model"])
            size = (
                "" if row["share"] == 1 else f", {row.get('layers')} of {whole.text.layers} layers"
            )
            label = f"{row['model']}{size}, {row['dtype']}"
            count = Number(row["requests"], decimals=0)
            if row.get("not_run"):
                label += f", {max(row['answers']):,} tokens"
                empty = [count, *[None] * 5, f"not run: {row['not_run']}"]
                table.rows.append(Row(label, "ours", empty))
                continue
            totals = [f"{ms:,.0f} for {length}" for length, ms in row["total_ms"].items()]
            table.rows.append(
                Row(
                    label,
                    "ours",
                    [
                        count,
                        Number(row["first_token_ms"], decimals=0),
                        Number(row["vision_ms"], decimals=0),
                        Number(row["token_ms"]),
                        Number(row["kernel_ms"]) if "kernel_ms" in row else "",
                        "; ".join(totals),
                        f"{machine['name']}, {machine['time']}",
                    ],
                )
            )
        load = f"{min(record['load']):g} to {max(record['load']):g}"
        table.notes.append(
            f"{machine['name']}: {machine['time']}, torch {machine['torch']}, transformers "
            f"{machine['transformers']}, load of the machine {load}. A row with fewer layers is a "
            "smaller model, measured as a whole; its vision tower is shortened in the same way."
        )
    return table


def _times(value: float) -> str:
    return f"{value:.1f} x"


def _share(value: float) -> str:
    return f"{100 * value:+.0f} %"


def _ms(value: float | None) -> Cell:
    return "does not fit" if value is None else Number(value, decimals=0)


def _errors(found: Errors | None) -> Sequence[Cell]:
    if found is None:
        return [None, None, None, None]
    median = f"{100 * found.median:.0f} %"
    return [Number(found.count, decimals=0), median, _share(found.worst), found.worst_label]
