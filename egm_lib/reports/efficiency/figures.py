"""Figures of efficiency, each a function of the planner's device: the figure and its caption."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from egm_lib.evaluation.latency_protocols import (
    GPU,
    PROTOCOLS,
    bound_ms,
    compared_models,
    fit,
    protocol_ms,
    published_ms,
    published_over_predicted,
    qwen_models,
)
from egm_lib.evaluation.paper_models import paper_models
from egm_lib.evaluation.plan_latency import option
from egm_lib.evaluation.roofline import DEVICES, Device
from egm_lib.evaluation.roofline_check import Point
from egm_lib.reports.efficiency.tables import groups
from egm_lib.reports.figures.pieces import billions
from egm_lib.viewer.palette import FAINT, INK, new_figure

# Colours that the colour-blind tell apart (Okabe and Ito), and markers for print in grey
MARKS = (
    ("#0072B2", "o"),
    ("#56B4E9", "v"),
    ("#009E73", "s"),
    ("#E69F00", "^"),
    ("#CC79A7", "<"),
    ("#D55E00", ">"),
    ("#8C6D1F", "D"),
    ("#444444", "*"),
    ("#B0A800", "d"),
    ("#7A4FBF", "h"),
)
ABOVE = {"xytext": (0, 7), "ha": "center", "va": "bottom"}
BELOW = {"xytext": (0, -7), "ha": "center", "va": "top"}
LEFT = {"xytext": (-6, 0), "ha": "right", "va": "center"}
# Beginning of the name, label, colour, marker; where sizes are written, and the largest size
FAMILIES = (
    ("EGM-Qwen3-VL", "EGM-Qwen3-VL", "#0072B2", "D", ABOVE, ABOVE),
    ("EGM-InternVL-3", "EGM-InternVL-3", "#56B4E9", "v", LEFT, LEFT),
    ("Qwen3-VL", "Qwen3-VL Instruct", "#009E73", "o", ABOVE, BELOW),
    ("InternVL-3", "InternVL-3", "#8A8A8A", "s", BELOW, ABOVE),
)


def protocols(device: Device) -> tuple[Figure, str]:
    """Fig. 5 under several protocols: times by model, and published over predicted by protocol."""
    figure = new_figure(11, 5.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _times_by_model(left)
    _ratios_by_protocol(right)
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7.5
    )
    fits = [fit(protocol, compared_models(), one_tile=True) for protocol in PROTOCOLS]
    best = min((found for found in fits if not found.below_bound), key=lambda found: found.spread)
    return (
        figure,
        "Left: the published latencies of Fig. 5 (black) and predictions of the roofline under "
        "several protocols. Grey: times below the bound of one request in 16 bits on the fewest "
        "GPUs that hold the model. Right: published divided by predicted latency. If a protocol "
        "explains the figure, its models lie close together, at 1 or above. Filled: Qwen3-VL. "
        "Hollow: InternVL-3 with one tile per image. Of the protocols that no bound rules out, "
        f'"{best.protocol.name}" comes closest: all published latencies are {best.scale:.1f} times '
        f"the predicted ones, within a factor of {best.spread:.1f}.",
    )


def _times_by_model(ax: Axes) -> None:
    published, l20 = published_ms(), DEVICES[GPU]
    models = sorted(compared_models(), key=lambda model: published[model.name], reverse=True)
    for y, model in enumerate(models):
        ax.barh(y, bound_ms(model, PROTOCOLS[0], l20), height=0.74, color="#E8E8E8", zorder=1)
        ax.scatter(
            published[model.name],
            y,
            s=110,
            marker="|",
            linewidth=3,
            color=INK,
            zorder=4,
            label="published" if y == 0 else None,
        )
        for (colour, marker), protocol in zip(MARKS, PROTOCOLS, strict=False):
            ax.scatter(
                protocol_ms(model, protocol, l20),
                y,
                s=30,
                marker=marker,
                facecolor="white",
                edgecolor=colour,
                linewidth=1.4,
                zorder=3,
                label=protocol.name if y == 0 else None,
            )
    names = [
        f"{model.name}\n{model.answer_tokens} tokens{'' if model.tokens_stated else ' (assumed)'}"
        for model in models
    ]
    ax.set_yticks(range(len(models)), names, fontsize=7.5)
    ax.set(
        xscale="log",
        xlim=(40, 2e5),
        xlabel="ms per answer",
        title=f"Published, and predicted on {GPU}s",
    )
    _plain_ticks(ax.xaxis)
    ax.grid(True, axis="x")


def _ratios_by_protocol(ax: Axes) -> None:
    qwen = {model.name for model in qwen_models()}
    for y, ((colour, marker), protocol) in enumerate(zip(MARKS, PROTOCOLS, strict=False)):
        found = published_over_predicted(protocol, compared_models(), one_tile=True)
        for name, ratio in found.items():
            ax.scatter(
                ratio,
                y,
                s=34,
                marker=marker,
                facecolor=colour if name in qwen else "white",
                edgecolor=colour,
                linewidth=1.2,
                alpha=0.85,
                zorder=3,
            )
    ax.axvline(1, color=INK, linewidth=0.9)
    names = [protocol.name.replace(", ", ",\n") for protocol in PROTOCOLS]
    ax.set_yticks(range(len(PROTOCOLS)), names, fontsize=7.5)
    ax.invert_yaxis()
    ax.set(
        xscale="log",
        xlim=(0.15, 15),
        xlabel="published / predicted",
        title="How well each protocol explains them",
    )
    ax.set_xticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(True, axis="x")


def planner(device: Device) -> tuple[Figure, str]:
    """Accuracy against predicted latency, and against devices' time an image, on a device."""
    figure = new_figure(9.6, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    known = [model for model in paper_models() if model.answer_tokens]
    options = [(model, option(model, device)) for model in known]
    for start, label, colour, marker, side, last_side in FAMILIES:
        placed = [
            (model, found) for model, found in options if found and model.name.startswith(start)
        ]
        placed.sort(key=lambda pair: pair[0].shape.parameters)
        if not placed:
            continue
        accuracy = [model.accuracy for model, _ in placed]
        for ax, x in (
            (left, [found.alone_ms for _, found in placed]),
            (right, [1000 * found.devices / found.per_second for _, found in placed]),
        ):
            ax.scatter(
                x,
                accuracy,
                color=colour,
                marker=marker,
                edgecolor="white",
                s=60,
                zorder=4 if label.startswith("EGM") else 3,  # two of them stand at one place
                label=label,
            )
            sides = [side] * (len(placed) - 1) + [last_side]
            for (model, found), across, up, where in zip(placed, x, accuracy, sides, strict=True):
                count = "" if found.devices == 1 else f" on {found.devices}"
                ax.annotate(
                    f"{billions(model.name):g}B{count}",
                    (across, up),
                    textcoords="offset points",
                    fontsize=7,
                    color=INK,
                    **where,
                )
    left.set(
        xlabel="ms of one request, alone",
        ylabel="accuracy at IoU > 0.5, % (paper)",
        title=f"How long a user waits, on {device.name}",
    )
    right.set(xlabel="device time per image, ms, many requests", title="What an image costs")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.margins(0.12)
        _plain_ticks(ax.xaxis)
        ax.grid(True)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    caption = (
        "Accuracy against predicted time: 16 bits, images of 640 x 480 px, on the fewest devices "
        'that hold the model ("on 2": two). Left: one request alone. Right: devices times the '
        "time per image, at nine tenths of the highest rate. Answers of 101 tokens for EGM, 42 for "
        "Instruct, 30 for InternVL-3. Thinking models are left out: the length of their answers is "
        "not reported."
    )
    too_large = [model.name for model, found in options if found is None]
    if too_large:
        caption += f" Too large for the device: {', '.join(too_large)}."
    return figure, caption


def _plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis: 1, 2, 5, 10 ..., or 1, 10 ... on a long one."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _shown_groups() -> dict[str, list[Point]]:
    """The groups of the table, with two of each device that we measured on ourselves."""
    shown: dict[str, list[Point]] = {}
    for name, source, points in groups():
        if not points or "left out" in name:
            continue
        if source == "ours":
            phase = "decoding" if name.startswith("decoding") else "prompt and image"
            name = f"{phase}, ours, {points[0].source}"
        shown.setdefault(name, []).extend(points)
    return shown


def roofline(device: Device) -> tuple[Figure, str]:
    """Predicted against measured milliseconds."""
    figure = new_figure(7.2, 5.0)
    ax = figure.subplots()
    shown, every = _shown_groups(), []
    for (colour, marker), (name, points) in zip(MARKS[: len(shown)], shown.items(), strict=True):
        counted = [point for point in points if not point.faster_than_peak]
        x = [point.ms for point in counted]
        y = [point.predicted_ms() for point in counted]
        every += x + y
        ax.scatter(x, y, s=34, color=colour, marker=marker, label=name, zorder=3, alpha=0.85)
    ends = [min(every) * 0.7, max(every) * 1.4]
    ax.plot(ends, ends, color=INK, linewidth=0.9)
    for factor in (0.5, 2):
        ax.plot(ends, [factor * end for end in ends], color=FAINT, linewidth=0.7, linestyle=":")
    ax.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="measured, ms",
        ylabel="predicted, ms",
        title="The roofline against measurements",
    )
    ax.grid(True)
    figure.legend(
        *ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7.5
    )
    return (
        figure,
        "Each point is one pass: a token, a prompt or an image. Dotted: predictions of twice and "
        "half the measured time. Decoding is predicted well, prefill only roughly.",
    )
