"""The reward of one optimisation step of the paper (256 x 16 = 4,096 completions) on one core.

It is compared with a straightforward implementation, written here: find the fence and read its
JSON, else find four numbers.

    python benchmarks/bench_reward.py
"""

import json
import re

from bench_parsing import completions, seconds

from egm_lib.reward import egm_reward

COMPLETIONS = 256 * 16
FENCE = re.compile(r"```json(.*?)```", re.DOTALL)
FOUR = re.compile(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]")


def straightforward_reward(
    completion: str, gt: tuple[float, ...], image_wh: tuple[int, int]
) -> float:
    answer = completion.split("</think>")[-1]
    try:
        box = json.loads(FENCE.search(answer)[1])[0]["bbox_2d"]
    except (TypeError, ValueError, KeyError, IndexError):
        match = FOUR.search(answer)
        if match is None:
            return 0.0
        box = [float(value) for value in match.groups()]
    (width, height), (gx1, gy1, gx2, gy2) = image_wh, gt
    x1, y1, x2, y2 = (
        box[0] * width / 1000,
        box[1] * height / 1000,
        box[2] * width / 1000,
        box[3] * height / 1000,
    )
    intersection = max(0.0, min(x2, gx2) - max(x1, gx1)) * max(0.0, min(y2, gy2) - max(y1, gy1))
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - intersection
    overlap = intersection / union if union > 0 else 0.0
    return 0.5 * (overlap > 0.5) + 0.5 * overlap


def main() -> None:
    gt, image_wh = (280.0, 220.0, 490.0, 360.0), (640, 480)
    for name, text in completions().items():
        batch = [text] * COMPLETIONS, [gt] * COMPLETIONS, [image_wh] * COMPLETIONS
        assert (
            abs(
                straightforward_reward(text, gt, image_wh) - egm_reward([text], [gt], [image_wh])[0]
            )
            < 1e-9
        )
        ours = seconds(lambda batch=batch: egm_reward(*batch), repeats=7)
        theirs = seconds(lambda batch=batch: list(map(straightforward_reward, *batch)), repeats=7)
        print(
            f"{name}: egm_reward {COMPLETIONS / ours:,.0f}/s; straightforward "
            f"{COMPLETIONS / theirs:,.0f}/s"
        )
    hostile = "<answer>" * 25_000
    took = seconds(lambda: egm_reward([hostile], [gt], [image_wh]))
    print(
        f"one hostile answer of {len(hostile):,} characters (<answer> repeated): {took * 1e3:.2f} "
        "ms"
    )


if __name__ == "__main__":
    main()
