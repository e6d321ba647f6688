"""Which EGM model answers fast enough on a device, and what a direct model as accurate would cost.

    python -m egm_lib.evaluation.plan_latency --gpu L20 --images 640x480 --budget-ms 1500
    python -m egm_lib.evaluation.plan_latency --gpu Jetson-Thor --images-per-second 10

Times are the roofline's; docs/efficiency.md says how far they are from measurements. Accuracies are
the paper's (Table 4, or Fig. 5). EGM's answers are taken to have 101 tokens and direct ones 42, as
in the paper's teaser, and InternVL's direct ones 30. A model runs on the fewest devices that hold
it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from egm_lib.cli import ends
from egm_lib.errors import InputError
from egm_lib.evaluation.paper_models import PaperModel, paper_models
from egm_lib.evaluation.roofline import (
    DEVICES,
    PRECISIONS,
    Device,
    Precision,
    Request,
    Serving,
    device_of,
    fits,
    predict,
)

MOST_DEVICES = 16
CONCURRENCIES = tuple(2**power for power in range(9))  # 1 to 256
NEARLY = 0.9  # of the highest rate: more requests at a time would only wait longer


@dataclass(frozen=True)
class Option:
    """A model on a device. devices: that one copy of it needs. alone_ms: of one request.

    at_once, loaded_ms, per_second: the fewest requests at a time that reach NEARLY the highest rate
    within the budget, how long each then takes, and images a second. None where even one request
    takes longer than the budget.
    """

    model: PaperModel
    devices: int
    alone_ms: float
    at_once: int | None
    loaded_ms: float | None
    per_second: float | None

    @property
    def within_budget(self) -> bool:
        return self.per_second is not None

    def devices_for(self, images_per_second: float) -> int | None:
        """Devices for so many images a second; None where the budget is missed."""
        if self.per_second is None:
            return None
        return self.devices * math.ceil(images_per_second / self.per_second)


@dataclass(frozen=True)
class Plan:
    """An EGM model, and the cheapest direct one that is at least as accurate.

    egm, direct: None where a model does not fit on MOST_DEVICES. rival: None where no direct model
    of the paper is as accurate.
    """

    model: PaperModel
    egm: Option | None
    rival: PaperModel | None
    direct: Option | None


def option(
    model: PaperModel,
    device: Device,
    *,
    image_wh: tuple[int, int] = (640, 480),
    precision: Precision = "bf16",
    budget_ms: float = math.inf,
) -> Option | None:
    """How fast a model is on the fewest devices that hold it; None where none of them do."""
    if model.answer_tokens is None:
        raise InputError(f"The answer length of {model.name} is not known.")
    request = Request(image_wh=image_wh, answer_tokens=model.answer_tokens)
    most = MOST_DEVICES if device.link_gbs else 1
    sizes = [2**power for power in range(most.bit_length())]
    alone = [
        Serving(device=device, precision=precision, tensor_parallel=parallel) for parallel in sizes
    ]
    held = next((serving for serving in alone if fits(model.shape, request, serving)), None)
    if held is None:
        return None
    found = []
    for at_once in CONCURRENCIES:
        serving = replace(held, concurrency=at_once)
        ms = predict(model.shape, request, serving).total_ms
        if ms <= budget_ms and fits(model.shape, request, serving):
            found.append((1000 * at_once / ms, at_once, ms))
    parallel, alone_ms = held.tensor_parallel, predict(model.shape, request, held).total_ms
    if not found:
        return Option(model, parallel, alone_ms, None, None, None)
    most = max(per_second for per_second, _, _ in found)
    per_second, at_once, loaded_ms = next(row for row in found if row[0] >= NEARLY * most)
    return Option(model, parallel, alone_ms, at_once, loaded_ms, per_second)


def plan(
    device: Device,
    names: Sequence[str] = (),
    *,
    image_wh: tuple[int, int] = (640, 480),
    precision: Precision = "bf16",
    budget_ms: float = math.inf,
) -> list[Plan]:
    """Plans for EGM models, all or those named. Raises InputError for an unknown name."""
    egm = {model.name: model for model in paper_models() if model.kind == "EGM"}
    if unknown := [name for name in names if name not in egm]:
        raise InputError(f"No EGM model {', '.join(unknown)}: use some of {', '.join(egm)}.")

    def of(model: PaperModel | None) -> Option | None:
        return model and option(
            model, device, image_wh=image_wh, precision=precision, budget_ms=budget_ms
        )

    plans = []
    for name in names or egm:
        model = egm[name]
        rivals = [
            other
            for other in paper_models()
            if other.kind == "direct" and other.accuracy >= model.accuracy
        ]
        options = {other.name: of(other) for other in rivals}
        held = [found for found in options.values() if found]
        best = min(held, key=lambda found: found.devices * found.alone_ms, default=None)
        smallest = min(rivals, key=lambda other: other.shape.parameters, default=None)
        plans.append(Plan(model, of(model), best.model if best else smallest, best))
    return plans


def as_text(
    plans: Sequence[Plan], device: Device, budget_ms: float, images_per_second: float | None
) -> str:
    """The plans as lines of text, and which model to take."""
    lines = []
    for found in plans:
        head = f"{found.model.name} ({found.model.accuracy:.1f} %)"
        lines.append(f"{head}: {_described(found.egm, budget_ms, images_per_second)}")
        if found.rival is None:
            lines.append("    direct: no direct model of the paper is as accurate")
        else:
            rival = f"{found.rival.name} ({found.rival.accuracy:.1f} %)"
            lines.append(
                f"    direct, as accurate: {rival}: "
                f"{_described(found.direct, budget_ms, images_per_second)}"
            )
    meeting = [found for found in plans if found.egm and found.egm.within_budget]
    if math.isfinite(budget_ms):
        best = max(meeting, key=lambda found: found.model.accuracy, default=None)
        text = f"The most accurate EGM model within {budget_ms:,.0f} ms on {device.name}: "
        lines.append(text + (best.model.name if best else "none") + ".")
    return "\n".join(lines)


def _described(found: Option | None, budget_ms: float, images_per_second: float | None) -> str:
    if found is None:
        return "does not fit"
    count = "1 device" if found.devices == 1 else f"{found.devices} devices"
    text = f"{count}, {found.alone_ms:,.0f} ms for one request"
    if found.per_second is None:
        return f"{text}: longer than the budget"
    text += f"; up to {found.per_second:,.1f} images a second, {found.at_once} at a time"
    text += f" and {found.loaded_ms:,.0f} ms each"
    if images_per_second is not None:
        text += f"; {images_per_second:g} a second need {found.devices_for(images_per_second)}"
    return text


def image_size(text: str) -> tuple[int, int]:
    """The value of --images: 640x480."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size: write it as 640x480")
    return int(width), int(height)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m egm_lib.evaluation.plan_latency", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--gpu", default="L20", help=f"{', '.join(DEVICES)}; default: L20")
    parser.add_argument("--images", type=image_size, default=(640, 480), metavar="WxH")
    parser.add_argument("--model", action="append", default=[], help="an EGM model; default: all")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the weights")
    parser.add_argument("--budget-ms", type=positive, default=math.inf, help="the longest answer")
    parser.add_argument("--images-per-second", type=positive, help="how many must be answered")
    args = parser.parse_args(argv)
    return ends(lambda: _print_plan(args))


def _print_plan(args: argparse.Namespace) -> None:
    device = device_of(args.gpu)
    plans = plan(
        device,
        args.model,
        image_wh=args.images,
        precision=args.precision,
        budget_ms=args.budget_ms,
    )
    width, height = args.images
    print(
        f"{device.name} ({device.memory_gb:g} GB, {device.bandwidth_gbs:g} GB/s), "
        f"{args.precision}, images of {width} x {height} px; predicted, not measured"
    )
    print(as_text(plans, device, args.budget_ms, args.images_per_second))


if __name__ == "__main__":
    sys.exit(main())
