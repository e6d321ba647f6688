"""Parsing on one core: completions per second, and whether any text takes more than linear time.

python benchmarks/bench_parsing.py
"""

import argparse
import time
from collections.abc import Callable

from egm_lib.boxes import BoxFrame
from egm_lib.parsing import RULES, parse_completion
from egm_lib.prompts import FAMILIES

BENIGN = "The person stands left of the tree, next to a bicycle. "
HOSTILE = {
    "<answer> repeated": "<answer>",
    "<think> repeated": "<think>",
    "</think> repeated": "</think>",
    "open tags with blanks": "<   think   ",
    "blanks after an open tag": "<" + " " * 1000,
    "open brackets": "[",
    "open brackets with a number": "[1,",
    "nested lists": "[1,[",
    "four numbers, never closed": "[1,2,3,4",
    "five numbers": "[1,2,3,4,5]",
    "boxes": "[1,2,3,4]",
    "open parentheses": "(1,",
    "pairs": "(1,2),",
    "half pairs": "(1,2),(",
    "angles": "<1>",
    "digits": "9",
    "spaces": " ",
    "spaces after a bracket": "[" + " " * 1000,
    "commas": ",",
    "signs": "-",
    "quotes": '"',
    "keys": '": "',
    "escapes": '": "\\',
    "escaped quotes": '": \\"',
    "<ref> repeated": "<ref>",
    "<ref> and angles": "<ref><",
    "<box> repeated": "<box>1",
    "corner keys": "x_min=1,",
    "corners apart": "x1=1,y1=2 'key' 'key' ",
    "corner letters": "xyxy",
    "braces": "{[1,2,3,4]",
    "bbox_2d": '"bbox_2d": [1,2,3,',
    "full-width digits": "１",
    "lines of open brackets": "[\n",
}


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of the fastest of a few calls, which is the least disturbed one."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def completions() -> dict[str, str]:
    """Answers of about 100 tokens, the length of EGM-8B's (101, the paper's teaser), as each family
    writes them.
    """
    reasoning = (
        "To correctly identify the lady with the blue shirt, compare the people standing on the "
        "court. The first from "
        "the left wears white, the man beside her holds a racket, and the third from the left "
        "wears a bright blue top "
        "with her right arm raised. She stands between two men near the middle of the image, in "
        "front of the fence."
    )
    return {
        name: family.answer((284, 225, 484, 358), (640, 480), "lady with the blue shirt", reasoning)
        for name, family in FAMILIES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--size", type=int, default=1_000_000, help="characters of a hostile answer"
    )
    size = parser.parse_args().size

    def parse(text: str, rule: str = "egm") -> object:
        return parse_completion(text, frame=BoxFrame.NORM_1000, image_wh=(640, 480), rule=rule)

    for name, text in completions().items():
        took = seconds(lambda text=text: [parse(text) for _ in range(4096)], repeats=7)
        print(f"{name}: {len(text)} characters, {4096 / took:,.0f} completions/s")

    print(
        f"\n{size:,} characters, against a benign answer of that length (goal: 3) and against half "
        "of it (linear: 2)"
    )
    box = '{"bbox_2d": [100, 200, 300, 400]}'
    benign = (BENIGN * (size // len(BENIGN) + 1))[: size - len(box)] + box
    for rule in RULES:
        base = seconds(lambda r=rule: parse(benign, r))
        rows = []
        for name, unit in HOSTILE.items():
            text = (unit * (size // len(unit) + 1))[:size]
            took, half = (
                seconds(lambda t=t, r=rule: parse(t, r)) for t in (text, text[: size // 2])
            )
            rows.append((took, took / base, took / half, name))
        print(f"{rule}: benign {base * 1e3:.1f} ms; the three slowest:")
        for took, ratio, growth, name in sorted(rows, reverse=True)[:3]:
            print(
                f"    {name:28} {took * 1e3:8.1f} ms  {ratio:6.1f} x benign  {growth:5.1f} x half"
            )


if __name__ == "__main__":
    main()
